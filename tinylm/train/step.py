"""The train step: gradients summed over micro-batches, one update, and as many steps in a call as
the loop asks for.

A batch is a dict of arrays [A, B/A, T]: A micro-batches whose rows are split over the mesh, so that
accumulation needs no resharding. One call takes K batches stacked in front and makes the first
`count` steps of them; `count` is traced, so the loop can stop at any step without another
compilation, and the bits don't depend on how steps are grouped.

Axes: K steps of a call, A micro-batches, B rows, T tokens.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from tinylm.core.batch import abstract_batch
from tinylm.core.collectives import in_each_replica, sum_over_rows
from tinylm.core.mesh import replicated
from tinylm.core.tpu_options import tpu_compiler_options
from tinylm.model.experts import LOAD_METRICS, even_out, load_metrics, router_loss
from tinylm.model.losses import next_token_loss
from tinylm.train.bad_steps import judge
from tinylm.train.local_steps import METRICS, check_rows, make_local_step
from tinylm.train.state import Blueprint, TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_steps(blueprint: Blueprint) -> Callable:
    """Return the jitted program of a dispatch; it takes over (donates) the state.

    The program is

        (state, batches [K, A, B/A, T], count, seed, last_step) -> (state, metrics [K])

    The last step is an argument, so that a run which goes on to a later `train.stop_step` needs no
    new program. Of the metrics the first `count` numbers mean something. They are

    - `loss`, nats per target token; NaN where a batch has none. Such a step learns nothing: it
      leaves parameters and moments as they are, and is counted.
    - `grad_norm`, before clipping
    - `learning_rate`
    - `update_ratio/PART` for each part of the model: the norm of the update over that of the
      weights; 0 where no update was made, and in steps that are not written to metrics.jsonl
    - `bad`, 1 where the guard left the state as it was
    - `router/...` where the model has experts: see `experts.load_metrics`

    Where workers train by themselves (`local_steps`) there are more. Then they are 0 in steps that
    are not written to metrics.jsonl and have no sync.
    """
    train = blueprint.config.train
    good_steps_forgive = train.on_bad_step != "rollback"
    parts = dict.fromkeys(part_of(path) for path in blueprint.axes)
    ratio_names = [f"update_ratio/{part}" for part in parts]
    names = ["loss", "grad_norm", "learning_rate", *ratio_names, "bad"]
    model = blueprint.config.model
    if model.num_experts:
        names += LOAD_METRICS

    def train_step(
        state: TrainState,
        batch: Batch,
        rows: jax.Array,
        seed: jax.Array,
        last_step: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        step_key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, nats, count, load_LX = accumulate(blueprint, state.params, batch, rows, step_key)
        # A batch without a target token, such as one of prompts alone, has a loss and a gradient of
        # 0 here.
        is_empty = count == 0
        num_targets = jnp.maximum(count, 1.0)
        loss = nats / num_targets
        grads = jax.tree.map(lambda g: g / num_targets, grads)
        # Computed in each replica: the partitioner would spread Muon's products over slices.
        update = in_each_replica(blueprint.optimizer.update)
        updates, opt_state = update(grads, state.opt_state, state.params)

        grad_norm = optax.tree.norm(grads)
        is_bad, guard = judge(
            state.guard,
            loss,
            grad_norm,
            is_empty,
            sigmas=train.spike_sigmas,
            forgive=good_steps_forgive,
        )
        params = optax.apply_updates(state.params, updates)
        if load_LX is not None:
            params = even_out(params, load_LX, model)
        new_state = TrainState(
            step=state.step + 1 - is_bad,
            params=_kept_where(is_bad | is_empty, state.params, params),
            opt_state=_after_update(state.opt_state, opt_state, is_bad, is_empty),
            guard=guard,
        )
        metrics = {
            "loss": jnp.where(is_empty, jnp.nan, loss),
            "grad_norm": grad_norm,
            "learning_rate": jnp.asarray(blueprint.schedule(state.step), jnp.float32),
            "bad": is_bad.astype(jnp.float32),
            "num_targets": count,
        }
        if load_LX is not None:
            metrics |= load_metrics(load_LX)
        # The norms read all parameters and updates, which is 4% of a small model's step on CPU. So
        # they are computed only for the steps that the loop writes down: those that are due, the
        # last one, and bad ones.
        is_due = new_state.step % max(train.log_every_steps, 1) == 0
        is_last = new_state.step == last_step
        ratios = jax.lax.cond(
            (is_bad | is_due | is_last) & ~is_empty,
            _update_ratios,
            lambda updates, params: dict.fromkeys(ratio_names, jnp.zeros(())),
            updates,
            state.params,
        )
        return new_state, metrics | ratios

    step = train_step
    if blueprint.num_workers:
        check_rows(blueprint.config, blueprint.mesh)
        step = make_local_step(blueprint.config, blueprint.axes, train_step)
        names += METRICS

    def train_steps(
        state: TrainState,
        batches: Batch,
        count: jax.Array,
        seed: jax.Array,
        last_step: jax.Array,
    ) -> tuple[TrainState, Metrics]:
        most_steps = batches["tokens"].shape[0]
        metrics = {name: jnp.zeros(most_steps, jnp.float32) for name in names}
        # Of a single batch XLA drops the index, fuses in another way, and adds up the loss in
        # another order.
        if most_steps == 1:
            batches = jax.tree.map(lambda x: jnp.concatenate([x, x]), batches)

        def one_more(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = carry
            batch = jax.tree.map(lambda x: x[i], batches)
            state, of_step = step(state, batch, number_rows(batch), seed, last_step)
            metrics = {name: metrics[name].at[i].set(of_step[name]) for name in names}
            return state, metrics

        return jax.lax.fori_loop(0, count, one_more, (state, metrics))

    return jax.jit(
        train_steps,
        donate_argnums=0,
        out_shardings=(blueprint.shardings, replicated(blueprint.mesh)),
        compiler_options=tpu_compiler_options(blueprint.mesh),
    )


def compile_ahead(blueprint: Blueprint) -> Future[jax.stages.Compiled]:
    """Begin to compile the program of a run's dispatches on a thread, and return it as a future.

    Shapes and shardings are known before the first array exists, and XLA lets go of Python's lock
    while it compiles. So meanwhile the state is drawn or restored, and the first batches are read:

        this thread    draw or restore the state | import Grain, read batches | wait
        the other      trace | compile ------------------------------------------->

    What compiling raises is raised by the future's `result`.
    """
    config = blueprint.config
    train_steps: Any = make_train_steps(blueprint)
    shape = (
        config.dispatch_steps,
        config.train.accumulation_steps,
        config.micro_batch_rows,
        config.data.seq_len,
    )
    batches = abstract_batch(blueprint.mesh, shape, packed=config.data.packing == "packed")

    def compile_program() -> jax.stages.Compiled:
        # What `jax.set_mesh` sets holds for one thread alone.
        with jax.set_mesh(blueprint.mesh):
            lowered = train_steps.lower(
                blueprint.abstract, batches, 1, config.seed, config.train.last_step
            )
            return lowered.compile()

    executor = ThreadPoolExecutor(max_workers=1)
    compiling = executor.submit(compile_program)
    # Python waits for the thread before it ends.
    executor.shutdown(wait=False)
    return compiling


def number_rows(batch: Batch) -> jax.Array:
    """Return the number of each row in the whole batch [A, B/A], so that its dropout doesn't depend
    on where it is.
    """
    shape = batch["tokens"].shape[:2]
    return jnp.arange(math.prod(shape)).reshape(shape)


def accumulate(
    blueprint: Blueprint, params: dict, batch: Batch, rows: jax.Array, step_key: jax.Array
) -> tuple[dict, jax.Array, jax.Array, jax.Array | None]:
    """Add up gradients and losses over the micro-batches of a batch.

    Args:
      blueprint: of the run.
      params: of the model.
      batch: arrays [A, B/A, T].
      rows: the number of each row, for dropout.
      step_key: the random key of the step, for dropout.

    Returns:
      The gradient of the summed loss, the summed loss in nats, the number of target tokens, and
      where the model has experts how often each was chosen, [layers, experts].
    """
    model_config = blueprint.config.model
    has_experts = model_config.num_experts > 0

    def loss_sums(
        params: dict, key: jax.Array, micro_batch: Batch, rows_B: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
        model = nnx.merge(blueprint.graph, params)
        row_keys_B = None
        if model_config.dropout:
            row_keys_B = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)
        sums = next_token_loss(model, micro_batch, row_keys_B, with_routers=has_experts)
        trained = sums.nats
        if model_config.z_loss:
            trained = trained + model_config.z_loss * sums.squared_log_z
        load_LX = None
        if sums.routers is not None:
            load_LX = sums.routers.load_LX
            trained = trained + router_loss(sums.routers, model_config)
        return trained, (sums.nats, sums.num_targets, load_LX)

    gradient_of = jax.value_and_grad(loss_sums, has_aux=True)

    def sum_up(
        params: dict, key: jax.Array, micro_batches: Batch, rows: jax.Array
    ) -> tuple[dict, jax.Array, jax.Array, jax.Array | None]:
        def of_one(micro_batch_and_rows: tuple) -> tuple:
            micro_batch, rows_B = micro_batch_and_rows
            (_, sums), grads = gradient_of(params, key, micro_batch, rows_B)
            return grads, *sums

        if len(rows) == 1:
            only = jax.tree.map(lambda x: x[0], (micro_batches, rows))
            return of_one(only)

        def add(total: tuple, micro_batch_and_rows: tuple) -> tuple[tuple, None]:
            sums = of_one(micro_batch_and_rows)
            return jax.tree.map(jnp.add, total, sums), None

        no_grads = jax.tree.map(jnp.zeros_like, params)
        no_load_LX = None
        if has_experts:
            no_load_LX = jnp.zeros((model_config.num_expert_layers, model_config.num_experts))
        zeros = (no_grads, jnp.zeros(()), jnp.zeros(()), no_load_LX)
        total, _ = jax.lax.scan(add, zeros, (micro_batches, rows))
        return total

    return sum_over_rows(sum_up, (params, step_key), (batch, rows), blueprint.config.mesh.fsdp)


def part_of(path: str) -> str:
    """Return the part of the model that a parameter belongs to: embedding, attention, mlp, ..."""
    return path.removeprefix("dense_").removeprefix("blocks/").split("/")[0]


def _kept_where(is_kept: jax.Array, old: Any, new: Any) -> Any:
    """Return the old leaves of a tree where `is_kept`, or else the new ones."""
    return jax.tree.map(lambda old, new: jnp.where(is_kept, old, new), old, new)


def _after_update(old: Any, new: Any, is_bad: jax.Array, is_empty: jax.Array) -> Any:
    """Return the optimizer's state after a step: as it was where the step is bad or empty.

    An empty step is a step of the schedule, so the schedule's own counts go on.
    """

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    def after(old: Any, new: Any) -> Any:
        is_kept = is_bad if is_schedule(old) else is_bad | is_empty
        return _kept_where(is_kept, old, new)

    return jax.tree.map(after, old, new, is_leaf=is_schedule)


def _update_ratios(updates: dict, params: dict) -> Metrics:
    """Return the norm of the update over that of the weights for each part of the model."""
    update_norms = _norms(updates)
    weight_norms = _norms(params)
    return {
        f"update_ratio/{part}": norm / weight_norms[part] for part, norm in update_norms.items()
    }


def _norms(params: dict) -> dict[str, jax.Array]:
    """Return the Euclidean norm of each part of the model."""
    squares: dict[str, jax.Array] = {}
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        so_far = squares.get(part_of(path), jnp.zeros(()))
        squares[part_of(path)] = so_far + jnp.sum(jnp.square(leaf))
    return {part: jnp.sqrt(total) for part, total in squares.items()}
