"""Being asked to stop: SIGTERM (preemption) and Ctrl-C end a run at the next step boundary, saved.

One process notes the signal itself. Several must stop at the same step, so there JAX's coordination service carries
the SIGTERM of any of them to all, and names the step.
"""

import signal
from types import FrameType

import jax


class StopRequest:
    """Notes signals from its making on; a second Ctrl-C ends the program at once."""

    def __init__(self) -> None:
        """Install the handlers where one process decides alone."""
        self._signal: int | None = None
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def reached(self, step: int) -> bool:
        """Say whether the run is to stop at `step`; every process must ask at every boundary."""
        if jax.process_count() == 1:
            return self._signal is not None
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
