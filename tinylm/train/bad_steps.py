"""What keeps one bad batch from spoiling a run, and what a run remembers of its evaluations.

A step is bad where the loss or the gradient's norm is not finite, or (with `train.spike_sigmas`)
where the loss lies that many standard deviations above its running mean. The step program itself
leaves parameters and moments untouched by a bad step, and takes the next batch in its place. The
host, which learns of it one dispatch later, does what `train.on_bad_step` says:

    halt        the run ends, with exit code 3
    skip        the run goes on; too many bad steps in a row end it
    rollback    the run goes on from the last checkpoint, past the bad batch

All counts are in the state, so they survive a kill: the batch of a step is the step plus the
batches that were skipped before it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.core.errors import NumericError

POLICIES = ("halt", "skip", "rollback")

# The running mean forgets a step's loss at this rate, or faster while it has seen few.
_SLOWEST = 0.02
# Steps that the running mean must have seen before a loss can be a spike.
_LEAST_SEEN = 20


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """Counts and losses that a run must not forget. On the host the same fields hold numbers."""

    # Bad steps: batches passed over, and how many of them in a row up to now.
    skipped: Any
    bad_in_row: Any
    # The running statistics of the loss: steps seen, mean and variance.
    seen: Any
    loss_mean: Any
    loss_variance: Any
    # Evaluations: the step of the last one, the best loss, how many came after that.
    evaluated_step: Any
    best_loss: Any
    evals_since_best: Any

    def on_host(self) -> "Guard":
        """Return the guard with Python's numbers, waiting for the device."""
        return jax.tree.map(lambda value: value.item(), jax.device_get(self))

    def on_device_with(self, **values: float) -> "Guard":
        """Return the guard, on the device, with these numbers in it."""
        arrays = {}
        for name, value in values.items():
            old = getattr(self, name)
            arrays[name] = jax.device_put(np.asarray(value, old.dtype), old.sharding)
        return dataclasses.replace(self, **arrays)


def new_guard() -> Guard:
    """Return the guard before the first step."""

    def count() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    def number(value: float) -> jax.Array:
        return jnp.asarray(value, jnp.float32)

    return Guard(
        skipped=count(),
        bad_in_row=count(),
        seen=count(),
        loss_mean=number(0.0),
        loss_variance=number(0.0),
        evaluated_step=count(),
        best_loss=number(jnp.inf),
        evals_since_best=count(),
    )


def judge(
    guard: Guard,
    loss: jax.Array,
    grad_norm: jax.Array,
    empty: jax.Array | bool,
    *,
    sigmas: float,
    forgive: bool,
) -> tuple[jax.Array, Guard]:
    """Return whether a step is bad, and the guard after it; part of the step program.

    Args:
      guard: before the step.
      loss: of the step, in nats per target token.
      grad_norm: the norm of its gradient.
      empty: whether the step has no target token. It is neither good nor bad, and the guard stays
        as it is.
      sigmas: how many standard deviations above its mean a loss is a spike; 0: none is.
      forgive: whether a good step ends a row of bad ones.
    """
    empty = jnp.asarray(empty)
    bad = ~jnp.isfinite(loss + grad_norm) & ~empty
    if sigmas:
        spike = guard.loss_mean + sigmas * jnp.sqrt(guard.loss_variance)
        bad |= (guard.seen >= _LEAST_SEEN) & (loss > spike) & ~empty

    after_bad = dataclasses.replace(
        guard, skipped=guard.skipped + 1, bad_in_row=guard.bad_in_row + 1
    )
    after_good = guard
    if forgive:
        after_good = dataclasses.replace(after_good, bad_in_row=jnp.zeros_like(guard.bad_in_row))
    if sigmas:
        # Welford's update with a floor under the rate, so that old losses are forgotten.
        rate = jnp.maximum(1 / (guard.seen + 1), _SLOWEST)
        distance = loss - guard.loss_mean
        after_good = dataclasses.replace(
            after_good,
            seen=guard.seen + 1,
            loss_mean=guard.loss_mean + rate * distance,
            loss_variance=(1 - rate) * (guard.loss_variance + rate * distance**2),
        )

    def choose(before: jax.Array, good: jax.Array, spoiled: jax.Array) -> jax.Array:
        return jnp.where(bad, spoiled, jnp.where(empty, before, good))

    return bad, jax.tree.map(choose, guard, after_good, after_bad)


def verdict(policy: str, limit: int, in_row: int, bad: dict[str, Any]) -> str:
    """Return the line about a bad step; raise it as NumericError where the run must not go on.

    Args:
      policy: train.on_bad_step.
      limit: train.max_bad_steps.
      in_row: how many steps in a row are bad, with this one.
      bad: `step` (steps taken before it), `batch`, `loss` and `grad_norm`.
    """
    line = (
        f"step {bad['step'] + 1} is bad: batch {bad['batch']} has loss {bad['loss']:.4g} and "
        f"gradient norm {bad['grad_norm']:.4g}; parameters are untouched"
    )
    return _judged(line, policy, limit, in_row, "skip or rollback")


def verdict_on_workers(policy: str, limit: int, in_row: int, step: int, count: int) -> str:
    """Return the line about bad steps of workers that train by themselves; raise it as NumericError
    where the run must not go on.

    Args:
      policy: train.on_bad_step.
      limit: train.max_bad_steps.
      in_row: the most steps in a row that are bad for one worker.
      step: up to which they were counted.
      count: how many there are since they were last counted, over all workers.
    """
    line = (
        f"workers have passed over {count} bad steps up to step {step}: their loss or gradient is "
        "not finite, or the loss is a spike; parameters are untouched by them"
    )
    return _judged(line, policy, limit, in_row, "skip")


def _judged(line: str, policy: str, limit: int, in_row: int, others: str) -> str:
    """Return a line about a bad step, or raise it, as `verdict` says.

    `others` are the policies that may be set in place of halt.
    """
    if policy == "halt":
        raise NumericError(
            f"{line}. Set train.on_bad_step to {others}, or lower optimizer.learning_rate."
        )
    if in_row >= limit:
        raise NumericError(
            f"{line}. It is the {in_row}th in a row (train.max_bad_steps); lower the learning rate."
        )
    return line
