"""Experts on the mesh: which device multiplies which tokens with which expert's matrices.

Each device routes the tokens that it has. With mesh.fsdp the experts' matrices are split over
`data` by expert; here they are gathered for a layer, as other parameters are, and each device
computes its own tokens. `model` splits the hidden features of every expert, so its devices each
have a part of the sum that an output is, and add these up at the end.

With the letters of model/ (B rows, T positions, D embed).
"""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec

from tinylm.core.collectives import axes_of_partitioner, shard_map
from tinylm.core.mesh import AXES, activation_spec, parameter_spec, sizes_in_use

# An array, and the logical axes of its dimensions.
Named = tuple[jax.Array, Sequence[str | None]]


def on_tokens(
    function: Callable[..., jax.Array], tokens: Sequence[Named], matrices: Sequence[Named]
) -> jax.Array:
    """Return `function(*tokens, *matrices)`, x_BTD, computed by each device for its tokens.

    Args:
      function: of one device's tokens and of matrices of which `model` may have split the hidden
        features; then its result is a part of a sum over these.
      tokens: activations of axes (batch, positions, ...); the first is like the result.
      matrices: parameters with an axis `mlp`, in the type in which they are sent.
    """
    token_arrays = [x for x, _ in tokens]
    matrix_arrays = [x for x, _ in matrices]
    if max(sizes_in_use().values()) == 1:
        return function(*token_arrays, *matrix_arrays)

    token_specs = tuple(activation_spec(x, axes) for x, axes in tokens)
    matrix_specs = tuple(parameter_spec(x, axes) for x, axes in matrices)
    is_partial_sum = any(AXES.model in spec for spec in matrix_specs)
    out_spec = token_specs[0]
    if is_partial_sum:
        # Between two products the positions are split by `model` too, where it divides them.
        out_spec = activation_spec(token_arrays[0], ("batch", "seq", None))
    scatters = AXES.model in jax.tree.leaves(tuple(out_spec))

    def on_device(tokens: tuple, parts: tuple) -> jax.Array:
        whole = [_gathered(x, spec) for x, spec in zip(parts, matrix_specs, strict=True)]
        y_BTD = function(*tokens, *whole)
        if scatters:
            return jax.lax.psum_scatter(y_BTD, AXES.model, scatter_dimension=1, tiled=True)
        if is_partial_sum:
            return jax.lax.psum(y_BTD, AXES.model)
        return y_BTD

    on_mesh = shard_map(
        on_device,
        in_specs=(token_specs, matrix_specs),
        out_specs=out_spec,
        axis_names=axes_of_partitioner(),
    )
    return on_mesh(tuple(token_arrays), tuple(matrix_arrays))


def _gathered(part: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Return a parameter whole along `data`; its gradient is summed and scattered there."""
    if AXES.data not in spec:
        return part
    return jax.lax.all_gather(part, AXES.data, axis=spec.index(AXES.data), tiled=True)
