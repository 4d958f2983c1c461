"""Showing how far a run is: a bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Iterator

from tinylm.core.distributed import is_main
from tinylm.core.log import say

_SECS_BETWEEN_LINES = 5.0


class Progress:
    """Shows steps as they are done."""

    def __init__(self, first_step: int, last_step: int):
        """Begin at `first_step`."""
        self._last_step = last_step
        self._shown_at = 0.0
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

    def show(self, step: int, text: str, tokens_per_sec: float, valid_loss: float | None) -> None:
        """Show the metrics of a step: on the bar, or as a line every few seconds."""
        speed = f"{tokens_per_sec:,.0f} tokens/s"
        if self._bar is not None:
            valid = "" if valid_loss is None else f", valid {valid_loss:.4f}"
            with self._unless_terminal_is_gone():
                self._bar.set_postfix_str(f"{text}{valid}, {speed}", refresh=False)
                self._bar.update(step - self._bar.n)
            return
        now = time.perf_counter()
        if now - self._shown_at > _SECS_BETWEEN_LINES or step >= self._last_step:
            self._shown_at = now
            say(f"step {step}/{self._last_step}  {text}  {speed}")

    def note(self, line: str) -> None:
        """Show a line that stays."""
        if self._bar is None:
            say(line)
            return
        with self._unless_terminal_is_gone():
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            with self._unless_terminal_is_gone():
                self._bar.close()

    @contextlib.contextmanager
    def _unless_terminal_is_gone(self) -> Iterator[None]:
        """Do without the bar from here on where its terminal is gone: training goes on."""
        try:
            yield
        except OSError:
            self._bar = None
