"""Measure how fast a config trains here: its own train step on random tokens, so no data is read.

python -m tinylm.bench --config=tales
python -m tinylm.bench --config=gpt2_124m --json --profile=traces

Prints tokens per second, step time, MFU against the chip's peak (a matmul's rate on CPU), time to
the first step with an empty and a filled compile cache, what the host does, memory, and where the
time goes by kind of operation.
"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from absl.flags import FlagValues

from tinylm import cli
from tinylm.core import text
from tinylm.core.distributed import is_main
from tinylm.core.errors import StorageError
from tinylm.core.storage import check_on_disk


def bench(flags: FlagValues) -> None:
    """Measure as the flags say."""
    from tinylm.core.mesh import make_mesh
    from tinylm.tools.bench import measure

    check_on_disk("--profile", flags.profile)
    config = cli.resolved_config(flags)
    mesh = make_mesh(config.mesh)
    config.check_mesh(mesh)
    if flags.profile:
        try:
            os.makedirs(flags.profile, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"--profile={flags.profile} can't be made: {error.strerror}."
            ) from error
    found = measure(config, mesh, flags.dispatches, flags.profile)
    if is_main():
        print(json.dumps(found) if flags.json else text_of(found))


def text_of(found: dict[str, Any]) -> str:
    """Return the figures as aligned lines."""
    mfu = "unknown: add the chip to tinylm/core/chips.py"
    if found["mfu"] is not None:
        mfu = "{mfu:.1%} of {peak_flops:.3g} FLOP/s"
    lines = {
        "device": "{device}, mesh {axes}",
        "tokens per second": "{tokens_per_sec:,.0f}",
        "step": "{step_ms:.2f} ms, eight of ten from {step_ms_p10:.2f} to {step_ms_p90:.2f}",
        "MFU": mfu,
        "first step": (
            "{first_step_secs:.1f} s cold, {first_step_warm_secs:.1f} s with a filled compile cache"
        ),
        "host": "{host_ms:.2f} ms a step, {input_wait_ms:.2f} of it for input",
        "peak memory, bytes": "{peak_memory_bytes:,}",
    }
    axes = text.mesh_text(found["mesh"])
    rows = [(name, line.format(axes=axes, **found)) for name, line in lines.items()]
    for kind, part in found["time_by_kind"].items():
        rows.append((f"  {kind}", f"{part:.1%} of the operations' time"))
    printed = [text.columns(row, (24, 0)) for row in rows]
    if found["noisy"]:
        printed.append("The machine was too noisy for small differences.")
    return "\n".join(printed)


def define_flags(flags: FlagValues) -> None:
    """Add the flags of this command."""
    absl_flags.DEFINE_string(
        "profile",
        "",
        "folder to keep a trace in, for TensorBoard, XProf or Perfetto",
        flag_values=flags,
    )
    absl_flags.DEFINE_integer(
        "dispatches",
        20,
        "calls of the step to time, each of train.steps_per_dispatch (with workers at least those "
        "from one sync to the next)",
        lower_bound=2,
        flag_values=flags,
    )
    cli.define_json(flags)


COMMAND = cli.Command(__doc__, bench, define_flags, has_config=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: this process's); return its exit code."""
    return cli.run(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
