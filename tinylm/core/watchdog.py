"""A thread that ends a job which no longer moves, and says which process is to blame.

JAX finds dead processes, not those that are alive but stuck, and a collective waits for ever. So
each process writes a sign of life into JAX's key-value store every second, and watches:

    start --beat()--> watching --close()--> closed: peers expect no more signs of life
                       |    ^
                       |    +--patient()--> compiling, saving: ten times the limit
                       |
                       +-- no step boundary within train.hang_secs --> overdue    tells its peers
                       +-- no new sign of life of a process ---------> silent     tells its peers
                       +-- the store, on process 0, doesn't answer --> lost
                       +-- a peer has told that it gives up ---------> following

The four on the right print one line and the stacks of all threads, and exit with code 4. Process 0
looks at the signs of life of all, the others at those of process 0 alone.

Time counts in polls, so that a process which was itself stopped for a while blames nobody.
"""

import collections
import contextlib
import dataclasses
import faulthandler
import itertools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax

from tinylm.core import buckets
from tinylm.core.agreement import client
from tinylm.core.distributed import host, speaker
from tinylm.core.errors import HangError
from tinylm.core.log import say
from tinylm.core.vitals import Vitals

POLL_SECS = 1.0
# Without any sign of life.
SILENT_SECS = 15.0
# A section that compiles, or takes long by its nature, may take this many times the limit.
_PATIENCE = 10
# Seconds of host time a step above twice the median.
_STRAGGLES_SECS = 0.1
# Keys of JAX's key-value store.
_GIVEN_UP = "tinylm/given_up/"
_ALIVE = "tinylm/alive/"
# The number of polls in a sign of life of a process that has closed its watchdog.
_CLOSED = -1


@dataclasses.dataclass(frozen=True)
class _SignOfLife:
    """What a process tells of itself: how often it has polled, and where it stands."""

    polls: int
    step: int
    secs: float  # host time of a step
    host: str
    waits: bool = False  # for a bucket that fails
    vitals: Vitals = Vitals()


@dataclasses.dataclass
class _Silence:
    """For how long a process has shown the same number of polls."""

    polls: int = 0
    secs: float = 0.0


class Watchdog:
    """Watches from the first `beat` to `close`; with a `limit_secs` of 0 it only tells vitals."""

    def __init__(self, limit_secs: float):
        """Start the threads, where there is anything to watch."""
        self._limit_secs = limit_secs
        self._step = -1
        self._patience = 1
        # Seconds since the last step boundary.
        self._overdue_secs = 0.0
        self._vitals = Vitals()
        # Of the last steps; their median counts, so that one slow step makes no straggler.
        self._host_secs = collections.deque([0.0], maxlen=5)
        self._closed = threading.Event()

        # The exchange's thread writes these two, and the watching thread reads them: the latest
        # signs of life, and whether the store has answered since the last poll.
        self._signs: dict[int, _SignOfLife] = {}
        self._answered = False
        self._silences: dict[int, _Silence] = {}
        self._stragglers: set[int] = set()

        self._client: Any = None
        if jax.process_count() > 1:
            self._client = client()
        if limit_secs > 0:
            threading.Thread(target=self._watch, daemon=True).start()
        if self._client is not None:
            threading.Thread(target=self._exchange, daemon=True).start()

    def beat(self, step: int, host_secs: float) -> None:
        """Note a step boundary, and how long the host took for a step, without its waiting for the
        device.
        """
        self._step = step
        self._overdue_secs = 0.0
        self._host_secs.append(host_secs)

    def tell(self, vitals: Vitals) -> None:
        """Let process 0 know what this process measures of itself, within some POLL_SECS."""
        self._vitals = vitals

    def told(self) -> dict[int, tuple[str, Vitals]]:
        """Return the host and the vitals of each process that has told them; all on process 0."""
        signs = {process: sign for process, sign in self._signs.items() if sign.step >= 0}
        found = {process: (sign.host, sign.vitals) for process, sign in signs.items()}
        # Our own are known as they are now.
        return {**found, jax.process_index(): (host(), self._vitals)}

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Give what is done inside more time, until it ends or raises.

        A run goes on after some errors, such as those of a sample, and is then watched as before.
        """
        self._patience = _PATIENCE
        self._overdue_secs = 0.0
        try:
            yield
        finally:
            self._patience = 1
            self._overdue_secs = 0.0

    def close(self) -> None:
        """End; peers no longer expect signs of life."""
        self._closed.set()

    def _watch(self) -> None:
        """Poll until closed, and give up where this process or a peer no longer moves."""
        last = time.monotonic()
        unanswered_secs = 0.0
        while not self._closed.wait(POLL_SECS):
            # A process that was stopped finds that much time has passed, in which it has not looked
            # at anybody: at most two polls count.
            now = time.monotonic()
            passed = min(now - last, 2 * POLL_SECS)
            last = now

            signs = self._signs
            waits = buckets.is_waiting() or any(sign.waits for sign in signs.values())
            # Before the first step nothing is overdue, nor while a process waits for a bucket that
            # fails: that has a limit of its own.
            if self._step >= 0 and not waits:
                self._overdue_secs += passed

            if self._client and not self._answered:
                unanswered_secs += passed
            else:
                unanswered_secs = 0.0
            self._answered = False
            if unanswered_secs > SILENT_SECS:
                self._give_up(
                    "process 0, which carries the job, gives no sign of life: it is stopped or "
                    "lost",
                    tell=False,
                )
            # While the store doesn't answer, the signs of life are old ones.
            if not unanswered_secs:
                self._look_for_silence(signs, passed)
                self._look_for_stragglers(signs)
            if self._overdue_secs > self._limit_secs * self._patience:
                self._give_up(
                    f"no step for {self._overdue_secs:.0f} s after step {self._step} "
                    f"(train.hang_secs){_blame(signs)}"
                )

    def _exchange(self) -> None:
        """Publish our signs of life, and read those that this process watches.

        On a thread of its own, for the store may block.
        """
        for polls in itertools.count(1):
            # The first sign of life is published at once.
            ended = polls > 1 and self._closed.wait(POLL_SECS)
            with contextlib.suppress(RuntimeError):
                self._publish(_CLOSED if ended else polls)
                given_up = self._client.key_value_dir_get(_GIVEN_UP)
                if given_up:
                    _, line = given_up[0]
                    self._give_up(f"following a peer: {line}", tell=False)
                self._signs = self._read_signs()
                self._answered = True
            if ended:
                return

    def _publish(self, polls: int) -> None:
        """Write our sign of life into the store."""
        sign = _SignOfLife(
            polls=polls,
            step=self._step,
            secs=statistics.median(self._host_secs),
            host=host(),
            waits=buckets.is_waiting(),
            vitals=self._vitals,
        )
        key = f"{_ALIVE}{jax.process_index()}/"
        self._client.key_value_set(key, json.dumps(dataclasses.asdict(sign)), allow_overwrite=True)

    def _read_signs(self) -> dict[int, _SignOfLife]:
        """Return the signs of life by process: on process 0 of all, elsewhere of process 0 alone.

        So the traffic grows with the processes, not with their square. A process that is half
        overdue reads all of them, to know who is furthest behind.
        """
        reads_all = jax.process_index() == 0 or self._overdue_secs > self._limit_secs / 2
        folder = _ALIVE if reads_all else f"{_ALIVE}0/"
        signs = {}
        for key, value in self._client.key_value_dir_get(folder):
            process = int(key.removeprefix(_ALIVE).split("/")[0])
            sign = json.loads(value)
            signs[process] = _SignOfLife(**{**sign, "vitals": Vitals(*sign["vitals"])})
        return signs

    def _look_for_silence(self, signs: dict[int, _SignOfLife], passed: float) -> None:
        """Give up where a process has shown no new sign of life for SILENT_SECS.

        Args:
          signs: the latest of each process.
          passed: seconds since the last look.
        """
        for process, sign in signs.items():
            silence = self._silences.setdefault(process, _Silence())
            if silence.polls == sign.polls:
                silence.secs += passed
            else:
                silence.polls = sign.polls
                silence.secs = 0.0
            if sign.polls != _CLOSED and silence.secs > SILENT_SECS:
                self._give_up(
                    f"{_name(process, sign)} gives no sign of life: it is stopped, or its machine "
                    "is gone"
                )

    def _look_for_stragglers(self, signs: dict[int, _SignOfLife]) -> None:
        """Warn, once, of each process that takes more than twice the usual time of its host."""
        if not signs:
            return
        usual = statistics.median_low(sign.secs for sign in signs.values())
        for process, sign in signs.items():
            is_slow = sign.secs > 2 * usual + _STRAGGLES_SECS
            if is_slow and process not in self._stragglers:
                self._stragglers.add(process)
                say(
                    f"warning: {_name(process, sign)} is slow: its host takes {sign.secs:.2f} s a "
                    f"step, others {usual:.2f} s"
                )

    def _give_up(self, line: str, tell: bool = True) -> None:
        """End this process with one line and the stacks of its threads.

        Its peers follow where it is the first to `tell` them.
        """
        print(f"error: {speaker()}{line}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if self._client and tell:
            with contextlib.suppress(RuntimeError):
                self._client.key_value_set(f"{_GIVEN_UP}by", line, allow_overwrite=True)
            # Process 0 carries the store, so it stays until the others have read the line.
            if jax.process_index() == 0:
                time.sleep(2 * POLL_SECS)
        os._exit(HangError.exit_code)


def _blame(signs: dict[int, _SignOfLife]) -> str:
    """Return "; furthest behind is process 1 (host a)", or nothing in a job of one process."""
    if not signs:
        return ""
    process = min(signs, key=lambda number: signs[number].step)
    return f"; furthest behind is {_name(process, signs[process])}"


def _name(process: int, sign: _SignOfLife) -> str:
    """Return a process in words: its number and its host."""
    return f"process {process} ({sign.host})"
