"""Experts on the mesh: which device multiplies which tokens with which expert's matrices.

With mesh.fsdp the matrices of the experts are split over `data` by expert, as the batch is by rows,
so state and tokens need no axis of their own for experts. There are two ways to bring them
together:

- The matrices of a layer are gathered, as other parameters are, and each device computes its own
  tokens. It sends three times the matrices in a micro-batch, however many tokens there are.
- The tokens are sent to the devices that have their experts, and the results back
  (`model.expert_parallel`; Lepikhin et al. 2021). It sends four times the tokens' features for each
  of their experts, however large the experts are.

A device has room for half as many rows again as it sends (its capacity), which is what it receives
where the loads of devices are even. Where they are not, and one device would receive more, the
matrices are gathered in this layer and micro-batch instead, so that no token is dropped whatever
the router does.

`model` splits the hidden features of every expert, so its devices each have a part of the sum that
an output is, and add these up at the end.

With the letters of model/ (B rows, T positions, D embed, C experts of a token, M = BTC, X experts),
N devices along `data`, R received.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from tinylm.core.collectives import axes_of_partitioner, shard_map
from tinylm.core.log import say_once
from tinylm.core.mesh import (
    AXES,
    Axes,
    activation_spec,
    axes_that_split,
    parameter_spec,
    sizes_in_use,
    target_platform,
)

# A matrix, and the logical axes of its dimensions; the first one is `experts`.
Named = tuple[jax.Array, Axes]
# `function(x_TD, group_M, *matrices)` returns y_MD: row m of token m // C times the matrices of its
# group; 0 where the group's number is that of no matrix.
RowsFunction = Callable[..., jax.Array]

# The name of rows that came from other devices, for policies of what the backward pass finds.
EXCHANGED = "exchanged rows"
# The capacity: the rows that a device has room for, in those that it sends.
_CAPACITY_FACTOR = 1.5
# Marks an exchange in a program's text: of how many rows of its result a device sends as many where
# loads are even.
REAL_ROWS = "real_rows_{}_of_{}"


class Choice(NamedTuple):
    """The experts of each token."""

    experts_BTC: jax.Array
    weights_BTC: jax.Array  # of their outputs


def weighted_experts(
    function: RowsFunction,
    x_BTD: jax.Array,
    choice: Choice,
    matrices: Sequence[Named],
    *,
    by_exchange: bool,
) -> jax.Array:
    """Return for each token the weighted sum of what its experts make of it, x_BTD.

    Args:
      function: computes rows. `model` may have split the hidden features of the matrices; then its
        result is a part of a sum over these.
      x_BTD: the tokens' features.
      choice: where they go.
      matrices: of all experts, in the type in which they are sent.
      by_exchange: whether tokens are sent to the experts where that is possible.
    """
    arrays = tuple(matrix for matrix, _ in matrices)
    if max(sizes_in_use().values()) == 1:
        return _weighted_sum(function, x_BTD, choice, arrays)

    axes = ("batch", "positions", None)
    x_spec = activation_spec(x_BTD, axes)
    choice_specs = jax.tree.map(lambda x: activation_spec(x, axes), choice)
    matrix_specs = tuple(parameter_spec(x, names) for x, names in matrices)
    is_partial_sum = any(AXES.model in spec for spec in matrix_specs)
    out_spec = x_spec
    if is_partial_sum:
        # Between two products the positions are split by `model` too, where it divides them.
        out_spec = activation_spec(x_BTD, ("batch", "seq", None))
    scatters = AXES.model in axes_that_split(out_spec)
    exchanges = by_exchange and _can_exchange(x_spec, matrix_specs)

    # Gathered matrices are gathered again for the backward pass, or all layers' would be kept.
    @functools.partial(jax.checkpoint, policy=_is_not_gathered)
    def gather(x_BTD: jax.Array, choice: Choice, parts: tuple) -> jax.Array:
        return _weighted_sum(function, x_BTD, choice, _gathered(parts, matrix_specs))

    def on_device(x_BTD: jax.Array, choice: Choice, parts: tuple) -> jax.Array:
        if exchanges:
            y_BTD = _exchanged_or_gathered(function, x_BTD, choice, parts)
        else:
            y_BTD = gather(x_BTD, choice, parts)
        if scatters:
            return jax.lax.psum_scatter(y_BTD, AXES.model, scatter_dimension=1, tiled=True)
        if is_partial_sum:
            return jax.lax.psum(y_BTD, AXES.model)
        return y_BTD

    on_mesh = shard_map(
        on_device,
        in_specs=(x_spec, choice_specs, matrix_specs),
        out_specs=out_spec,
        axis_names=axes_of_partitioner(),
    )
    return on_mesh(x_BTD, choice, arrays)


def _can_exchange(x_spec: PartitionSpec, matrix_specs: Sequence[PartitionSpec]) -> bool:
    """Say whether `data` splits both the tokens and the matrices by expert."""
    if sizes_in_use()[AXES.data] == 1:
        return False
    # A batch that the mesh doesn't divide, as that of one prompt, is whole on every device.
    if AXES.data not in axes_that_split(x_spec[:1]):
        return False
    if any(spec[0] != AXES.data for spec in matrix_specs):
        say_once(
            "model.expert_parallel is off: the data axis does not divide model.num_experts, so "
            "experts are gathered."
        )
        return False
    return True


def _gathered(parts: Sequence[jax.Array], specs: Sequence[PartitionSpec]) -> tuple[jax.Array, ...]:
    """Return matrices whole along `data`; their gradients are summed and scattered there."""
    whole = []
    for part, spec in zip(parts, specs, strict=True):
        if AXES.data in spec:
            dim = spec.index(AXES.data)
            part = jax.lax.all_gather(part, AXES.data, axis=dim, tiled=True)
        whole.append(part)
    return tuple(whole)


def _is_not_gathered(primitive: Any, *operands: Any, **params: Any) -> bool:
    """Say whether the backward pass finds the result of an operation stored.

    JAX 0.10 to 0.12 knows gathers by this name. By another one gathered matrices would be kept.
    """
    del operands, params
    return primitive.name != "all_gather"


def _weighted_sum(
    function: RowsFunction, x_BTD: jax.Array, choice: Choice, matrices: tuple[jax.Array, ...]
) -> jax.Array:
    """Return what the experts make of tokens, on a device that has both."""
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    y_MD = function(x_TD, choice.experts_BTC.reshape(-1), *matrices)
    return _add_up(y_MD, choice, x_BTD)


def _add_up(y_MD: jax.Array, choice: Choice, x_BTD: jax.Array) -> jax.Array:
    """Return the weighted sum of the rows of each token, like `x_BTD`."""
    y_BTCD = y_MD.reshape(*choice.experts_BTC.shape, -1)
    return jnp.sum(choice.weights_BTC[..., None] * y_BTCD, axis=2).astype(x_BTD.dtype)


def _exchanged_or_gathered(
    function: RowsFunction, x_BTD: jax.Array, choice: Choice, parts: tuple[jax.Array, ...]
) -> jax.Array:
    """Return what the experts make of tokens, on devices that have a part of both."""
    num_devices = jax.lax.axis_size(AXES.data)
    experts_here = len(parts[0])
    num_experts = num_devices * experts_here
    experts_M = choice.experts_BTC.reshape(-1)
    num_rows = len(experts_M)
    capacity = min(_rounded_up(_CAPACITY_FACTOR * num_rows), num_devices * num_rows)

    # How many rows each device has for each expert, and so how many it sends to each device.
    counts_X = jnp.sum(experts_M[:, None] == jnp.arange(num_experts), axis=0, dtype=jnp.int32)
    counts_NX = jax.lax.all_gather(counts_X, AXES.data)
    counts_NNX = counts_NX.reshape(num_devices, num_devices, experts_here)
    sent_NN = jnp.sum(counts_NNX, axis=-1)
    is_within_capacity = jnp.max(jnp.sum(sent_NN, axis=0)) <= capacity

    def exchange(x_BTD: jax.Array, choice: Choice, parts: tuple[jax.Array, ...]) -> jax.Array:
        # Sorted by expert, rows are sorted by the device that they go to.
        order_M = jnp.argsort(experts_M, stable=True)
        place_M = jnp.argsort(order_M)
        x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
        x_MD = _permuted(jnp.repeat(x_TD, choice.experts_BTC.shape[-1], axis=0), order_M, place_M)
        x_RD = checkpoint_name(_exchange(num_rows, capacity, x_MD, sent_NN), EXCHANGED)
        # They come by the device that sent them, and from each by expert.
        here_NX = counts_NNX[:, jax.lax.axis_index(AXES.data)]
        ends_of_groups = jnp.cumulative_sum(here_NX.reshape(-1))
        group_R = jnp.searchsorted(ends_of_groups, jnp.arange(capacity), side="right")
        is_row_R = group_R < len(ends_of_groups)
        expert_R = jnp.where(is_row_R, group_R % experts_here, experts_here)
        y_RD = function(x_RD, expert_R, *parts)
        y_MD = checkpoint_name(_exchange(capacity, num_rows, y_RD, sent_NN.T), EXCHANGED)
        return _add_up(_permuted(y_MD, place_M, order_M), choice, x_BTD)

    # What the backward pass needs of one branch takes memory in the other one, too, so this one
    # keeps nothing.
    @jax.checkpoint
    def gather(x_BTD: jax.Array, choice: Choice, parts: tuple[jax.Array, ...]) -> jax.Array:
        by_expert = [PartitionSpec(AXES.data)] * len(parts)
        return _weighted_sum(function, x_BTD, choice, _gathered(parts, by_expert))

    return jax.lax.cond(is_within_capacity, exchange, gather, x_BTD, choice, parts)


def _rounded_up(rows: float) -> int:
    """Return a number of rows that is a multiple of 8, which vector units take at once."""
    return 8 * -(-int(rows) // 8)


# The transpose of a permutation is its inverse. JAX's own derivative would scatter and add.
@jax.custom_vjp
def _permuted(x_MD: jax.Array, order_M: jax.Array, inverse_M: jax.Array) -> jax.Array:
    """Return the rows in an order, whose inverse comes with it."""
    return x_MD[order_M]


def _permuted_forward(
    x_MD: jax.Array, order_M: jax.Array, inverse_M: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return x_MD[order_M], inverse_M


def _permuted_backward(inverse_M: jax.Array, dy_MD: jax.Array) -> tuple[jax.Array, None, None]:
    return dy_MD[inverse_M], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchange(num_rows: int, capacity: int, x_MD: jax.Array, sent_NN: jax.Array) -> jax.Array:
    """Send rows to the devices along `data`, and return those that came, x_RD.

    The rows to each device lie one behind the other, and so do those from each. What comes back by
    the transposed table is what was sent; gradients go that way.

    Args:
      num_rows: of `x_MD`.
      capacity: how many rows the result has; those behind the last that came are 0.
      x_MD: the rows to send.
      sent_NN: how many rows each device (first axis) sends to each (second axis).
    """
    real_rows = min(num_rows, capacity)
    if target_platform() == "cpu":
        return _exchange_on_cpu(real_rows, capacity, x_MD, sent_NN)
    me = jax.lax.axis_index(AXES.data)
    sent_N = sent_NN[me]
    received_N = sent_NN[:, me]
    begins_N = jnp.cumulative_sum(sent_N) - sent_N
    # Where a device's rows begin in the buffer of each other device.
    before_NN = jnp.cumulative_sum(sent_NN, axis=0) - sent_NN
    nothing_RD = jnp.zeros((capacity, x_MD.shape[-1]), x_MD.dtype)
    with jax.named_scope(REAL_ROWS.format(real_rows, capacity)):
        return jax.lax.ragged_all_to_all(
            x_MD, nothing_RD, begins_N, sent_N, before_NN[me], received_N, axis_name=AXES.data
        )


def _exchange_on_cpu(
    real_rows: int, capacity: int, x_MD: jax.Array, sent_NN: jax.Array
) -> jax.Array:
    """Return what `_exchange` does, where XLA has no ragged all-to-all: all rows are gathered."""
    me = jax.lax.axis_index(AXES.data)
    with jax.named_scope(REAL_ROWS.format(real_rows, len(sent_NN) * len(x_MD))):
        x_NMD = jax.lax.all_gather(x_MD, AXES.data)
    ends_N = jnp.cumulative_sum(sent_NN[:, me])
    begins_NN = jnp.cumulative_sum(sent_NN, axis=1) - sent_NN
    place_R = jnp.arange(capacity)
    source_R = jnp.searchsorted(ends_N, place_R, side="right")
    is_row_R = source_R < len(ends_N)
    source_R = jnp.minimum(source_R, len(ends_N) - 1)
    within_R = place_R - (ends_N - sent_NN[:, me])[source_R]
    row_R = jnp.where(is_row_R, begins_NN[source_R, me] + within_R, 0)
    return jnp.where(is_row_R[:, None], x_NMD[source_R, row_R], 0)


def _exchange_forward(
    num_rows: int, capacity: int, x_MD: jax.Array, sent_NN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _exchange(num_rows, capacity, x_MD, sent_NN), sent_NN


def _exchange_backward(
    num_rows: int, capacity: int, sent_NN: jax.Array, dx_RD: jax.Array
) -> tuple[jax.Array, Any]:
    return _exchange(capacity, num_rows, dx_RD, sent_NN.T), None


_exchange.defvjp(_exchange_forward, _exchange_backward)
