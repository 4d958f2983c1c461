"""Print what is in a model: each parameter's axes, shape, type, place on the mesh, and bytes.

python -m tinylm.show --config=configs/gpt2_124m.py
python -m tinylm.show --workdir=runs/tales
python -m tinylm.show --config=tinystories:33m --cpu_devices=8 --config.mesh.model=2 --json

Makes no array and reads no text. A run is shown on the mesh that it ran on.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence

from absl.flags import FlagValues

from tinylm import cli
from tinylm.core.errors import UserError


def show(flags: FlagValues) -> None:
    """Show the model of the config or the run that the flags name."""
    from tinylm.core.distributed import is_main
    from tinylm.core.mesh import make_mesh
    from tinylm.view.parameters import describe, describe_run, table_text

    if (flags.config is None) == (flags.workdir is None):
        raise UserError("give either --config=NAME or --workdir=RUN.")
    if flags.workdir is not None:
        table = describe_run(flags.workdir)
    else:
        config = cli.resolved_config(flags)
        table = describe(config.model, make_mesh(config.mesh), config.mesh.fsdp)
    if is_main():
        print(json.dumps(dataclasses.asdict(table)) if flags.json else table_text(table))


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
