"""Trackers: a run's metrics, samples and plot in TensorBoard's event files and in Weights & Biases.

A tracker may hang, fill a disk or lose its network; the run must not notice: a thread of process 0 makes every call,
fed by a queue that the loop never waits for; a tracker that raises is dropped with one line, and metrics.jsonl has all.
"""

import json
import os
import queue
import threading
import uuid
from collections.abc import Callable
from typing import Any

from tinylm.core.distributed import is_main
from tinylm.core.log import say
from tinylm.core.optional import optional_module
from tinylm.core.settings import settings_of
from tinylm.run.folder import RunFolder

CLOSE_SECS = 60.0
Settings = dict[str, Any]


class TensorBoard:
    """Event files in the run's folder, written without TensorFlow."""

    def __init__(self, module: Any, folder: RunFolder, settings: Settings, step: int):
        """Write hyperparameters; what an earlier process wrote from `step` on is hidden, since it comes again."""
        self._writer = module.SummaryWriter(
            str(folder.path / "tensorboard"), purge_step=step, flush_secs=10, filename_suffix=f".{step}"
        )
        self._writer.add_text("config", f"```json\n{json.dumps(settings, indent=2)}\n```", step)
        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}
        for summary in module.summary.hparams(plain, {"valid/loss": 0.0}):
            self._writer.file_writer.add_summary(summary)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write numbers by name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, texts: list[str]) -> None:
        """Write samples."""
        self._writer.add_text("samples", "\n\n---\n\n".join(texts), step)

    def picture(self, step: int, path: str) -> None:
        """Write a PNG."""
        from matplotlib.image import imread

        self._writer.add_image("loss", imread(path)[..., :3], step, dataformats="HWC")

    def close(self) -> None:
        """Flush and end."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases, resumed under the same id; WANDB_MODE=offline needs no network."""

    def __init__(self, module: Any, folder: RunFolder, settings: Settings, step: int):
        """Begin, or go on with, the run whose id is kept in the folder."""
        self._wandb, id_file = module, folder.path / "wandb_id"
        if not id_file.exists():
            folder.write(id_file, uuid.uuid4().hex[:12])
        local = {} if "://" in str(folder.path) else {"dir": str(folder.path)}
        self._run = module.init(
            project=os.environ.get("WANDB_PROJECT", "tinylm"), name=folder.path.name, id=id_file.read_text(),
            resume="allow", config=settings, settings=module.Settings(silent=True, console="off", login_timeout=1),
            **local,
        )  # fmt: skip

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write numbers by name."""
        self._run.log(values, step=step)

    def text(self, step: int, texts: list[str]) -> None:
        """Write samples as a table."""
        self._run.log({"samples": self._wandb.Table(["step", "text"], [[step, text] for text in texts])}, step=step)

    def picture(self, step: int, path: str) -> None:
        """Write a PNG."""
        self._run.log({"loss": self._wandb.Image(path)}, step=step)

    def close(self) -> None:
        """Flush and end."""
        self._run.finish()


KINDS: dict[str, tuple[Callable, str]] = {"tensorboard": (TensorBoard, "tensorboardX"), "wandb": (WandB, "wandb")}


class Trackers:
    """The trackers that the config asks for, behind one queue; none on processes other than 0."""

    def __init__(self, config: Any, folder: RunFolder):
        """Take a whole Config; raise UserError where a tracker's package is missing."""
        settings = {key: value for key, _, value in settings_of(config)}
        self._live: dict[str, Any] = {}
        self._makers = {}
        for name, (kind, package) in KINDS.items():
            if getattr(config.writers, name) and is_main():
                self._makers[name] = (kind, optional_module(package, name), folder, settings)
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True) if self._makers else None
        if self._thread:
            self._thread.start()

    def put(self, method: str, step: int, what: Any) -> None:
        """Hand `scalars`, `text` or a `picture` over, without waiting."""
        if self._thread:
            self._queue.put((method, step, what))

    def record(self, record: dict[str, Any]) -> None:
        """Hand a line of metrics.jsonl over: its numbers, under the name of its split."""
        values = {f"{record['split']}/{name}": value for name, value in record.items()
                  if isinstance(value, int | float) and name != "step"}  # fmt: skip
        self.put("scalars", record["step"], values)

    def close(self) -> None:
        """Wait until all is written, for a while."""
        if self._thread:
            self._queue.put(None)
            self._thread.join(CLOSE_SECS)
            if self._thread.is_alive():
                say(f"{' and '.join(self._makers)} did not finish within {CLOSE_SECS:.0f} s; metrics.jsonl has all.")

    def _work(self) -> None:
        while message := self._queue.get():
            for name in list(self._makers):
                self._call(name, *message)
        for name in list(self._live):
            self._call(name, "close")

    def _call(self, name: str, method: str, *arguments: Any) -> None:
        """Call a tracker, made at its first message; one that raises is dropped."""
        try:
            if name not in self._live:
                kind, *parts = self._makers[name]
                self._live[name] = kind(*parts, arguments[0])
            getattr(self._live[name], method)(*arguments)
        except Exception as error:  # whatever a library of others raises
            self._makers.pop(name, None)
            self._live.pop(name, None)
            say(f"{name} is dropped, it failed with: {' '.join(str(error).split())[:200]}; metrics.jsonl has all.")
