"""Look at runs: one HTML page that opens from disk, and PNGs next to it.

python -m tinylm.report --workdir=runs/tales
python -m tinylm.report --workdir runs/a runs/b --out=compare.html
python -m tinylm.report --workdir=runs/sweep
python -m tinylm.report --workdir=runs/tales --attention_text="A puppy." --attention_heads=0.0,2.3

Curves against steps, tokens or wall time; where the time went; samples; the model's parameters;
what differs.
"""

import sys
from collections.abc import Sequence

from absl import flags as absl_flags
from absl.flags import FlagValues

from tinylm import cli
from tinylm.core.storage import check_address


def report(flags: FlagValues) -> None:
    """Write the report that the flags ask for, and print where it is."""
    from tinylm.view.report import AttentionRequest, write_report

    check_address("--out", flags.out)
    attention = None
    if flags.attention_text:
        attention = AttentionRequest(flags.attention_text, flags.attention_heads, flags.step)
    written = write_report(flags.workdir, flags.out, attention)
    print("\n".join(map(str, written)))


def spread(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which `--workdir A B` stands as a flag for each folder."""
    found = []
    follows_workdir = False
    for argument in arguments:
        if argument.startswith("-"):
            follows_workdir = argument.lstrip("-").partition("=")[0] == "workdir"
        elif follows_workdir:
            argument = f"--workdir={argument}"
        if argument not in ("-workdir", "--workdir"):
            found.append(argument)
    return found


def define_flags(flags: FlagValues) -> None:
    """Add the flags of this command."""
    absl_flags.DEFINE_multi_string(
        "workdir",
        None,
        "folder of a run, or of several (--workdir A B C), or of a sweep",
        flag_values=flags,
    )
    absl_flags.DEFINE_string(
        "out",
        "",
        "the page to write (default: report.html in the first run's folder)",
        flag_values=flags,
    )
    absl_flags.DEFINE_string(
        "attention_text", "", "draw attention over this text", flag_values=flags
    )
    absl_flags.DEFINE_list(
        "attention_heads",
        [],
        "heads to draw, as LAYER.HEAD (default: all of the first and last layer)",
        flag_values=flags,
    )
    cli.define_step(flags, "checkpoint whose attention to draw: best, latest or a step")
    cli.require(flags, "workdir", "--workdir=runs/tales")


COMMAND = cli.Command(__doc__, report, define_flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: this process's); return its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return cli.run(COMMAND, spread(arguments), is_guest=argv is not None)


if __name__ == "__main__":
    sys.exit(main())
