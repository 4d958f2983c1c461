"""The optimizer and its schedule, put together from Optax.

AdamW (Loshchilov and Hutter 2019) for all parameters, or Muon (Jordan et al. 2024) for the matrices
of the blocks and Adam with Nesterov momentum (Dozat 2016) for the rest, without decay. What is a
matrix is read from the logical axes, since stacked layers add an axis to every parameter.
"""

import jax
import optax

from tinylm.train.config import OptimizerConfig

Axes = dict[str, tuple]


def make_schedule(
    config: OptimizerConfig, num_steps: int, peak: float | None = None
) -> optax.Schedule:
    """Return learning rate as a function of the step: linear warm-up, then what
    `optimizer.schedule` names.
    """
    peak = config.learning_rate if peak is None else peak
    end, left = peak * config.min_ratio, max(1, num_steps - config.warmup_steps)
    match config.schedule:
        case "cosine":
            main = optax.cosine_decay_schedule(peak, left, config.min_ratio)
        case "linear":
            main = optax.linear_schedule(peak, end, left)
        case "wsd":
            decay = max(1, round(left * config.decay_fraction))
            main = optax.linear_schedule(peak, end, decay, transition_begin=left - decay)
        case "constant":
            main = optax.constant_schedule(peak)
        case other:
            raise ValueError(
                f"optimizer.schedule={other!r} has no schedule here; add a case for it."
            )
    if not config.warmup_steps:
        return main

    def warm_up(step):
        return peak * (step + 1) / config.warmup_steps

    return optax.join_schedules([warm_up, main], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, num_steps: int, axes: Axes
) -> optax.GradientTransformation:
    """Return clipping, then what `optimizer.name` names; `axes` are the logical axes of each
    parameter by path.
    """
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    schedule = make_schedule(config, num_steps)
    shared = {"weight_decay": config.weight_decay, "eps": config.epsilon}
    match config.name:
        case "adamw":
            decayed = _by_path(lambda path: is_matrix(axes[path]))
            update = optax.adamw(schedule, config.beta1, config.beta2, mask=decayed, **shared)
        case "muon":
            # Optax hands `nesterov`, which is on, to the Adam of the other parameters as well.
            update = optax.contrib.muon(
                schedule,
                beta=config.muon_momentum,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
                adam_learning_rate=make_schedule(
                    config, num_steps, config.adam_learning_rate or None
                ),
                muon_weight_dimension_numbers=_by_path(lambda path: _muon_dimensions(axes[path])),
                **shared,
            )
        case other:
            raise ValueError(f"optimizer.name={other!r} has no optimizer here; add a case for it.")
    return optax.chain(*clip, update)


def _by_path(function):
    """Return a function of the parameters that gives `function(path)` for each, path like
    "blocks/mlp/up/kernel".
    """
    return lambda params: jax.tree_util.tree_map_with_path(
        lambda path, _: function("/".join(str(key.key) for key in path)), params
    )


def _muon_dimensions(axes: tuple) -> optax.contrib.MuonDimensionNumbers | None:
    """Return which dimensions of a kernel are inputs and outputs; None for what Adam optimizes."""
    if not is_matrix(axes) or "vocab" in axes or "seq" in axes:
        return None
    inner = range(axes.count("layers"), len(axes))
    embed = axes.index("embed")
    others = tuple(dim for dim in inner if dim != embed)
    inputs, outputs = ((embed,), others) if embed == inner[0] else (others, (embed,))
    return optax.contrib.MuonDimensionNumbers(inputs, outputs)


def is_matrix(axes: tuple) -> bool:
    """Say whether a parameter with these logical axes is a matrix (weights, embeddings), not a
    scale or a bias.

    The kernels of attention have three axes, one of them split in heads; a bias over heads has two,
    both outputs; the taps of a convolution are scales of features.
    """
    inner = [name for name in axes if name != "layers"]
    return len(inner) >= 2 and "embed" in inner and "tap" not in inner
