"""The optimizer and its schedule, put together from Optax.

AdamW (Loshchilov and Hutter 2019) for all parameters, or Muon (Jordan et al. 2024) for the matrices
of the blocks and Adam with Nesterov momentum (Dozat 2016) for the rest, without decay. With
`optimizer.muon_beta2` Muon evens out the outputs of a matrix (NorMuon, 2025). What is a matrix is
read from the logical axes, since stacked layers add an axis to every parameter.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tinylm.core.text import path_text
from tinylm.train.config import OptimizerConfig

Axes = dict[str, tuple]  # the logical axes of each parameter by its path


def make_schedule(
    config: OptimizerConfig, num_steps: int, peak: float | None = None
) -> optax.Schedule:
    """Return the learning rate as a function of the step.

    Linear warm-up, then what `optimizer.schedule` names.

    Args:
      config: the optimizer section.
      num_steps: length of the schedule, warm-up included.
      peak: highest learning rate; None: `optimizer.learning_rate`.
    """
    if peak is None:
        peak = config.learning_rate
    end = peak * config.min_ratio
    steps_after_warmup = max(1, num_steps - config.warmup_steps)
    match config.schedule:
        case "cosine":
            main = optax.cosine_decay_schedule(peak, steps_after_warmup, config.min_ratio)
        case "linear":
            main = optax.linear_schedule(peak, end, steps_after_warmup)
        case "wsd":
            decay_steps = max(1, round(steps_after_warmup * config.decay_fraction))
            stable_steps = steps_after_warmup - decay_steps
            main = optax.linear_schedule(peak, end, decay_steps, transition_begin=stable_steps)
        case "constant":
            main = optax.constant_schedule(peak)
        case other:
            raise ValueError(
                f"optimizer.schedule={other!r} has no schedule here; add a case for it."
            )
    if not config.warmup_steps:
        return main

    def warm_up(step: jax.Array) -> jax.Array:
        # The first step has a learning rate above 0, too.
        return peak * (step + 1) / config.warmup_steps

    return optax.join_schedules([warm_up, main], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, num_steps: int, axes: Axes
) -> optax.GradientTransformation:
    """Return clipping of the gradient, then what `optimizer.name` names.

    Args:
      config: the optimizer section.
      num_steps: length of the schedule.
      axes: tell which parameters are matrices.
    """
    match config.name:
        case "adamw":
            is_decayed = _for_each_parameter(lambda path: is_matrix(axes[path]))
            update = optax.adamw(
                make_schedule(config, num_steps),
                config.beta1,
                config.beta2,
                eps=config.epsilon,
                weight_decay=config.weight_decay,
                mask=is_decayed,
            )
        case "muon":
            update = _make_muon(config, num_steps, axes)
        case other:
            raise ValueError(f"optimizer.name={other!r} has no optimizer here; add a case for it.")
    if not config.clip_norm:
        return optax.chain(update)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _make_muon(config: OptimizerConfig, num_steps: int, axes: Axes) -> optax.GradientTransformation:
    """Return Muon for the matrices of the blocks, and Adam for the rest."""
    schedule = make_schedule(config, num_steps)
    adam_schedule = make_schedule(config, num_steps, config.adam_learning_rate or None)
    dimensions = _for_each_parameter(lambda path: _muon_dimensions(axes[path]))
    if not config.muon_beta2:
        # Optax hands `nesterov`, which is on, to the Adam of the other parameters as well.
        return optax.contrib.muon(
            schedule,
            beta=config.muon_momentum,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            adam_learning_rate=adam_schedule,
            muon_weight_dimension_numbers=dimensions,
        )

    # The same parts, with the outputs evened in between.
    matrices = optax.chain(
        optax.contrib.scale_by_muon(
            beta=config.muon_momentum, eps=config.epsilon, weight_dimension_numbers=dimensions
        ),
        _even_outputs(config.muon_beta2, config.epsilon, dimensions),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    rest = optax.adam(adam_schedule, config.beta1, config.beta2, config.epsilon, nesterov=True)
    label = _for_each_parameter(lambda path: "muon" if _muon_dimensions(axes[path]) else "adam")
    return optax.partition({"muon": matrices, "adam": rest}, label)


class _OutputsState(NamedTuple):
    num_updates: jax.Array
    squares: Any  # of each output the mean over its inputs, averaged over the steps


def _even_outputs(
    decay: float, epsilon: float, dimensions: Callable[[dict], dict]
) -> optax.GradientTransformation:
    """Divide each output's update by the root of its mean square over the steps, keep the norm of
    the matrix, and scale it by its shape as Optax's Muon does.

    The inputs are kept as an axis of size 1, so that the state lies on the mesh like the parameter.
    """

    def mean_squares(update: jax.Array, dims: optax.contrib.MuonDimensionNumbers) -> jax.Array:
        return jnp.mean(jnp.square(update), axis=dims.reduction_axis, keepdims=True)

    def init(params: dict) -> _OutputsState:
        squares = jax.tree.map(mean_squares, params, dimensions(params))
        return _OutputsState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(squares))

    def even(
        update: jax.Array, square: jax.Array, dims: optax.contrib.MuonDimensionNumbers
    ) -> jax.Array:
        evened = update / (jnp.sqrt(square) + epsilon)
        matrix = (*dims.reduction_axis, *dims.output_axis)
        norm_before = jnp.sqrt(jnp.sum(jnp.square(update), matrix, keepdims=True))
        norm_after = jnp.sqrt(jnp.sum(jnp.square(evened), matrix, keepdims=True))
        fan_in = math.prod(update.shape[dim] for dim in dims.reduction_axis)
        fan_out = math.prod(update.shape[dim] for dim in dims.output_axis)
        shape_factor = max(1.0, fan_out / fan_in) ** 0.5
        return evened * (shape_factor * norm_before / (norm_after + epsilon))

    def update(
        updates: dict, state: _OutputsState, params: dict | None = None
    ) -> tuple[dict, _OutputsState]:
        del params
        dims = dimensions(updates)
        new = jax.tree.map(mean_squares, updates, dims)
        squares = optax.tree.update_moment(new, state.squares, decay, 1)
        num_updates = state.num_updates + 1
        unbiased = optax.tree.bias_correction(squares, decay, num_updates)
        return jax.tree.map(even, updates, unbiased, dims), _OutputsState(num_updates, squares)

    return optax.GradientTransformation(init, update)


def _for_each_parameter(function: Callable[[str], Any]) -> Callable[[dict], dict]:
    """Return what maps parameters to `function(path)`, path like "blocks/mlp/up/kernel"."""

    def of_leaf(path: tuple, _: Any) -> Any:
        return function(path_text(path))

    return lambda params: jax.tree_util.tree_map_with_path(of_leaf, params)


def _muon_dimensions(axes: tuple) -> optax.contrib.MuonDimensionNumbers | None:
    """Return which dimensions of a kernel are inputs and outputs; None for what Adam optimizes.

    All axes of a kernel other than `embed` lie on its other side: ("embed", "heads", "head_dim")
    maps one input dimension to two output dimensions. Matrices are stacked by layer and by expert,
    and each is a matrix of its own. A router, whose outputs are experts, is left to Adam.
    """
    if not is_matrix(axes) or "vocab" in axes or "seq" in axes or axes[-1] == "experts":
        return None
    num_stacked = axes.count("layers") + axes.count("experts")
    embed = axes.index("embed")
    others = tuple(dim for dim in range(num_stacked, len(axes)) if dim != embed)
    embed_is_input = embed == num_stacked
    if embed_is_input:
        return optax.contrib.MuonDimensionNumbers((embed,), others)
    return optax.contrib.MuonDimensionNumbers(others, (embed,))


def is_matrix(axes: tuple) -> bool:
    """Say whether a parameter is a matrix (weights, embeddings), not a scale or a bias.

    The kernels of attention have three axes, one of them split in heads; a bias over heads has two,
    both outputs; the taps of a convolution are scales of features.
    """
    inner = [name for name in axes if name != "layers"]
    return len(inner) >= 2 and "embed" in inner and "tap" not in inner
