"""How far the run is: a bar on a terminal, plain lines elsewhere, and the rate since the last
line.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator

from tinylm.core.distributed import is_main
from tinylm.core.log import say

_SECS_BETWEEN_LINES = 5.0


@dataclasses.dataclass
class Outcome:
    """How a run ended."""

    step: int
    loss: float | None  # last training loss logged, nats per target token
    valid_loss: float | None  # of the last evaluation
    best_loss: float
    seconds: float
    reason: str


class Progress:
    """Shows steps as they are done. Time spent outside training (`pause`) doesn't count in the
    rate.
    """

    def __init__(self, first_step: int, last_step: int):
        """Begin at `first_step`."""
        self._last_step = last_step
        self.restart(first_step)
        self._shown = 0.0
        self._bar = None
        if sys.stderr.isatty() and is_main():
            from tqdm import tqdm

            self._bar = tqdm(
                total=last_step,
                initial=first_step,
                unit="step",
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def restart(self, step: int) -> None:
        """Measure the rate from `step` and now on."""
        self._mark_step, self._mark_time = step, time.perf_counter()

    def tokens_per_sec(self, step: int, tokens_per_step: int) -> float:
        """Return the rate since the last call, tokens a second."""
        now = time.perf_counter()
        rate = (step - self._mark_step) * tokens_per_step / max(now - self._mark_time, 1e-9)
        self._mark_step, self._mark_time = step, now
        return rate

    def show(self, step: int, text: str, tokens_per_sec: float, valid_loss: float | None) -> None:
        """Show the metrics of a step: on the bar, or as a line every few seconds."""
        valid = "" if valid_loss is None else f", valid {valid_loss:.4f}"
        if self._bar is not None:
            with self._on_terminal():
                self._bar.set_postfix_str(
                    f"{text}{valid}, {tokens_per_sec:,.0f} tokens/s", refresh=False
                )
                self._bar.update(step - self._bar.n)
        elif time.perf_counter() - self._shown > _SECS_BETWEEN_LINES or step >= self._last_step:
            self._shown = time.perf_counter()
            say(f"step {step}/{self._last_step}  {text}  {tokens_per_sec:,.0f} tokens/s")

    def note(self, line: str) -> None:
        """Show a line that stays."""
        if self._bar is None:
            say(line)
        else:
            with self._on_terminal():
                self._bar.write(line, file=sys.stderr)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time spent inside out of the rate."""
        start = time.perf_counter()
        yield
        self._mark_time += time.perf_counter() - start

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            with self._on_terminal():
                self._bar.close()

    @contextlib.contextmanager
    def _on_terminal(self) -> Iterator[None]:
        """Do without the bar from here on where its terminal is gone: training goes on."""
        try:
            yield
        except OSError:
            self._bar = None
