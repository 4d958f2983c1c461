"""The guard of a run: what keeps one bad batch from spoiling it, and remembers evaluations for
patience.

A step is bad where the loss or the gradient's norm is not finite, or (with `train.spike_sigmas`)
where the loss lies that many standard deviations above its running mean. The step program itself
leaves the state untouched by a bad step and takes the next batch in its place; the host, one
dispatch later, does what `train.on_bad_step` says. All counts are in the state, so they survive a
kill: the batch of a step is the step plus the batches skipped before it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.core.errors import NumericError

Guard = dict[str, jax.Array]
POLICIES = ("halt", "skip", "rollback")
_SLOWEST = (
    0.02  # the running mean forgets a step's loss at this rate, or faster while it has seen few
)
_LEAST_SEEN = 20


def new_guard() -> Guard:
    """Return the guard before the first step."""
    counts = ("evals_since_best", "evaluated_step", "skipped", "bad_in_row", "seen")
    zeros = {name: jnp.zeros((), jnp.int32) for name in counts}
    sums = {"best_loss": jnp.inf, "loss_mean": 0.0, "loss_variance": 0.0}
    return zeros | {name: jnp.asarray(value, jnp.float32) for name, value in sums.items()}


def judge(
    guard: Guard,
    loss: jax.Array,
    grad_norm: jax.Array,
    empty: jax.Array | bool,
    sigmas: float,
    forgive: bool,
) -> tuple[jax.Array, Guard]:
    """Return whether a step is bad, and the guard after it.

    Args: guard: The guard before the step. loss: The loss of the step, in nats per target token.
        grad_norm: The norm of its gradient. empty: Whether the step has no target token. It is
        neither good nor bad, and the guard stays as it is. sigmas: How many standard deviations
        above its mean a loss is a spike; 0: none is. forgive: Whether a good step ends a row of bad
        ones.
    """
    bad = ~jnp.isfinite(loss + grad_norm) & ~jnp.asarray(empty)
    after = {} if not forgive else {"bad_in_row": jnp.zeros_like(guard["seen"])}
    if sigmas:
        mean, variance, seen = guard["loss_mean"], guard["loss_variance"], guard["seen"]
        bad |= (
            (seen >= _LEAST_SEEN)
            & (loss > mean + sigmas * jnp.sqrt(variance))
            & ~jnp.asarray(empty)
        )
        rate = jnp.maximum(1 / (seen + 1), _SLOWEST)
        after["loss_mean"] = mean + rate * (loss - mean)
        after["loss_variance"] = (1 - rate) * (variance + rate * (loss - mean) ** 2)
        after["seen"] = seen + 1
    spoiled = {"skipped": guard["skipped"] + 1, "bad_in_row": guard["bad_in_row"] + 1}
    new = {}
    for name, old in guard.items():
        unless_bad = jnp.where(empty, old, after.get(name, old))
        new[name] = jnp.where(bad, spoiled.get(name, old), unless_bad)
    return bad, new


def on_host(guard: Guard) -> dict[str, Any]:
    """Return the guard as plain numbers."""
    return {name: value.item() for name, value in jax.device_get(guard).items()}


def with_values(guard: Guard, values: dict[str, Any]) -> Guard:
    """Return the guard with these plain numbers in it."""
    new = {name: np.asarray(value, guard[name].dtype) for name, value in values.items()}
    return guard | {
        name: jax.device_put(value, guard[name].sharding) for name, value in new.items()
    }


def verdict(policy: str, limit: int, in_row: int, bad: dict[str, Any]) -> str:
    """Return the line about a bad step; raise it as NumericError where the run must not go on."""
    line = (
        f"step {bad['step'] + 1} is bad: batch {bad['batch']} has loss {bad['loss']:.4g} "
        "and gradient norm "
        f"{bad['grad_norm']:.4g}; parameters are untouched"
    )
    if policy == "halt":
        raise NumericError(
            f"{line}. Set train.on_bad_step to skip or rollback, or lower optimizer.learning_rate."
        )
    if in_row >= limit:
        raise NumericError(
            f"{line}. It is the {in_row}th in a row (train.max_bad_steps); lower the learning rate."
        )
    return line
