"""Trackers: a run's metrics, samples and plot in TensorBoard's event files and in Weights & Biases.

A tracker may hang, fill a disk or lose its network; the run must not notice. A thread of process 0
makes every call, fed by a queue that the loop never waits for; a tracker that raises is dropped
with one line, and metrics.jsonl has all.

A tracker is a generator that is sent (kind, step, what): `scalars` by name, samples as `text`, a
`picture` by its path.
"""

import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from etils import epath

from tinylm.core.distributed import is_main
from tinylm.core.log import say
from tinylm.core.optional import optional_module
from tinylm.core.settings import settings_of
from tinylm.run.folder import RunFolder

CLOSE_SECS = 60.0
HURRY_SECS = 5.0  # where the run was asked to stop
Tracker = Generator[None, Any, None]


def tensorboard(
    module: Any, folder: RunFolder, settings: dict[str, Any], first_step: int
) -> Tracker:
    """Write event files, without TensorFlow; those of earlier processes are hidden from
    `first_step` on.
    """
    writer = module.SummaryWriter(
        str(folder.path / "tensorboard"),
        purge_step=first_step,
        flush_secs=10,
        filename_suffix=f".{first_step}",
    )
    writer.add_text("config", f"```json\n{json.dumps(settings, indent=2)}\n```", first_step)
    plain = {
        key: value if isinstance(value, bool | int | float) else str(value)
        for key, value in settings.items()
    }
    for summary in module.summary.hparams(plain, {"valid/loss": 0.0}):
        writer.file_writer.add_summary(summary)
    try:
        while True:
            kind, step, what = yield
            if kind == "text":
                writer.add_text("samples", "\n\n---\n\n".join(what), step)
            elif kind == "picture":
                writer.add_image("loss", pixels(what), step, dataformats="HWC")
            else:
                for name, value in what.items():
                    writer.add_scalar(name, value, step)
    finally:
        writer.close()


def wandb(module: Any, folder: RunFolder, settings: dict[str, Any], first_step: int) -> Tracker:
    """Write to the run whose id is kept in the folder; WANDB_MODE=offline needs no network."""
    id_file = folder.path / "wandb_id"
    if not id_file.exists():
        folder.write(id_file, uuid.uuid4().hex[:12])
    run = module.init(
        project=os.environ.get("WANDB_PROJECT", "tinylm"),
        name=folder.path.name,
        id=id_file.read_text(encoding="utf-8"),
        resume="allow",
        config=settings,
        settings=module.Settings(silent=True, console="off", login_timeout=1),
        dir=None if "://" in str(folder.path) else str(folder.path),
    )
    try:
        while True:
            kind, step, what = yield
            if kind == "text":
                what = {"samples": module.Table(["step", "text"], [[step, text] for text in what])}
            run.log({"loss": module.Image(pixels(what))} if kind == "picture" else what, step=step)
    finally:
        run.finish()


def pixels(path: str) -> np.ndarray:
    """Return the colours of a PNG on a disk or in a bucket, from 0 to 255."""
    from matplotlib.image import imread

    with epath.Path(path).open("rb") as file:
        return np.round(imread(file)[..., :3] * 255).astype(np.uint8)


KINDS: dict[str, tuple[Callable, str]] = {
    "tensorboard": (tensorboard, "tensorboardX"),
    "wandb": (wandb, "wandb"),
}


class Trackers:
    """The trackers that the config asks for, behind one queue; none on processes other than 0."""

    def __init__(self, config: Any, folder: RunFolder):
        """Take a whole Config; raise UserError where a tracker's package is missing."""
        settings = {key: value for key, _, value in settings_of(config)}
        wanted = [name for name in KINDS if getattr(config.writers, name) and is_main()]
        self._makers = {
            name: (KINDS[name][0], optional_module(KINDS[name][1], name)) for name in wanted
        }
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(folder, settings), daemon=True)
        self._thread.start()

    def put(self, kind: str, step: int, what: Any) -> None:
        """Hand something over, without waiting."""
        self._queue.put((kind, step, what))

    def record(self, record: dict[str, Any]) -> None:
        """Hand a line of metrics.jsonl over: its numbers, under the name of its split."""
        values = {
            f"{record['split']}/{name}": value
            for name, value in record.items()
            if isinstance(value, int | float) and name != "step"
        }
        self.put("scalars", record["step"], values)

    def close(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Wait until all is written, for a while; only HURRY_SECS from when `hurry()` is true."""
        self._queue.put(None)
        start = time.monotonic()
        end = start + CLOSE_SECS
        while self._thread.is_alive() and time.monotonic() < end:
            self._thread.join(0.1)
            if hurry():
                end = min(end, time.monotonic() + HURRY_SECS)
                hurry = bool
        if self._thread.is_alive():
            waited = time.monotonic() - start
            say(
                f"{' and '.join(self._makers)} did not finish within {waited:.0f} s; metrics.jsonl "
                "has all."
            )

    def _work(self, folder: RunFolder, settings: dict[str, Any]) -> None:
        live: dict[str, Tracker] = {}
        message: Any = ...
        while message is not None:
            message = self._queue.get()
            for name, (maker, module) in list(self._makers.items()):
                try:
                    if message and name not in live:
                        live[name] = maker(module, folder, settings, message[1])
                        next(live[name])
                    if message:
                        live[name].send(message)
                    elif name in live:
                        live[name].close()
                except Exception as error:  # whatever a library of others raises
                    self._makers.pop(name)
                    said = " ".join(str(error).split())[:200]
                    say(f"{name} is dropped, it failed with: {said}; metrics.jsonl has all.")
