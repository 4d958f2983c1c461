"""Preemption: asked to stop by a terminal or a scheduler, a run ends saved, at a step boundary.

One process notes the signal itself. Several must stop at the same point, so there JAX's
coordination service carries the SIGTERM of any of them to all, and names the point; other signals
are passed on to it as SIGTERM. Before anything was trained there is nothing to save, and the
program ends at once. It does so also while JAX compiles or a process waits for another, when Python
can't run handlers: a thread reads the signal's number from a pipe, into which the system's handler
writes.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator

import jax

from tinylm.core.errors import Preempted
from tinylm.core.signals import SIGNALS, is_ignored


class StopRequest:
    """Notes signals from when it is made; a second Ctrl-C ends the program at once.

    Attributes:
      nothing_to_save: while it holds, a signal ends the program; the loop clears it.
      signalled: this process got a signal, which in a job of several doesn't yet mean that the run
        stops.
    """

    def __init__(self) -> None:
        """Install the handlers."""
        self.nothing_to_save = True
        self.signalled = False
        self._stopping = False
        # How often `reached` was called: the number of the point at which all ask.
        self._asked = 0
        # Whether a signal raises Preempted at once.
        self._interrupts = False
        self._alone = jax.process_count() == 1
        # Python lets the main thread alone install handlers.
        if threading.current_thread() is not threading.main_thread():
            return
        self._handler_of_jax = _CHandler(signal.SIGTERM)
        for number in SIGNALS:
            if not is_ignored(number):
                signal.signal(number, self._note)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._act_at_once, args=(reader,), daemon=True).start()

    def _note(self, *_: object) -> None:
        """Handle a signal: Python calls this in the main thread, between two of its
        instructions.
        """
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.signalled = True
        if self._alone:
            self._stopping = True
            if self._interrupts:
                self._interrupts = False
                raise Preempted("asked to stop")

    def _act_at_once(self, reader: int) -> None:
        """Do what can't wait for the main thread."""
        while number := os.read(reader, 1):
            if number[0] not in SIGNALS:
                continue
            if self.nothing_to_save:
                line = "error: asked to stop before anything was trained; nothing is lost."
                # The terminal may be gone.
                with contextlib.suppress(OSError):
                    print(line, file=sys.stderr, flush=True)
                os._exit(Preempted.exit_code)
            if not self._alone:
                self._handler_of_jax.restore()
                os.kill(os.getpid(), signal.SIGTERM)

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Have a signal raise Preempted inside, at once, where this process decides alone."""
        self._interrupts = True
        try:
            if self._alone:
                self.check()
            yield
        finally:
            self._interrupts = False

    def reached(self) -> bool:
        """Say whether the run is to stop here; every process must ask equally often."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            self._asked += 1
            if not self._stopping:
                self._stopping = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._stopping

    def check(self) -> None:
        """Raise Preempted where the run is to stop here."""
        if self.reached():
            raise Preempted("asked to stop")


class _CHandler:
    """A handler that C++ installed, which Python's own module can neither return nor restore."""

    def __init__(self, number: int) -> None:
        """Read the handler that a signal has now."""
        self._number = number
        # More than any system's struct sigaction.
        self._action = ctypes.create_string_buffer(1024)
        ctypes.CDLL(None).sigaction(number, None, self._action)

    def restore(self) -> None:
        """Put the handler back."""
        ctypes.CDLL(None).sigaction(self._number, self._action, None)
