"""The train step: gradients summed over micro-batches, one update, and as many steps in a call as
the loop asks for.

A batch is a dict of arrays [A, B/A, T]: A micro-batches whose rows are split over the mesh, so that
accumulation needs no resharding. One call takes K batches stacked in front and makes the first
`count` steps of them; `count` is traced, so the loop can stop at any step without another
compilation, and the bits don't depend on how steps are grouped.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from tinylm.core.mesh import in_each_replica, sum_over_rows
from tinylm.model.losses import next_token_loss
from tinylm.train.bad_steps import judge
from tinylm.train.config import TrainConfig
from tinylm.train.state import Blueprint, TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_steps(
    blueprint: Blueprint, schedule: optax.Schedule, guarded: TrainConfig | None = None
) -> Callable:
    """Return jitted `(state, batches [K, A, B/A, T], count, seed) -> (state, metrics [K])`; the
    state is donated.

    Metrics are `loss` (nats per target token; NaN where there is none), `grad_norm` (before
    clipping), `learning_rate`, for each part of the model `update_ratio/PART`, the norm of the
    update over that of the weights, and `bad`: 1 where the guard left the state as it was, by the
    settings `guarded` (default: where the loss isn't finite). A step whose batch has no target
    token learns nothing: it leaves parameters and moments as they are, and is counted.
    """
    sigmas, forgive = (
        (guarded.spike_sigmas, guarded.on_bad_step != "rollback") if guarded else (0.0, True)
    )
    ratios = [
        f"update_ratio/{part}" for part in dict.fromkeys(part_of(path) for path in blueprint.axes)
    ]
    names = ("loss", "grad_norm", "learning_rate", *ratios, "bad")

    def one_step(state: TrainState, batch: Batch, seed) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, nats, count = accumulate(blueprint, state.params, batch, step_key)
        # A batch without a target token, such as one of prompts alone, has a loss and a gradient of
        # 0 here.
        empty = count == 0
        grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1.0), grads)
        update = in_each_replica(
            blueprint.optimizer.update
        )  # the partitioner would spread Muon's products over slices
        updates, opt_state = update(grads, state.opt_state, state.params)
        loss, grad_norm = nats / jnp.maximum(count, 1.0), optax.tree.norm(grads)
        bad, guard = judge(state.guard, loss, grad_norm, empty, sigmas, forgive)
        learned = optax.apply_updates(state.params, updates)
        params = _kept_where(bad | empty, state.params, learned)
        opt_state = _after_update(state.opt_state, opt_state, bad, empty)
        metrics = {
            "loss": jnp.where(empty, jnp.nan, loss),
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            **{
                f"update_ratio/{part}": ratio
                for part, ratio in _update_ratios(updates, state.params, empty).items()
            },
            "bad": bad.astype(jnp.float32),
        }
        return TrainState(state.step + 1 - bad, params, opt_state, guard), metrics

    def train_steps(state: TrainState, batches: Batch, count, seed):
        most = batches["tokens"].shape[0]
        metrics = {name: jnp.zeros(most, jnp.float32) for name in names}
        # Of a single batch XLA drops the index, fuses in another way, and adds up the loss in
        # another order.
        if most == 1:
            batches = jax.tree.map(lambda x: jnp.concatenate([x, x]), batches)

        def body(i, carry):
            state, metrics = carry
            batch = jax.tree.map(lambda x: x[i], batches)
            state, new = one_step(state, batch, seed)
            return state, {name: metrics[name].at[i].set(new[name]) for name in names}

        return jax.lax.fori_loop(0, count, body, (state, metrics))

    everywhere = blueprint.shardings.step
    return jax.jit(train_steps, donate_argnums=0, out_shardings=(blueprint.shardings, everywhere))


def _kept_where(kept: jax.Array, old: Any, new: Any) -> Any:
    """Return the old leaves of a tree where `kept` is true, else the new ones."""
    return jax.tree.map(lambda old, new: jnp.where(kept, old, new), old, new)


def _after_update(old: Any, new: Any, bad: jax.Array, empty: jax.Array) -> Any:
    """Return the optimizer's state after a step: as it was where the step is bad or empty.

    An empty step is a step of the schedule, so the schedule's own counts go on.
    """

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def after(old: Any, new: Any) -> Any:
        return _kept_where(bad if is_schedule(old) else bad | empty, old, new)

    return jax.tree.map(after, old, new, is_leaf=is_schedule)


def part_of(path: str) -> str:
    """Return the part of the model that the parameter at `path` belongs to: embedding, attention,
    mlp, a norm, ...
    """
    return path.removeprefix("blocks/").split("/")[0]


def _update_ratios(updates: dict, params: dict, empty: jax.Array) -> dict[str, jax.Array]:
    """Return the norm of the update over that of the weights for each part; 0 where no update was
    made.
    """
    weights = _norms(params)
    return {
        part: jnp.where(empty, 0.0, norm / weights[part]) for part, norm in _norms(updates).items()
    }


def _norms(params: dict) -> dict[str, jax.Array]:
    """Return the Euclidean norm of each part."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        squares[part_of(path)] = squares.get(part_of(path), jnp.zeros(())) + jnp.sum(
            jnp.square(leaf)
        )
    return {part: jnp.sqrt(total) for part, total in squares.items()}


def accumulate(blueprint: Blueprint, params: dict, batch: Batch, step_key: jax.Array):
    """Return (gradient of the summed loss, summed loss in nats, target tokens) over the
    micro-batches of `batch`.
    """

    def loss_sums(params, key, micro, rows_B):
        model = nnx.merge(blueprint.graph, params)
        keys_B = (
            jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)
            if blueprint.model.dropout
            else None
        )
        nats, count, squares = next_token_loss(model, micro, keys_B)
        z_loss = blueprint.model.z_loss
        return (nats + z_loss * squares if z_loss else nats), (nats, count)

    def sums(params, key, batch, rows):
        def one(xs):
            (_, sums), grads = jax.value_and_grad(loss_sums, has_aux=True)(params, key, *xs)
            return grads, *sums

        if len(rows) == 1:
            return one(jax.tree.map(lambda x: x[0], (batch, rows)))
        zeros = (jax.tree.map(jnp.zeros_like, params), jnp.zeros(()), jnp.zeros(()))
        return jax.lax.scan(
            lambda total, xs: (jax.tree.map(jnp.add, total, one(xs)), None), zeros, (batch, rows)
        )[0]

    shape = batch["tokens"].shape[:2]
    rows = jnp.arange(math.prod(shape)).reshape(
        shape
    )  # so that a row's dropout doesn't depend on where it is
    return sum_over_rows(sums, (params, step_key), (batch, rows), blueprint.fsdp)
