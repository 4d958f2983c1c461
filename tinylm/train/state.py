"""The one state of a run, known before it exists.

`TrainState` is a pytree of arrays. Its abstract form (shape, dtype and sharding of each leaf)
follows from the resolved config and the mesh alone: initialization fills it on the devices,
restoring fills it, planning compiles against it. Nothing in it depends on the mesh but the
sharding.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from tinylm.core.mesh import MeshConfig, parameter_sharding, replicated
from tinylm.model.config import ModelConfig
from tinylm.model.transformer import abstract_transformer, init_parameters
from tinylm.train.bad_steps import Guard, new_guard
from tinylm.train.config import OptimizerConfig
from tinylm.train.optimizer import make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything a run needs to go on: how far it is, what it has learned, and what its guards
    remember.
    """

    step: jax.Array  # int32: steps taken
    params: dict
    opt_state: Any
    guard: Guard


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """What a state is made from and trained with: the model's graph, the optimizer, and the
    abstract state.
    """

    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    abstract: TrainState
    axes: dict[str, tuple]
    model: ModelConfig
    fsdp: bool

    @property
    def shardings(self) -> TrainState:
        """The sharding of each leaf of the state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract)

    def init(self, seed: int) -> TrainState:
        """Return the state before the first step, each device making its own part."""
        make = jax.jit(
            lambda seed: _new_state(init_parameters(self.model, seed), self.optimizer),
            out_shardings=self.shardings,
        )
        return make(seed)

    def start_from(self, params: dict) -> TrainState:
        """Return the state before the first step around parameters that are there already, which it
        takes over.
        """
        make = jax.jit(
            lambda params: _new_state(params, self.optimizer),
            out_shardings=self.shardings,
            donate_argnums=0,
        )
        return make(params)


def make_blueprint(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    mesh_config: MeshConfig,
    num_steps: int,
    mesh: Mesh,
) -> Blueprint:
    """Work out the abstract state of a run on `mesh`, without making an array."""
    graph, params, axes = abstract_transformer(model)
    transform = make_optimizer(optimizer, num_steps, axes)
    shapes = jax.eval_shape(lambda p: _new_state(p, transform), params)

    def place(path, leaf):
        leaf_axes = axes_of(axes, path, leaf.shape)
        sharding = (
            parameter_sharding(mesh, mesh_config.fsdp, leaf_axes, leaf.shape)
            if leaf_axes
            else replicated(mesh)
        )
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return Blueprint(
        graph,
        transform,
        jax.tree_util.tree_map_with_path(place, shapes),
        axes,
        model,
        mesh_config.fsdp,
    )


def axes_of(axes: dict[str, tuple], path: tuple, shape: tuple[int, ...]) -> tuple | None:
    """Return the logical axes of a leaf of the state: those of the parameter whose path its own
    path ends with.

    So a moment of the optimizer lies where its parameter lies; counters, which belong to none, give
    None.
    """
    names = [
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path
    ]
    for start in range(len(names)):
        found = axes.get("/".join(names[start:]))
        if found is not None and len(found) == len(shape):
            return found
    return None


def _new_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), new_guard())
