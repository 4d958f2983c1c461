"""Where parameters lie on the mesh: as shardings for programs, and in words for people.

The tables are those of `mesh`. `place_parameters` applies them to a whole tree, so that training,
restoring and importing put each parameter in the same place. `describe_parameter` says what they
came to, and where a preferred dimension was passed over because the mesh axis doesn't divide its
size.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from tinylm.core.mesh import Axes, parameter_rules, parameter_sharding, replicated
from tinylm.core.text import path_text


def place_parameters(
    shapes: Any, axes: Mapping[str, Axes], mesh: Mesh, fsdp: bool, stacked: Axes = ()
) -> Any:
    """Give each leaf of a tree its place on the mesh.

    Args:
      shapes: a tree of shapes: parameters, or what is made from them, as an optimizer's state.
      axes: the logical axes of each parameter by its path ("blocks/mlp/up/kernel").
      mesh: its devices may be those of a topology that isn't here.
      fsdp: whether the data axis splits parameters too.
      stacked: the logical axes that each leaf has in front of its own.

    Returns:
      The tree with a sharding in each leaf. A leaf whose path ends with that of a parameter of as
      many dimensions lies where the parameter does, as a moment of the optimizer. Any other, as a
      counter, is whole on every device.
    """

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        own_dims = len(leaf.shape) - len(stacked)
        own: Axes = (None,) * own_dims
        for start in range(len(path)):
            found = axes.get(path_text(path[start:]))
            if found is not None and len(found) == own_dims:
                own = found
                break
        sharding = replicated(mesh)
        if stacked or any(own):
            sharding = parameter_sharding(mesh, fsdp, (*stacked, *own), leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(place, shapes)


@dataclasses.dataclass(frozen=True)
class Placement:
    """One parameter's place on the mesh.

    Attributes:
      split_by: for each dimension the mesh axis that splits it, or several as "replica+data"; ""
        for none.
      elements_per_device: how many elements each device holds.
      notes: a line for each preferred dimension that was passed over.
    """

    split_by: tuple[str, ...]
    elements_per_device: int
    notes: tuple[str, ...]


def describe_parameter(
    mesh: Mesh | AbstractMesh, fsdp: bool, axes: Axes, shape: Sequence[int]
) -> Placement:
    """Return where a parameter with logical `axes` and `shape` lies on the mesh."""
    sharding = parameter_sharding(mesh, fsdp, axes, shape)
    split_by = []
    for entry in sharding.spec:
        if isinstance(entry, tuple):
            split_by.append("+".join(entry))
        else:
            split_by.append(entry or "")

    notes = []
    for mesh_axis, preferred in parameter_rules(fsdp).items():
        size = mesh.shape[mesh_axis]
        first_choice = next((name for name in preferred if name in axes), None)
        if first_choice is None:
            continue
        dim_size = shape[list(axes).index(first_choice)]
        # An axis of one device divides everything.
        if dim_size % size == 0:
            continue
        fate = "leaves it whole on every device"
        for name, split_axes in zip(axes, split_by, strict=True):
            if mesh_axis in split_axes.split("+"):
                fate = f"splits {name} instead"
        notes.append(f"{mesh_axis} ({size}) does not divide {first_choice} ({dim_size}), {fate}")

    elements = math.prod(sharding.shard_shape(tuple(shape)))
    return Placement(tuple(split_by), elements, tuple(notes))
