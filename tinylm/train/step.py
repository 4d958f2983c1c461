"""The train step: gradients summed over micro-batches, one update, and as many steps in a call as the loop asks for.

A batch is a dict of arrays [A, B/A, T]: A micro-batches whose rows are split over the mesh, so that accumulation needs
no resharding. One call takes K batches stacked in front and makes the first `count` steps of them; `count` is traced,
so the loop can stop at any step without another compilation, and the bits don't depend on how steps are grouped.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from tinylm.core.mesh import in_each_replica, sum_over_rows
from tinylm.model.losses import next_token_loss
from tinylm.train.config import TrainConfig
from tinylm.train.guard import judge
from tinylm.train.state import Blueprint, TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_steps(blueprint: Blueprint, schedule: optax.Schedule, guarded: TrainConfig | None = None) -> Callable:
    """Return jitted `(state, batches [K, A, B/A, T], count, seed) -> (state, metrics [K])`; the state is donated.

    Metrics are `loss` (nats per target token), `grad_norm` (before clipping), `learning_rate`, for each part of the
    model `update_ratio/PART`, the norm of the update over that of the weights, and `bad`: 1 where the guard left the
    state as it was, by the settings `guarded` (default: where the loss isn't finite).
    """
    sigmas, forgive = (guarded.spike_sigmas, guarded.on_bad_step != "rollback") if guarded else (0.0, True)
    ratios = [f"update_ratio/{part}" for part in dict.fromkeys(part_of(path) for path in blueprint.axes)]
    names = ("loss", "grad_norm", "learning_rate", *ratios, "bad")

    def one_step(state: TrainState, batch: Batch, seed) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, nats, count = accumulate(blueprint, state.params, batch, step_key)
        grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1.0), grads)
        update = in_each_replica(blueprint.optimizer.update)  # the partitioner would spread Muon's products over slices
        updates, opt_state = update(grads, state.opt_state, state.params)
        loss, grad_norm = nats / count, optax.tree.norm(grads)
        bad, guard = judge(state.guard, loss, grad_norm, sigmas, forgive)
        learned = (optax.apply_updates(state.params, updates), opt_state)
        old = (state.params, state.opt_state)
        params, opt_state = jax.tree.map(lambda old, new: jnp.where(bad, old, new), old, learned)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            **{f"update_ratio/{part}": norm / _norms(state.params)[part] for part, norm in _norms(updates).items()},
            "bad": bad.astype(jnp.float32),
        }
        return TrainState(state.step + 1 - bad, params, opt_state, guard), metrics

    def train_steps(state: TrainState, batches: Batch, count, seed):
        most = batches["tokens"].shape[0]
        metrics = {name: jnp.zeros(most, jnp.float32) for name in names}
        if most == 1:  # of a single batch XLA drops the index, fuses otherwise, and adds up the loss in another order
            batches = jax.tree.map(lambda x: jnp.concatenate([x, x]), batches)

        def body(i, carry):
            state, metrics = carry
            batch = jax.tree.map(lambda x: x[i], batches)
            state, new = one_step(state, batch, seed)
            return state, {name: metrics[name].at[i].set(new[name]) for name in names}

        return jax.lax.fori_loop(0, count, body, (state, metrics))

    everywhere = blueprint.shardings.step
    return jax.jit(train_steps, donate_argnums=0, out_shardings=(blueprint.shardings, everywhere))


def part_of(path: str) -> str:
    """Return the part of the model that the parameter at `path` belongs to: embedding, attention, mlp, a norm, ..."""
    return path.removeprefix("blocks/").split("/")[0]


def _norms(params: dict) -> dict[str, jax.Array]:
    """Return the Euclidean norm of each part."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        squares[part_of(path)] = squares.get(part_of(path), jnp.zeros(())) + jnp.sum(jnp.square(leaf))
    return {part: jnp.sqrt(total) for part, total in squares.items()}


def accumulate(blueprint: Blueprint, params: dict, batch: Batch, step_key: jax.Array):
    """Return (gradient of the summed loss, summed loss in nats, target tokens) over the micro-batches of `batch`."""

    def loss_sums(params, key, micro, rows_B):
        model = nnx.merge(blueprint.graph, params)
        keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B) if blueprint.model.dropout else None
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
        return jax.lax.scan(lambda total, xs: (jax.tree.map(jnp.add, total, one(xs)), None), zeros, (batch, rows))[0]

    shape = batch["tokens"].shape[:2]
    rows = jnp.arange(math.prod(shape)).reshape(shape)  # so that a row's dropout doesn't depend on where it is
    return sum_over_rows(sums, (params, step_key), (batch, rows), blueprint.fsdp)
