"""Train one run for each point of a grid; the same command again does the rest.

python -m tinylm.sweep --config=tales --grid=optimizer.learning_rate=1e-2,2e-2 --workdir=runs/sweep
python -m tinylm.sweep --config=tales --grid=seed=0,1 --grid=model.mlp=gelu,relu2 --workdir=runs/mlp

Each run is a folder below --workdir, with its log.txt. Ends in a table, best first, and sweep.png
beside it.
"""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags as absl_flags
from absl.flags import FlagValues

from tinylm import cli
from tinylm.config import load_config, prepare_arguments
from tinylm.core import text
from tinylm.core.errors import Preempted, UserError, one_line
from tinylm.core.log import say
from tinylm.core.signals import SIGNALS, is_ignored


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
    rows = sweep(base, flags.grid, flags.workdir, flags.jobs)
    print(json.dumps(rows) if flags.json else text_of(rows))
    say(f"Compare them: python -m tinylm.report --workdir={flags.workdir}")
    has_failed = any(row["loss"] is None for row in rows)
    return 1 if has_failed else 0


def asked_to_stop(*_: Any) -> None:
    """Raise Preempted, as a handler of signals."""
    raise Preempted("asked to stop; the same command goes on.")


def sweep(
    base: Sequence[str], grid: Sequence[str], workdir: str, jobs: int
) -> list[dict[str, Any]]:
    """Train with the flags `base` at each point of `grid`, `jobs` at a time; return a row for each,
    best first.
    """
    from tinylm.run.folder import RunFolder

    workdir, axes = str(RunFolder(workdir).path), dict(map(parse_axis, grid))
    if "://" in workdir:
        raise UserError(
            f"--workdir={workdir} must be a folder on a disk: processes write their logs there."
        )
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    refuse_twice(parse_axis(text)[0] for text in grid)
    refuse_twice(map(name_of, points))
    config = next(
        argument.removeprefix("--config=") for argument in base if argument.startswith("--config=")
    )
    settings = [
        argument.removeprefix("--config.") for argument in base if argument.startswith("--config.")
    ]
    for point in points:  # every mistake comes before the first run
        load_config(config, [*settings, *(f"{key}={value}" for key, value in point.items())])
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(train, base, point, workdir, jobs, stop) for point in points]
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                say(
                    f"[{done}/{len(points)}] {name_of(future.result()['point'])}: "
                    f"{future.result()['result']}"
                )
        except (KeyboardInterrupt, Preempted):
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    picture = pathlib.Path(workdir, "sweep.png")
    try:
        draw([future.result() for future in futures], picture)
    except Exception as error:
        # Whatever fails in drawing, the table is what the runs were for.
        say(f"warning: {picture} cannot be written: {one_line(error)}")
    return sorted(
        (future.result() for future in futures), key=lambda row: (row["loss"] is None, row["loss"])
    )


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Return (key, values) of "key=a,b"; commas inside brackets separate nothing."""
    key, _, values = text.partition("=")
    if not values:
        raise UserError(
            f"--grid={text} must be KEY=VALUE,VALUE,..., for example "
            "optimizer.learning_rate=1e-3,3e-3."
        )
    return key, re.split(r",(?![^(]*\))", values)


def refuse_twice(names: Iterable[str]) -> None:
    """Raise UserError where a key, or the folder of a point, is there twice."""
    name, count = collections.Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"--grid has {name} twice; give each key once, with all its values, and each value "
            "once."
        )


def name_of(point: dict[str, str]) -> str:
    """Return the name of the folder of a run; where a file system would refuse it, its beginning
    and a hash.
    """
    name = re.sub(r"[/*?\[]", "_", ",".join(f"{key}={value}" for key, value in point.items()))
    whole = os.fsencode(name)
    return (
        name
        if len(whole) <= 255
        else whole[:220].decode(errors="ignore") + hashlib.sha256(whole).hexdigest()[:32]
    )


def train(
    base: Sequence[str], point: dict[str, str], workdir: str, jobs: int, stop: threading.Event
) -> dict[str, Any]:
    """Train one run unless it is done; return its point, best loss (None where it failed) and what
    to say of it.
    """
    folder = pathlib.Path(workdir, name_of(point))
    folder.mkdir(parents=True, exist_ok=True)
    settings = [*base, *(f"--config.{key}={value}" for key, value in point.items())]
    done, log = folder / "sweep_done", folder / "log.txt"
    if not done.exists() or done.read_text(encoding="utf-8") != json.dumps(settings):
        share = {
            "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / jobs:.2f}"
        }  # of a GPU that the jobs share
        with log.open("a", encoding="utf-8") as file:
            command = [sys.executable, "-m", "tinylm.main", *settings, f"--workdir={folder}"]
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**share, **os.environ}
            )
            code = wait_for(process, stop)
        if code:
            last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
            return {
                "point": point,
                "loss": None,
                "step": None,
                "result": f"exit code {code}: {last}",
            }
        done.write_text(json.dumps(settings), encoding="utf-8")
    kind, loss, step = best_loss(str(folder))
    return {
        "point": point,
        "loss": loss,
        "step": step,
        "result": f"{kind} loss {loss:.4f} at step {step}",
    }


def wait_for(process: subprocess.Popen, stop: threading.Event) -> int:
    """Return the exit code of a process, which is asked to end where the sweep is."""
    while process.poll() is None:
        if stop.wait(0.1):
            process.terminate()
            process.wait()
    return process.returncode


def best_loss(workdir: str) -> tuple[str, float, int]:
    """Return what kind of loss a run is judged by, the loss, and its step.

    That is the best one of its validation or, where it had none, the last one of its training.
    """
    from tinylm.run.folder import RunFolder

    lines = [line for line in RunFolder(workdir).metrics() if line.get("loss") is not None]
    valid = [(line["loss"], line["step"]) for line in lines if line["split"] == "valid"]
    if valid:
        return "best validation", *min(valid)
    last = [line for line in lines if line["split"] == "train"][-1]
    return "last training", last["loss"], last["step"]


def text_of(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table."""
    table = [
        (*rows[0]["point"], "result"),
        *((*row["point"].values(), row["result"]) for row in rows),
    ]
    return "\n".join(text.table(table))


def draw(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw the best loss against the first key of the grid, a line for each setting of the
    others.
    """
    from tinylm.view.plot import line_style, new_grid, save

    figure, [axes] = new_grid(1, 1, (7, 4.5))
    # The points of each line, by the values of the other keys.
    lines: dict[str, list[tuple[str, float]]] = {}
    for row in rows:
        value, *others = row["point"].values()
        loss = row["loss"] or float("nan")
        lines.setdefault(", ".join(others), []).append((value, loss))
    for number, (label, points) in enumerate(lines.items()):
        values, losses = zip(*points, strict=True)
        style = line_style(number)
        axes.plot(values, losses, marker="o", label=label or "loss", **style)
    key, *others = rows[0]["point"]
    axes.set(xlabel=key, ylabel="loss (nats per token)")
    axes.legend(fontsize=8, title=", ".join(others))
    save(figure, path)


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
