"""The table of a model's parameters: axes, shape, type, place on the mesh, and bytes of each.

It comes from the abstract model, so nothing is computed and no device is needed: a model can be
shown on the mesh of a machine that isn't here.
"""

import collections
import dataclasses
import math

from flax import traverse_util
from jax.sharding import AbstractMesh, Mesh

from tinylm.core import text
from tinylm.core.mesh import AXES, MeshConfig, sizes_by_name
from tinylm.core.placement import describe_parameter
from tinylm.core.settings import from_dict
from tinylm.model.config import ModelConfig
from tinylm.model.flops import count_active_parameters, count_parameters
from tinylm.model.transformer import abstract_transformer
from tinylm.run.folder import RunFolder

_HEADS = ("parameter", "axes", "shape", "dtype", "split by", "bytes", "per device")

# A recorded mesh states the size of each axis, so any number that it divides will do.
_ENOUGH_DEVICES = 2**30


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """One parameter.

    Attributes:
      parameter: its path, as "blocks/mlp/up/kernel".
      axes: the logical axis of each dimension.
      shape: as stored, so with the rows that pad the vocabulary.
      dtype: its type by name.
      split_by: for each dimension the mesh axis that splits it; "" for none.
      bytes: of the whole parameter.
      bytes_per_device: of the part that each device holds.
      notes: a line for each preferred dimension that a mesh axis doesn't divide.
    """

    parameter: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    split_by: tuple[str, ...]
    bytes: int
    bytes_per_device: int
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ParameterTable:
    """All parameters of a model on a mesh. These are the keys of `show --json`, too.

    Attributes:
      parameters: a row for each.
      num_parameters: how many numbers they hold, without the rows that pad the vocabulary.
      active_parameters: how many of these a token meets: of experts, those that it is sent to.
      padding_rows: how many rows pad the vocabulary.
      bytes: of all parameters.
      bytes_per_device: of the parts that each device holds.
      mesh: the size of each axis by its name.
      devices: how many devices the mesh has.
    """

    parameters: list[ParameterRow]
    num_parameters: int
    active_parameters: int
    padding_rows: int
    bytes: int
    bytes_per_device: int
    mesh: dict[str, int]
    devices: int


def describe(model: ModelConfig, mesh: Mesh | AbstractMesh, fsdp: bool) -> ParameterTable:
    """Return the table of a resolved model.

    Args:
      model: its settings.
      mesh: where it is placed; an abstract one will do.
      fsdp: whether the data axis splits parameters too (`mesh.fsdp`).
    """
    _, shapes, axes = abstract_transformer(model)
    leaves = traverse_util.flatten_dict(shapes, sep="/")
    rows = []
    for path, leaf in leaves.items():
        place = describe_parameter(mesh, fsdp, axes[path], leaf.shape)
        itemsize = leaf.dtype.itemsize
        row = ParameterRow(
            parameter=path,
            axes=tuple(axes[path]),
            shape=leaf.shape,
            dtype=str(leaf.dtype),
            split_by=place.split_by,
            bytes=math.prod(leaf.shape) * itemsize,
            bytes_per_device=place.elements_per_device * itemsize,
            notes=place.notes,
        )
        rows.append(row)
    shape_of = {row.parameter: row.shape for row in rows}
    return ParameterTable(
        parameters=rows,
        num_parameters=count_parameters(shape_of, model),
        active_parameters=count_active_parameters(shape_of, model),
        padding_rows=model.padded_vocab - model.vocab_size,
        bytes=sum(row.bytes for row in rows),
        bytes_per_device=sum(row.bytes_per_device for row in rows),
        mesh=sizes_by_name(mesh),
        devices=mesh.size,
    )


def describe_run(workdir: str) -> ParameterTable:
    """Return the table of the model in a run's folder, on the mesh that it ran on.

    Raises:
      UserError: where there is no run, or its config.json holds no such model or mesh.
    """
    record = RunFolder(workdir).read_config()
    config = record["config"]
    model = from_dict(ModelConfig, config["model"])
    model.check()
    fsdp = from_dict(MeshConfig, config.get("mesh", {})).fsdp
    ran_on = from_dict(MeshConfig, record["versions"]["mesh"])
    mesh = AbstractMesh(ran_on.sizes(_ENOUGH_DEVICES), AXES)
    return describe(model, mesh, fsdp)


def table_text(table: ParameterTable) -> str:
    """Return the table as aligned text, its notes and totals below."""
    rows = [_HEADS]
    for row in table.parameters:
        cells = (
            row.parameter,
            " ".join(row.axes),
            " ".join(map(str, row.shape)),
            row.dtype,
            " ".join(axis or "-" for axis in row.split_by),
            f"{row.bytes:,}",
            f"{row.bytes_per_device:,}",
        )
        rows.append(cells)
    lines = text.table(rows, num_right=2)
    notes = collections.Counter(note for row in table.parameters for note in row.notes)
    for note, count in notes.items():
        parameters = "1 parameter" if count == 1 else f"{count} parameters"
        lines.append(f"note: {note} ({parameters})")
    padding = f" and {table.padding_rows} padding rows" if table.padding_rows else ""
    active = ""
    if table.active_parameters < table.num_parameters:
        active = f", {table.active_parameters:,} of them active for a token"
    lines.append(
        f"{table.num_parameters:,} parameters{padding}{active}; {table.bytes:,} bytes in all, "
        f"{table.bytes_per_device:,} per device on {text.mesh_text(table.mesh)}"
    )
    return "\n".join(lines)
