"""Local steps: workers that train by themselves and meet once in many steps, for slow links.

DiLoCo (Douillard et al. 2023, algorithm 1). Each of W workers has a state of its own, and makes
`train.sync_every_steps` steps on its own rows of each batch. Then a sync takes the mean of how far
they came as a gradient, and an outer optimizer, SGD with Nesterov momentum, takes a step with it
from the outer parameters, at which all workers begin again:

    worker 0   outer -> step -> step -> ... -> step
    worker 1   outer -> step -> step -> ... -> step -> outer -> step -> step -> ...
    worker 2   outer -> step -> step -> ... -> step
               <------ train.sync_every_steps ------>

Only a sync crosses between replicas, with what one step of plain data parallelism sends, and the
few numbers that are logged. The outer parameters are those of the run: they are evaluated, read by
tools and exported.

How many workers there are belongs to the training, not to the mesh: `mesh.replica` divides their
number, and each replica trains its own, one after the other. So a run of 4 workers can be tried on
one device, and has the same losses on 4 replicas. Worker w has those rows of each micro-batch that
replica w of W would have. It costs memory: outer parameters and outer momentum, besides what the
workers of a replica need.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tinylm.core.collectives import (
    BY_ROWS,
    BY_WORKERS,
    EVERYWHERE,
    in_each_replica,
    sum_over_replicas,
    sum_parameters_over_replicas,
)
from tinylm.core.errors import UserError
from tinylm.core.mesh import Axes, mesh_sizes
from tinylm.core.placement import place_parameters
from tinylm.model.experts import bias_of_experts, with_bias_of_experts
from tinylm.train.config import Config, TrainConfig

# A TrainState of the run, or of one worker. `state` puts a LocalState into the former, so it can't
# be imported here.
S = TypeVar("S", bound=Any)
Metrics = dict[str, jax.Array]

# What a step tells besides the metrics of any step, about the last sync: how far the workers were
# from the outer parameters (the root of their mean square distance), and how far their mean was.
# About all steps: how many were passed over by a worker, and how many in a row are by one.
METRICS = ("drift", "outer_grad_norm", "passed_over", "passed_over_in_row")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class LocalState:
    """What a run of workers keeps where others keep the state of their optimizer."""

    # A TrainState of each, stacked: all arrays have the workers along their first axis.
    workers: Any
    outer_state: Any  # of the outer optimizer
    drift: jax.Array
    outer_grad_norm: jax.Array
    # How many of the steps that workers have passed over the host was told of. It is kept so that a
    # run that was killed before it heard of one hears of it when it goes on.
    told_passed_over: jax.Array


def count_workers(config: Config, mesh: Mesh) -> int:
    """Return how many workers train by themselves, 0 where all devices train as one.

    Raises UserError where the mesh doesn't suit them.
    """
    train = config.train
    if not train.has_workers:
        return 0
    sizes = mesh_sizes(mesh)
    num_workers = train.workers or sizes.replica
    if num_workers % sizes.replica:
        raise UserError(
            f"train.workers={num_workers} must be divisible by mesh.replica={sizes.replica}; "
            "change one of them."
        )
    return num_workers


def workers_of_replica(config: Config, mesh: Mesh) -> int:
    """Return how many workers a replica trains; 1 where all devices train as one."""
    return max(1, count_workers(config, mesh) // mesh_sizes(mesh).replica)


def check_rows(config: Config, mesh: Mesh) -> None:
    """Raise UserError where the rows of a micro-batch can't be dealt out to the workers evenly."""
    num_workers = count_workers(config, mesh)
    if not num_workers:
        return
    sizes = mesh_sizes(mesh)
    if config.micro_batch_rows % (num_workers * sizes.data):
        raise UserError(
            f"data.batch_size={config.data.batch_size} must be divisible by the number of workers "
            f"({num_workers}) times the data axis ({sizes.data}) times train.accumulation_steps "
            f"({config.train.accumulation_steps}); set data.batch_size or train.workers."
        )


def _outer_optimizer(train: TrainConfig) -> optax.GradientTransformation:
    return optax.sgd(train.outer_learning_rate, train.outer_momentum, nesterov=True)


def fix_workers(config: Config, mesh: Mesh, record: Config | None) -> Config:
    """Return a config in which the number of workers is a number, and checked.

    Args:
      config: of the run, not resolved yet.
      mesh: where it will train.
      record: what the run was last started with; None for a new run. Without `train.workers` a run
        keeps the workers that it has.

    Raises UserError where the run has workers and the config has none, or the other way round.
    """
    fixed = config.editable_copy()
    if record is not None:
        if config.train.workers == 0:
            fixed.train.workers = record.train.workers
        if fixed.train.has_workers != record.train.has_workers:
            raise UserError(
                f"train.workers={config.train.workers} doesn't suit this run, whose devices train "
                "as one; start another run (--workdir) with train.init_from, or leave it out."
            )
    fixed.train.workers = count_workers(fixed, mesh)
    check_rows(fixed, mesh)
    return fixed


def new_local_state(alone: S, num_workers: int, train: TrainConfig) -> LocalState:
    """Return the state of workers that all begin where a run of one would."""
    return LocalState(
        workers=_copies(alone, num_workers),
        outer_state=_outer_optimizer(train).init(alone.params),
        drift=jnp.zeros(()),
        outer_grad_norm=jnp.zeros(()),
        told_passed_over=jnp.zeros((), jnp.int32),
    )


def place_local_state(
    shapes: LocalState, axes: Mapping[str, Axes], mesh: Mesh, fsdp: bool
) -> LocalState:
    """Give each array of an abstract state its place on the mesh."""
    placed = place_parameters(shapes, axes, mesh, fsdp)
    workers = place_parameters(shapes.workers, axes, mesh, fsdp, stacked=("workers",))
    return dataclasses.replace(placed, workers=workers)


def deal_out(local: LocalState, num_workers: int) -> LocalState:
    """Return the state of another number of workers, which learned the same in all.

    Each of the new workers begins at the mean of the old ones: of their parameters, so that the
    next sync finds the mean difference that it would have found; and of their moments, which are
    means over steps themselves. Of whole numbers (counts of steps) it takes the largest. At a sync
    all parameters are the same, and nothing is lost. Between syncs the drift between workers is.
    """

    def mean(x: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.floating):
            # The sum of three equal numbers may be rounded, and so their mean.
            return jnp.where(jnp.all(x == x[0], axis=0), x[0], jnp.mean(x, axis=0))
        return jnp.max(x, axis=0)

    workers = _copies(jax.tree.map(mean, local.workers), num_workers)
    untold = jnp.sum(local.workers.guard.skipped) - local.told_passed_over
    told_passed_over = jnp.sum(workers.guard.skipped) - untold
    return dataclasses.replace(local, workers=workers, told_passed_over=told_passed_over)


def saved_workers(shapes: dict[str, Any]) -> int:
    """Return the number of workers in what a checkpoint holds besides parameters."""
    return shapes["opt_state"]["workers"]["step"][0]


def count_told_passed_over(opt_state: Any) -> int:
    """Return how many of the steps that workers have passed over were told; 0 without workers."""
    return int(opt_state.told_passed_over) if isinstance(opt_state, LocalState) else 0


def make_local_step(config: Config, axes: Mapping[str, Axes], step_alone: Callable) -> Callable:
    """Return the step of a run of workers, each of which makes the step of a run by itself.

    Args:
      config: of the run.
      axes: the logical axes of each parameter by its path.
      step_alone: (state, batch, rows, seed, last_step) -> (state, metrics), as the result is.
    """
    train = config.train

    def steps_in_replica(
        workers: S, by_rows: tuple, whole: tuple[jax.Array, ...]
    ) -> tuple[S, Metrics]:
        step, seed, last_step = whole

        def step_of_one(worker_and_rows: tuple) -> tuple[S, Metrics]:
            worker, (batch, rows) = worker_and_rows
            # A step that a worker passes over counts as one, since the others have made theirs.
            worker = dataclasses.replace(worker, step=step)
            return step_alone(worker, batch, rows, seed, last_step)

        num_workers = len(workers.step)
        rows_of_each = jax.tree.map(lambda x: _split_rows(x, num_workers), by_rows)
        return _for_each(step_of_one, (workers, rows_of_each))

    def local_step(
        state: S,
        batch: dict[str, jax.Array],
        rows: jax.Array,
        seed: jax.Array,
        last_step: jax.Array,
    ) -> tuple[S, Metrics]:
        steps = in_each_replica(
            steps_in_replica, (BY_WORKERS, BY_ROWS, EVERYWHERE), (BY_WORKERS, BY_WORKERS)
        )
        whole = (state.step, seed, last_step)
        workers, metrics = steps(state.opt_state.workers, (batch, rows), whole)
        step = state.step + 1
        new_state = dataclasses.replace(
            state, step=step, opt_state=dataclasses.replace(state.opt_state, workers=workers)
        )
        is_sync = step % train.sync_every_steps == 0
        new_state = jax.lax.cond(
            is_sync, lambda state: _sync(state, config, axes), lambda state: state, new_state
        )
        # What is told crosses between replicas, so it is only where somebody listens.
        is_due = step % max(train.log_every_steps, 1) == 0
        is_last = step == last_step
        is_told = is_sync | is_due | is_last
        local = new_state.opt_state
        told = jax.lax.cond(is_told, _told, _nothing_told, metrics, local)
        told_passed_over = jnp.where(
            is_told, told["passed_over"].astype(jnp.int32), local.told_passed_over
        )
        local = dataclasses.replace(local, told_passed_over=told_passed_over)
        return dataclasses.replace(new_state, opt_state=local), told

    return local_step


def _sync(state: S, config: Config, axes: Mapping[str, Axes]) -> S:
    """Return a state after a step of the outer optimizer, at which all workers begin again."""
    num_workers = len(state.opt_state.workers.step)

    def sync_in_replica(outer: tuple[dict, Any], of_workers: dict) -> tuple[tuple, dict]:
        params, outer_state = outer
        differences = jax.tree.map(lambda outer, own: outer - own, params, of_workers)
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), differences)
        squares = jnp.square(optax.tree.norm(differences))
        sums = sum_parameters_over_replicas(sums, axes, config.mesh.fsdp)
        squares = sum_over_replicas(squares)
        outer_grad = jax.tree.map(lambda x: x / num_workers, sums)
        updates, outer_state = _outer_optimizer(config.train).update(
            outer_grad, outer_state, params
        )
        mean_bias_LX = bias_of_experts(optax.tree.sub(params, outer_grad), config.model)
        params = optax.apply_updates(params, updates)
        # No gradient trains the biases of experts, so momentum is not for them: they become the
        # mean of the workers' own.
        if mean_bias_LX is not None:
            params = with_bias_of_experts(params, mean_bias_LX)
        drift = jnp.sqrt(squares / num_workers)
        own_workers = len(jax.tree.leaves(of_workers)[0])
        whole = (params, outer_state, drift, optax.tree.norm(outer_grad))
        return whole, _copies(params, own_workers)

    sync = in_each_replica(sync_in_replica, (EVERYWHERE, BY_WORKERS), (EVERYWHERE, BY_WORKERS))
    local = state.opt_state
    outer = (state.params, local.outer_state)
    (params, outer_state, drift, grad_norm), of_workers = sync(outer, local.workers.params)
    workers = dataclasses.replace(local.workers, params=of_workers)
    local = dataclasses.replace(
        local, workers=workers, outer_state=outer_state, drift=drift, outer_grad_norm=grad_norm
    )
    return dataclasses.replace(state, params=params, opt_state=local)


def _told(metrics: Metrics, local: LocalState) -> Metrics:
    """Return the metrics of a step from those of each worker.

    The loss is that of all tokens, and the rest are means, without those of workers that had
    nothing to learn or passed over the step. Where all did, the loss is NaN.
    """
    guard = local.workers.guard
    has_learned = (metrics["bad"] == 0) & ~jnp.isnan(metrics["loss"])
    num_targets = jnp.where(has_learned, metrics["num_targets"], 0)
    total = jnp.maximum(jnp.sum(has_learned), 1)
    told = {
        name: jnp.sum(jnp.where(has_learned, values, 0)) / total for name, values in metrics.items()
    }
    nats = jnp.where(has_learned, metrics["loss"], 0) * num_targets
    return {
        **told,
        "loss": jnp.sum(nats) / jnp.sum(num_targets),
        "drift": local.drift,
        "outer_grad_norm": local.outer_grad_norm,
        "passed_over": jnp.sum(guard.skipped).astype(jnp.float32),
        "passed_over_in_row": jnp.max(guard.bad_in_row).astype(jnp.float32),
    }


def _nothing_told(metrics: Metrics, local: LocalState) -> Metrics:
    del local
    return {name: jnp.zeros(()) for name in (*metrics, *METRICS)}


def _copies(tree: Any, number: int) -> Any:
    """Return a tree whose arrays are repeated along a new first axis."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *x.shape)), tree)


def _split_rows(x: jax.Array, num_workers: int) -> jax.Array:
    """Return an array [A, rows, ...] as [workers, A, rows of each, ...]."""
    by_worker = x.reshape(len(x), num_workers, -1, *x.shape[2:])
    return jnp.moveaxis(by_worker, 1, 0)


def _for_each(function: Callable, stacked: Any) -> Any:
    """Return the stacked results of a function of each worker's part, one after the other."""
    if len(jax.tree.leaves(stacked)[0]) > 1:
        return jax.lax.map(function, stacked)
    result = function(jax.tree.map(lambda x: x[0], stacked))
    return jax.tree.map(lambda x: x[None], result)
