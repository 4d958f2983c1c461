"""Sweeps: one run for each point of a grid of settings, each a process of its own.

Each run is a folder below the sweep's, with its log.txt. A file in it, `sweep_done`, holds the
flags with which it was finished, so the same sweep again trains what is missing. That is all there
is to resume: a run that was cut goes on from its own checkpoints.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from etils import epath

from tinylm.core.errors import Preempted, StorageError, UserError, one_line
from tinylm.core.files import make_folder
from tinylm.core.log import say
from tinylm.core.storage import explaining, in_bucket
from tinylm.run.folder import RunFolder
from tinylm.view.plot import add_legend_below, line_style, new_grid, plain, save

# One point of a grid: the value of each key, as text.
Point = dict[str, str]
_MOST_NAME_BYTES = 255


class Row(NamedTuple):
    """How the run of one point ended; the loss and its step are None where it failed."""

    point: Point
    loss: float | None
    step: int | None
    result: str


def sweep(
    base: Sequence[str],
    grid: Sequence[str],
    workdir: str,
    jobs: int,
    load: Callable[[str, Sequence[str]], Any],
) -> list[Row]:
    """Train a run at each point of a grid; return a row for each, best first.

    Args:
      base: the flags that all runs have, among them --config.
      grid: its axes, each as "key=value,value".
      workdir: the folder of the sweep, on a disk or in a bucket.
      jobs: how many runs train at a time.
      load: loads a config by its name and overrides; raises UserError for a mistake in them.

    Raises:
      UserError, StorageError: for a mistake at any point, or a bucket that can't be written, before
        the first run begins.
      Preempted: where the sweep was asked to stop.
    """
    folder = RunFolder(workdir)
    keys_and_values = [parse_axis(axis) for axis in grid]
    refuse_twice(key for key, _ in keys_and_values)
    axes = dict(keys_and_values)
    points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    refuse_twice(name_of(point) for point in points)
    _check(base, points, load, folder)
    folder.check_bucket()

    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(train, base, point, folder.path, jobs, stop) for point in points]
            for count, future in enumerate(concurrent.futures.as_completed(futures), 1):
                row = future.result()
                say(f"[{count}/{len(points)}] {name_of(row.point)}: {row.result}")
        except (KeyboardInterrupt, Preempted):
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    rows = [future.result() for future in futures]
    picture = folder.path / "sweep.png"
    try:
        save(figure_of(rows), picture)
    except Exception as error:
        # Whatever fails in drawing, the table is what the runs were for.
        say(f"warning: {picture} cannot be written: {one_line(error)}")
    return sorted(rows, key=lambda row: math.inf if row.loss is None else row.loss)


def _check(
    base: Sequence[str],
    points: Sequence[Point],
    load: Callable[[str, Sequence[str]], Any],
    folder: RunFolder,
) -> None:
    """Load the config of each point, so that every mistake comes before the first run."""
    configs = [flag.removeprefix("--config=") for flag in base if flag.startswith("--config=")]
    shared = [flag.removeprefix("--config.") for flag in base if flag.startswith("--config.")]
    for point in points:
        own = [f"{key}={value}" for key, value in point.items()]
        config = load(configs[0], [*shared, *own])
        folder.check_checkpoint_dir(config.checkpoint.dir)


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Return (key, values) of "key=a,b"; commas inside brackets separate nothing."""
    key, _, values = text.partition("=")
    if not values:
        raise UserError(
            f"--grid={text} must be KEY=VALUE,VALUE,..., for example "
            "optimizer.learning_rate=1e-3,3e-3."
        )
    found = [""]
    depth = 0
    for letter in values:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth <= 0:
            found.append("")
        else:
            found[-1] += letter
    return key, found


def refuse_twice(names: Iterable[str]) -> None:
    """Raise UserError where a key, or the folder of a point, is there twice."""
    name, count = collections.Counter(names).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"--grid has {name} twice; give each key once, with all its values, and each value "
            "once."
        )


def name_of(point: Point) -> str:
    """Return the name of the folder of a run; where a file system would refuse it, its beginning
    and a hash.
    """
    settings = ",".join(f"{key}={value}" for key, value in point.items())
    name = re.sub(r"[/*?\[]", "_", settings)
    content = os.fsencode(name)
    if len(content) <= _MOST_NAME_BYTES:
        return name
    return content[:220].decode(errors="ignore") + hashlib.sha256(content).hexdigest()[:32]


def train(
    base: Sequence[str], point: Point, workdir: epath.Path, jobs: int, stop: threading.Event
) -> Row:
    """Train the run of one point, unless it is done; return its row."""
    try:
        with explaining(workdir, "--workdir"):
            return _train(base, point, workdir, jobs, stop)
    except StorageError as error:
        # The runs of other points go on.
        return Row(point, None, None, str(error))


def _train(
    base: Sequence[str], point: Point, workdir: epath.Path, jobs: int, stop: threading.Event
) -> Row:
    folder = workdir / name_of(point)
    make_folder(folder)
    flags = list(base)
    for key, value in point.items():
        flags.append(f"--config.{key}={value}")

    # A finished run leaves its flags. With other ones it isn't done: `base` may ask for more steps.
    done = folder / "sweep_done"
    content = json.dumps(flags)
    is_done = done.exists() and done.read_text(encoding="utf-8") == content
    if not is_done:
        exit_code, last_line = _run(flags, folder, jobs, stop)
        if exit_code:
            result = f"exit code {exit_code}: {last_line}"
            return Row(point, None, None, result)
        done.write_text(content, encoding="utf-8")

    kind, loss, step = best_loss(str(folder))
    result = f"{kind} loss {loss:.4f} at step {step}"
    return Row(point, loss, step, result)


def _run(
    flags: Sequence[str], folder: epath.Path, jobs: int, stop: threading.Event
) -> tuple[int, str]:
    """Train in a process of its own; return its exit code and the last line of its log."""
    # Of a GPU, each of the jobs that share it has its part. JAX refuses a setting of two names.
    share = {}
    if "XLA_CLIENT_MEM_FRACTION" not in os.environ:
        share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / jobs:.2f}"}
    command = [sys.executable, "-m", "tinylm.main", *flags, f"--workdir={folder}"]
    with _log_on_disk(folder / "log.txt") as log:
        with log.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, env={**share, **os.environ}
            )
            while process.poll() is None:
                if stop.wait(0.1):
                    process.terminate()
                    process.wait()
        last_line = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
    return process.returncode, last_line


@contextlib.contextmanager
def _log_on_disk(path: epath.Path) -> Iterator[pathlib.Path]:
    """Give a file that a process can write its log to; one in a bucket is copied in the end."""
    if not in_bucket(path):
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory() as scratch:
        log = pathlib.Path(scratch, path.name)
        if path.exists():
            log.write_bytes(path.read_bytes())
        try:
            yield log
        finally:
            path.write_bytes(log.read_bytes())


def best_loss(workdir: str) -> tuple[str, float, int]:
    """Return what kind of loss a run is judged by, the loss, and its step.

    That is the best one of its validation or, where it had none, the last one of its training.
    """
    lines = [line for line in RunFolder(workdir).metrics() if line.get("loss") is not None]
    valid = [(line["loss"], line["step"]) for line in lines if line["split"] == "valid"]
    if valid:
        return "best validation", *min(valid)
    last = [line for line in lines if line["split"] == "train"][-1]
    return "last training", last["loss"], last["step"]


def figure_of(rows: Sequence[Row]) -> Any:
    """Return a figure of the loss against the first key of the grid, a line for each setting of
    the others.
    """
    figure, [axes] = new_grid(1, 1, (7, 4.5))
    key, *other_keys = rows[0].point
    values = list(dict.fromkeys(row.point[key] for row in rows))
    # The points of each line, by the values of the other keys.
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        value, *others = row.point.values()
        loss = math.nan if row.loss is None else row.loss
        lines.setdefault(", ".join(others), []).append((values.index(value), loss))
    for number, (label, points) in enumerate(lines.items()):
        places, losses = zip(*points, strict=True)
        style = line_style(number)
        axes.plot(places, losses, marker="o", label=plain(label) or "loss", **style)

    # Values are as far apart as their neighbours, whatever they are: text, or powers of ten. About
    # 70 letters have room below the axis, so a long value takes several rows.
    most_letters = max(6, 70 // len(values))
    labels = [textwrap.fill(plain(value), most_letters) for value in values]
    axes.set_xticks(range(len(values)), labels)
    axes.set_xlim(-0.2, len(values) - 0.8)
    axes.set(xlabel=key, ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    add_legend_below(figure, axes, title=", ".join(other_keys))
    return figure
