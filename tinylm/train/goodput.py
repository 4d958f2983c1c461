"""Where the time of a run went: what taught the model, and what was lost to all else.

Time is lost to start-up, compilation, waiting for data, evaluation, samples and saving, and to
steps that are taken again (after a kill, those since the last checkpoint; bad steps too). All else
is productive. Each process of a run adds its account to metrics.jsonl at every save and at its end
(`split` is `time`); goodput is the productive part over all.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from tinylm import STARTED
from tinylm.run.folder import RunFolder

KINDS = ("start", "compile", "data", "eval", "sample", "save", "lost")


class Account:
    """The account of one process, from its start on; `redo_until` is the last step that was taken
    before.
    """

    def __init__(self, folder: RunFolder):
        """Read what processes before this one noted."""
        lines = list(folder.lines())
        self.redo_until = max(
            (line["step"] for line in lines if line.get("split") == "train"), default=0
        )
        self._before = {line.get("process"): line for line in lines if line.get("split") == "time"}
        self.secs = dict.fromkeys(KINDS, 0.0)
        self.secs["start"] = self._mark = time.monotonic() - STARTED
        self._booked = self._booked_at_mark = 0.0
        self._process = round(time.time() - self._mark, 3)

    @contextlib.contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """Book the time spent inside; of phases inside one another the outer counts."""
        start, before = time.monotonic(), self._booked
        try:
            yield
        finally:
            spent = time.monotonic() - start - (self._booked - before)
            self.secs[kind] += spent
            self._booked += spent

    def lap(self, lost: bool) -> None:
        """Book the training since the last lap as lost where it had been done before, or was in
        vain.
        """
        now = time.monotonic() - STARTED
        if lost:
            self.secs["lost"] += max(0.0, now - self._mark - (self._booked - self._booked_at_mark))
        self._mark, self._booked_at_mark = now, self._booked

    def record(self, step: int) -> dict[str, Any]:
        """Return the line for metrics.jsonl."""
        total = time.monotonic() - STARTED
        parts = {"train": total - sum(self.secs.values()), **self.secs}
        secs = {f"{name}_secs": round(value, 3) for name, value in parts.items()}
        return {
            "step": step,
            "split": "time",
            "process": self._process,
            "total_secs": round(total, 3),
            **secs,
        }

    def summary(self, step: int) -> str:
        """Return goodput over all processes of the run, and where the rest went."""
        records = [*{**self._before, self._process: self.record(step)}.values()]
        sums = {
            name: sum(record.get(f"{name}_secs", 0.0) for record in records)
            for name in ("total", "train", *KINDS)
        }
        rest = ", ".join(f"{name} {sums[name]:.0f} s" for name in KINDS if sums[name] >= 0.5)
        return (
            f"Goodput {sums['train'] / sums['total']:.0%} of {sums['total']:.0f} s; the rest: "
            f"{rest or 'nothing'}."
        )
