"""Where a parameter lies on the mesh, in words: for people who ask, not for programs that place.

The rules are those of `mesh`; this says what they came to, and where a preferred dimension was
passed over because its size isn't divisible by the mesh axis.
"""

import dataclasses
import math
from collections.abc import Sequence

from jax.sharding import Mesh

from tinylm.core.mesh import PARAMETER_RULES, parameter_sharding


@dataclasses.dataclass(frozen=True)
class Layout:
    """One parameter's place: the mesh axis that splits each dimension ("" for none), and what was
    passed over.
    """

    split_by: tuple[str, ...]
    elements_per_device: int
    notes: tuple[str, ...]


def describe_parameter(
    mesh: Mesh, fsdp: bool, axes: Sequence[str | None], shape: Sequence[int]
) -> Layout:
    """Return where a parameter with logical `axes` and `shape` lies on the mesh."""
    sharding = parameter_sharding(mesh, fsdp, axes, shape)
    split_by = tuple(
        "+".join(entry) if isinstance(entry, tuple) else entry or "" for entry in sharding.spec
    )
    rules = {name: wanted for name, wanted in PARAMETER_RULES.items() if mesh.shape[name] > 1}
    if not fsdp:
        rules.pop("data", None)
    notes = [
        _passed_over(mesh_axis, mesh.shape[mesh_axis], wanted, axes, shape, split_by)
        for mesh_axis, wanted in rules.items()
    ]
    return Layout(
        split_by,
        math.prod(sharding.shard_shape(tuple(shape))),
        tuple(note for note in notes if note),
    )


def _passed_over(
    mesh_axis: str,
    size: int,
    wanted: Sequence[str],
    axes: Sequence[str | None],
    shape: Sequence[int],
    split_by: Sequence[str],
) -> str:
    """Return what to say where the first dimension that a mesh axis would split isn't divisible by
    it, else ''.
    """
    first = next((name for name in wanted if name in axes), None)
    if first is None or shape[list(axes).index(first)] % size == 0:
        return ""
    instead = next(
        (axis for axis, by in zip(axes, split_by, strict=True) if mesh_axis in by.split("+")), None
    )
    fate = f"splits {instead} instead" if instead else "leaves it whole on every device"
    return (
        f"{mesh_axis} ({size}) does not divide {first} ({shape[list(axes).index(first)]}), {fate}"
    )
