"""Look at runs: one HTML page that opens from disk, and PNGs beside it.

python -m tinylm.report --workdir=runs/tales
python -m tinylm.report --workdir runs/a runs/b --out=compare.html
python -m tinylm.report --workdir=runs/sweep
python -m tinylm.report --workdir=runs/tales --attention_text="A puppy." --attention_heads=0.0,2.3

Curves against steps, tokens or wall time; where the time went; samples; the model's parameters;
what differs.
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from absl.flags import FlagValues
from etils import epath

from tinylm import cli
from tinylm.core.errors import StorageError, UserError, one_line
from tinylm.core.log import say
from tinylm.core.storage import failures


def report(flags: FlagValues) -> None:
    """Write the report that the flags ask for."""
    from tinylm.run.folder import RunFolder
    from tinylm.show import describe_run
    from tinylm.view import page
    from tinylm.view.history import gather
    from tinylm.view.plot import draw_curves

    workdirs = [run for workdir in flags.workdir for run in runs_in(workdir)]
    runs = [gather(workdir) for workdir in workdirs]
    distinct_names(runs)
    out = epath.Path(flags.out or RunFolder(flags.workdir[0]).path / "report.html")
    written = [out]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if any(run["train"] or run["valid"] for run in runs):
            written.append(out.with_suffix(".png"))
            draw_curves(runs, written[-1])
        for workdir, run in zip(workdirs, runs, strict=True):
            run["model"] = describe_run(workdir)
            if flags.attention_text:
                picture = out.with_name(f"{out.stem}_attention_{run['name'].replace('/', '_')}.png")
                try:
                    run["attention"] = attention(workdir, picture, flags)
                    written.append(picture)
                except UserError as error:
                    # Of several runs, one may know other characters, or have other heads.
                    if len(runs) == 1:
                        raise
                    say(f"warning: no attention of {run['name']}: {error}")
        content = page.page(", ".join(run["name"] for run in runs), runs)
        # Under a locale that is not UTF-8, names of files hold their bytes in escapes, which become
        # those bytes again.
        out.write_bytes(content.encode("utf-8", "surrogateescape"))
    except failures() as error:
        raise StorageError(f"--out={out} cannot be written: {one_line(error)}.") from error
    print("\n".join(map(str, written)))


def runs_in(workdir: str) -> list[str]:
    """Return the folder of a run or, where that of a sweep is given, those of its runs."""
    from tinylm.run.folder import RunFolder

    folder = RunFolder(workdir)
    if folder.exists() or not folder.path.is_dir():
        return [workdir]
    below = sorted(str(path) for path in folder.path.iterdir() if (path / "config.json").exists())
    return below or [workdir]


def spread(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which `--workdir A B` stands as a flag for each folder."""
    found, taking = [], False
    for argument in arguments:
        if argument.startswith("-"):
            taking = argument.lstrip("-").partition("=")[0] == "workdir"
        elif taking:
            argument = f"--workdir={argument}"
        if argument not in ("-workdir", "--workdir"):
            found.append(argument)
    return found


def distinct_names(runs: list[dict[str, Any]]) -> None:
    """Name runs by their path where the names of their folders are alike."""
    if len({run["name"] for run in runs}) < len(runs):
        for run in runs:
            run["name"] = run["path"]


def attention(workdir: str, picture: epath.Path, flags: FlagValues) -> dict[str, Any]:
    """Draw the chosen heads of a run over the text, and return them for the page."""
    from tinylm.run.open_run import open_run
    from tinylm.view import page
    from tinylm.view.attention import attention_of

    run = open_run(workdir, flags.step)
    tokens, weights = attention_of(run, flags.attention_text)
    heads = chosen_heads(flags.attention_heads, weights.shape[0], weights.shape[1])
    page.draw_attention(tokens, weights, heads, picture)
    return page.attention_part(tokens, weights, heads)


def chosen_heads(names: list[str], num_layers: int, num_heads: int) -> list[tuple[int, int]]:
    """Return (layer, head) pairs from names like "0.3"; without names, all of the first and the
    last layer.
    """
    if not names:
        return [(layer, head) for layer in sorted({0, num_layers - 1}) for head in range(num_heads)]
    known = {
        f"{layer}.{head}": (layer, head) for layer in range(num_layers) for head in range(num_heads)
    }
    for name in names:
        if name not in known:
            raise UserError(
                f"--attention_heads={name} must be LAYER.HEAD, up to "
                f"{num_layers - 1}.{num_heads - 1}."
            )
    return [known[name] for name in names]


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
