"""Where the time of a run goes: how fast it trains, and what is lost to other things.

Time is lost to start-up, compilation, waiting for data, evaluation, samples and saving, and to
steps that are taken again: after a kill those since the last checkpoint, and bad steps. All the
rest is productive; goodput is the productive part of all time. Each process of a run writes its
account into metrics.jsonl at every save and at its end (`split` is `time`).
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from tinylm import STARTED
from tinylm.run.folder import RunFolder

KINDS = ("start", "compile", "data", "eval", "sample", "save", "lost")

# Shorter times are left out of the summary.
_LEAST_SECS = 0.5


class Clock:
    """The time of one process, from its start on. Times are seconds since then."""

    def __init__(self, folder: RunFolder):
        """Read what the processes before this one noted in the run's folder."""
        # Steps up to this one were taken before, so taking them again teaches nothing new.
        self.redo_until = 0
        self._accounts_before: dict[Any, dict[str, Any]] = {}
        for line in folder.lines():
            if line.get("split") == "train":
                self.redo_until = max(self.redo_until, line["step"])
            elif line.get("split") == "time":
                self._accounts_before[line.get("process")] = line
        now = self._now()
        self._secs = dict.fromkeys(KINDS, 0.0)
        self._secs["start"] = now
        # Names this process in metrics.jsonl: when it started, by the clock on the wall.
        self._process = round(time.time() - now, 3)
        # All time spent in phases so far, and at the last lap.
        self._in_phases = 0.0
        self._in_phases_at_lap = 0.0
        self._lap_at = now
        # From where the rate is measured; the time moves on with everything that isn't training.
        self._rate_step = 0
        self._rate_from = now

    @staticmethod
    def _now() -> float:
        return time.monotonic() - STARTED

    @contextlib.contextmanager
    def phase(self, kind: str) -> Iterator[None]:
        """Book the time spent inside as `kind`; of phases in one another each books its own part.

        Only waiting for data counts in the rate of training.
        """
        start = self._now()
        in_phases_before = self._in_phases
        try:
            yield
        finally:
            spent = self._now() - start
            in_inner_phases = self._in_phases - in_phases_before
            own = spent - in_inner_phases
            self._secs[kind] += own
            self._in_phases += own
            if kind != "data":
                self._rate_from += own

    def lap(self, lost: bool) -> None:
        """End a step: where it was `lost`, book the training since the last one as such."""
        now = self._now()
        in_phases = self._in_phases - self._in_phases_at_lap
        if lost:
            self._secs["lost"] += max(0.0, now - self._lap_at - in_phases)
        self._lap_at = now
        self._in_phases_at_lap = self._in_phases

    def restart_rate(self, step: int) -> None:
        """Measure the rate from `step` and now on."""
        self._rate_step = step
        self._rate_from = self._now()

    def tokens_per_sec(self, step: int, tokens_per_step: int) -> float:
        """Return the rate of training since the last call."""
        num_tokens = (step - self._rate_step) * tokens_per_step
        secs = self._now() - self._rate_from
        self.restart_rate(step)
        return num_tokens / max(secs, 1e-9)

    def record(self, step: int) -> dict[str, Any]:
        """Return the account up to `step`, as a line for metrics.jsonl."""
        total_secs = self._now()
        productive_secs = total_secs - sum(self._secs.values())
        line = {
            "step": step,
            "split": "time",
            "process": self._process,
            "total_secs": round(total_secs, 3),
            "train_secs": round(productive_secs, 3),
        }
        for kind, secs in self._secs.items():
            line[f"{kind}_secs"] = round(secs, 3)
        return line

    def summary(self, step: int) -> str:
        """Return goodput over all processes of the run, and where the rest went."""
        accounts = {**self._accounts_before, self._process: self.record(step)}

        def total(kind: str) -> float:
            return sum(account.get(f"{kind}_secs", 0.0) for account in accounts.values())

        rest = [f"{kind} {total(kind):.0f} s" for kind in KINDS if total(kind) >= _LEAST_SECS]
        goodput = total("train") / total("total")
        return (
            f"Goodput {goodput:.0%} of {total('total'):.0f} s; the rest: "
            f"{', '.join(rest) or 'nothing'}."
        )
