"""Where a parameter lies on the mesh, in words: for people who ask, not for programs that place.

The tables are those of `mesh`; this says what they came to, and where a preferred dimension was
passed over because the mesh axis doesn't divide its size.
"""

import dataclasses
import math
from collections.abc import Sequence

from jax.sharding import Mesh

from tinylm.core.mesh import parameter_rules, parameter_sharding


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
    mesh: Mesh, fsdp: bool, axes: Sequence[str | None], shape: Sequence[int]
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
