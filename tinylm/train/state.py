"""The one state of a run, known before it exists.

`TrainState` is a pytree of arrays. Its abstract form (shape, dtype and sharding of each leaf)
follows from the resolved config and the mesh alone: initialization fills it on the devices,
restoring fills it, planning compiles against it. Nothing in it depends on the mesh but the
sharding.
"""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from tinylm.core.placement import place_parameters
from tinylm.model.transformer import abstract_transformer, init_parameters
from tinylm.train.bad_steps import Guard, new_guard
from tinylm.train.config import Config, TrainConfig
from tinylm.train.local_steps import (
    count_workers,
    deal_out,
    new_local_state,
    place_local_state,
)
from tinylm.train.optimizer import make_optimizer, make_schedule


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything a run needs to go on."""

    step: jax.Array  # int32: steps taken
    params: dict
    opt_state: Any  # of the optimizer; a LocalState where workers train by themselves
    guard: Guard


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What a state is made from and trained with."""

    config: Config  # resolved
    graph: nnx.GraphDef  # of the model
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule  # of the learning rate
    abstract: TrainState  # shape, dtype and sharding of each leaf
    axes: dict[str, tuple]  # logical axes of each parameter by its path
    num_workers: int  # that train by themselves; 0: none does

    @property
    def shardings(self) -> TrainState:
        """The sharding of each leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    @property
    def mesh(self) -> Mesh:
        """The mesh that the state lies on."""
        everywhere: Any = self.abstract.step.sharding
        return everywhere.mesh

    def init(self, seed: int) -> TrainState:
        """Return the state before the first step, each device making its own part."""

        def make(seed: jax.Array) -> TrainState:
            return self._new_state(init_parameters(self.config.model, seed))

        return jax.jit(
            make, out_shardings=self.shardings, compiler_options=_run_once_options(self.mesh)
        )(seed)

    def start_from(self, params: dict) -> TrainState:
        """Return the state before the first step around parameters, which it takes over."""

        def make(params: dict) -> TrainState:
            return self._new_state(params)

        return jax.jit(make, out_shardings=self.shardings, donate_argnums=0)(params)

    def with_workers(self, num_workers: int) -> "Blueprint":
        """Return the blueprint of the same run with another number of workers."""
        config = self.config.editable_copy()
        config.train.workers = num_workers
        return _make_blueprint(config, self.mesh, num_workers)

    def take_from(self, state: TrainState) -> TrainState:
        """Return a state of this run from one with another number of workers."""

        def deal(state: TrainState) -> TrainState:
            local = deal_out(state.opt_state, self.num_workers)
            return dataclasses.replace(state, opt_state=local)

        return jax.jit(deal, out_shardings=self.shardings)(state)

    def _new_state(self, params: dict) -> TrainState:
        return _new_state(params, self.optimizer, self.num_workers, self.config.train)


def _run_once_options(mesh: Mesh) -> dict[str, int] | None:
    """Return how to compile a program that runs once; None: as others.

    Of the program that draws a state, most of the time on CPU is compiling. For the loops that make
    random bits jaxlib 0.10.2 takes 3.7 s of processor time (4 layers of 128), and 1.1 s at the
    lowest level that still optimizes. The numbers are the same.
    """
    level = "xla_backend_optimization_level"
    is_set_by_user = level in os.environ.get("XLA_FLAGS", "")
    if mesh.devices.flat[0].platform != "cpu" or is_set_by_user:
        return None
    return {level: 1}


def make_blueprint(config: Config, mesh: Mesh) -> Blueprint:
    """Work out the abstract state of a run on `mesh`, without making an array.

    Args:
      config: resolved.
      mesh: its devices may be those of a topology that isn't here.
    """
    return _make_blueprint(config, mesh, count_workers(config, mesh))


def _make_blueprint(config: Config, mesh: Mesh, num_workers: int) -> Blueprint:
    num_steps = config.train.num_steps
    graph, params, axes = abstract_transformer(config.model)
    optimizer = make_optimizer(config.optimizer, num_steps, axes)
    shapes = jax.eval_shape(
        lambda params: _new_state(params, optimizer, num_workers, config.train), params
    )
    abstract = place_parameters(shapes, axes, mesh, config.mesh.fsdp)
    if num_workers:
        local = place_local_state(shapes.opt_state, axes, mesh, config.mesh.fsdp)
        abstract = dataclasses.replace(abstract, opt_state=local)

    return Blueprint(
        config=config,
        graph=graph,
        optimizer=optimizer,
        schedule=make_schedule(config.optimizer, num_steps),
        abstract=abstract,
        axes=axes,
        num_workers=num_workers,
    )


def _new_state(
    params: dict, optimizer: optax.GradientTransformation, num_workers: int, train: TrainConfig
) -> TrainState:
    """Return the state before the first step around parameters."""
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), new_guard())
    if not num_workers:
        return state
    return dataclasses.replace(state, opt_state=new_local_state(state, num_workers, train))
