"""Train one run for each point of a grid; the same command again does the rest.

python -m tinylm.sweep --config=tales --grid=optimizer.learning_rate=1e-2,2e-2 --workdir=runs/sweep
python -m tinylm.sweep --config=tales --grid=seed=0,1 --grid=model.mlp=gelu,relu2 --workdir=runs/mlp

Each run is a folder below --workdir, with its log.txt. Ends in a table, best first, and a picture,
sweep.png.
"""

import json
import signal
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from absl.flags import FlagValues

from tinylm import cli
from tinylm.config import load_config, prepare_arguments
from tinylm.core import text
from tinylm.core.errors import Preempted
from tinylm.core.log import say
from tinylm.core.signals import SIGNALS, is_ignored
from tinylm.tools.sweep import Row, sweep


def sweep_as_told(flags: FlagValues, arguments: Sequence[str]) -> int:
    """Sweep as the flags say; `arguments` are the flags as they were given."""
    cli.require_config(flags)  # whether it holds is seen at each point of the grid
    for number in SIGNALS:
        if number != signal.SIGINT and not is_ignored(number):
            signal.signal(number, asked_to_stop)
    argv = prepare_arguments(["tinylm", *arguments])
    base = [argument for argument in argv if argument.startswith("--config")]
    if flags.cpu_devices:
        base.append(f"--cpu_devices={flags.cpu_devices}")
    rows = sweep(base, flags.grid, flags.workdir, flags.jobs, load_config)
    as_json = [row._asdict() for row in rows]
    print(json.dumps(as_json) if flags.json else text_of(rows))
    say(f"Compare them: python -m tinylm.report --workdir={flags.workdir}")
    has_failed = any(row.loss is None for row in rows)
    return 1 if has_failed else 0


def asked_to_stop(*_: Any) -> None:
    """Raise Preempted, as a handler of signals."""
    raise Preempted("asked to stop; the same command goes on.")


def text_of(rows: Sequence[Row]) -> str:
    """Return the table."""
    table = [(*rows[0].point, "result")]
    for row in rows:
        table.append((*row.point.values(), row.result))
    return "\n".join(text.table(table))


def define_flags(flags: FlagValues) -> None:
    """Add the flags of this command."""
    absl_flags.DEFINE_multi_string(
        "grid",
        None,
        "KEY=VALUE,VALUE,...: one axis of the grid; may be given several times",
        flag_values=flags,
    )
    absl_flags.DEFINE_integer("jobs", 1, "runs at a time", lower_bound=1, flag_values=flags)
    cli.require(flags, "grid", "--grid=seed=0,1")
    cli.define_workdir(flags)
    cli.define_json(flags)


def command(arguments: Sequence[str]) -> cli.Command:
    """Return the command for these arguments; its processes need the devices, not this one."""
    return cli.Command(
        __doc__,
        lambda flags: sweep_as_told(flags, arguments),
        define_flags,
        has_config=True,
        on_cpu=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: this process's); return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return cli.run(command(arguments), argv)


if __name__ == "__main__":
    sys.exit(main())
