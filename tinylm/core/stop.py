"""Being asked to stop: SIGTERM (preemption) and Ctrl-C end a run at the next step boundary, saved.

One process notes the signal itself. Several must stop at the same point, so there JAX's coordination service carries
the SIGTERM of any of them to all, and names the point. Before anything was trained there is nothing to save: the
program ends at once, also while JAX compiles, when Python can't run handlers: a thread reads the signal's number from
a pipe, into which the system's handler writes.
"""

import os
import signal
import sys
import threading

import jax

from tinylm.core.errors import Preempted


class StopRequest:
    """Notes signals from its making on; a second Ctrl-C ends the program at once."""

    def __init__(self) -> None:
        """Install the handlers where one process decides alone."""
        self.nothing_to_save, self._stopping, self._asked = True, False, 0
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note)
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
            threading.Thread(target=self._leave_at_once, args=(reader,), daemon=True).start()

    def _note(self, *_) -> None:
        self._stopping = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _leave_at_once(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] in (signal.SIGTERM, signal.SIGINT) and self.nothing_to_save:
                print("error: asked to stop before anything was trained; nothing is lost.", file=sys.stderr, flush=True)
                os._exit(Preempted.exit_code)

    def reached(self) -> bool:
        """Say whether the run is to stop here; every process must ask equally often."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            self._asked += 1
            self._stopping = self._stopping or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._stopping

    def check(self) -> None:
        """Raise Preempted where the run is to stop here."""
        if self.reached():
            raise Preempted("asked to stop")
