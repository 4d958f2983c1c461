"""Print what is in a model: each parameter's axes, shape, type, place on the mesh, and bytes.

python -m tinylm.show --config=configs/gpt2_124m.py
python -m tinylm.show --workdir=runs/tales
python -m tinylm.show --config=tinystories:33m --cpu_devices=8 --config.mesh.model=2 --json

Makes no array and reads no text. A run is shown on the mesh that it ran on.
"""

import collections
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from absl.flags import FlagValues

from tinylm import cli
from tinylm.config import Config
from tinylm.core import text
from tinylm.core.errors import UserError

_COLUMNS = ("parameter", "axes", "shape", "dtype", "split by", "bytes", "per device")


def show(flags: FlagValues) -> None:
    """Show the model of the config or the run that the flags name."""
    from tinylm.core.distributed import is_main
    from tinylm.core.mesh import make_mesh

    if (flags.config is None) == (flags.workdir is None):
        raise UserError("give either --config=NAME or --workdir=RUN.")
    if flags.workdir is not None:
        table = describe_run(flags.workdir)
    else:
        config = cli.resolved_config(flags)
        table = describe(config, make_mesh(config.mesh))
    if is_main():
        print(json.dumps(table) if flags.json else text_of(table))


def describe_run(workdir: str) -> dict[str, Any]:
    """Return the table of the model in a run's folder, on the mesh that it ran on, whatever there
    is here.
    """
    from jax.sharding import AbstractMesh

    from tinylm.core.mesh import AXES, MeshConfig
    from tinylm.core.settings import from_dict
    from tinylm.run.folder import RunFolder

    record = RunFolder(workdir).read_config()
    config = from_dict(Config, record["config"])
    config.model.check()
    ran_on = from_dict(MeshConfig, record["versions"]["mesh"])
    # The axes are all given, so any number of devices will do.
    return describe(config, AbstractMesh(ran_on.sizes(2**30), AXES))


def describe(config: Config, mesh: Any) -> dict[str, Any]:
    """Return a row for each parameter of a resolved config on a mesh, and totals."""
    from flax import traverse_util

    from tinylm.core.mesh import sizes_by_name
    from tinylm.core.placement import describe_parameter
    from tinylm.model.flops import count_parameters
    from tinylm.model.transformer import abstract_transformer

    _, shapes, axes = abstract_transformer(config.model)
    rows = []
    for path, leaf in traverse_util.flatten_dict(shapes, sep="/").items():
        place = describe_parameter(mesh, config.mesh.fsdp, axes[path], leaf.shape)
        rows.append(
            {
                "parameter": path,
                "axes": list(axes[path]),
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "split_by": list(place.split_by),
                "bytes": math.prod(leaf.shape) * leaf.dtype.itemsize,
                "bytes_per_device": place.elements_per_device * leaf.dtype.itemsize,
                "notes": list(place.notes),
            }
        )
    return {
        "parameters": rows,
        "num_parameters": count_parameters(
            {row["parameter"]: tuple(row["shape"]) for row in rows}, config.model
        ),
        "padding_rows": config.model.padded_vocab - config.model.vocab_size,
        "bytes": sum(row["bytes"] for row in rows),
        "bytes_per_device": sum(row["bytes_per_device"] for row in rows),
        "mesh": sizes_by_name(mesh),
        "devices": mesh.size,
    }


def text_of(table: dict[str, Any]) -> str:
    """Return the table as aligned text, its notes and totals below."""
    rows = [_COLUMNS]
    for row in table["parameters"]:
        rows.append(
            (
                row["parameter"],
                " ".join(row["axes"]),
                " ".join(map(str, row["shape"])),
                row["dtype"],
                " ".join(by or "-" for by in row["split_by"]),
                f"{row['bytes']:,}",
                f"{row['bytes_per_device']:,}",
            )
        )
    lines = text.table(rows, num_right=2)
    notes = collections.Counter(note for row in table["parameters"] for note in row["notes"])
    for note, count in notes.items():
        parameters = "1 parameter" if count == 1 else f"{count} parameters"
        lines.append(f"note: {note} ({parameters})")
    padding = f" and {table['padding_rows']} padding rows" if table["padding_rows"] else ""
    lines.append(
        f"{table['num_parameters']:,} parameters{padding}; {table['bytes']:,} bytes in all, "
        f"{table['bytes_per_device']:,} per device on {text.mesh_text(table['mesh'])}"
    )
    return "\n".join(lines)


def define_flags(flags: FlagValues) -> None:
    """Add the flags of this command."""
    cli.define_workdir(flags, is_required=False)
    cli.define_json(flags)


COMMAND = cli.Command(__doc__, show, define_flags, has_config=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: this process's); return its exit code."""
    return cli.run(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
