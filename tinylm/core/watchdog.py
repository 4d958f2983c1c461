"""A thread that ends a job which no longer moves, and says which process is to blame.

JAX finds dead processes, not those that are alive but stuck, and a collective waits for ever. So
each process writes its sign of life into JAX's key-value store every second: its step, and its
host's time a step. Where a process passes no step boundary within the limit, it names who is
behind, dumps the stacks of all its threads and exits; where another shows no sign of life at all
(stopped, its machine gone), process 0 does, and all watch process 0. Who sees that one has given up
follows. Time counts in polls, so that a process which was itself stopped blames nobody.
"""

import collections
import contextlib
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

from tinylm.core import distributed
from tinylm.core.distributed import host
from tinylm.core.errors import HangError
from tinylm.core.log import say

POLL_SECS = 1.0
SILENT_SECS = 15.0  # without any sign of life
_PATIENCE = (
    10  # a section that compiles, or takes long by its nature, may take this many times the limit
)
_STRAGGLES = 0.1  # seconds of host time a step above twice the median


class Watchdog:
    """Watches from the first `beat` to `close`; `limit_secs` 0 watches for nothing."""

    def __init__(self, limit_secs: float):
        """Start the thread, where there is anything to watch."""
        self._limit, self._step, self._slack = limit_secs, -1, 1
        self._host_secs = collections.deque(
            [0.0], maxlen=5
        )  # of which the median counts: one slow step is none
        self._overdue, self._closed = 0.0, threading.Event()
        self._seen: dict[
            int, tuple[int, float]
        ] = {}  # polls of each process, and for how long it has stood there
        self._slow: set[int] = set()
        self._client: Any = distributed.client() if jax.process_count() > 1 else None
        self._beats, self._answered = dict[int, dict](), False
        for work in [self._watch] * (limit_secs > 0) + [self._exchange] * (
            limit_secs > 0 and self._client is not None
        ):
            threading.Thread(target=work, daemon=True).start()

    def beat(self, step: int, host_secs: float) -> None:
        """Note a step boundary, and how long the host took for a step beside waiting for the
        device.
        """
        self._step, self._overdue = step, 0.0
        self._host_secs.append(host_secs)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Give what is done inside more time."""
        self._slack, self._overdue = _PATIENCE, 0.0
        yield
        self._slack, self._overdue = 1, 0.0

    def close(self) -> None:
        """End; peers no longer expect signs of life."""
        self._closed.set()

    def _watch(self) -> None:
        last, unanswered = time.monotonic(), 0.0
        while not self._closed.wait(POLL_SECS):
            now = time.monotonic()
            passed, last = min(now - last, 2 * POLL_SECS), now
            self._overdue += passed if self._step >= 0 else 0
            unanswered = unanswered + passed if self._client and not self._answered else 0.0
            beats, self._answered = self._beats, False
            if unanswered > SILENT_SECS:
                self._give_up(
                    (
                        "process 0, which carries the job, gives no sign of life: it is "
                        "stopped or lost"
                    ),
                    False,
                )
            if not unanswered:
                self._look_at_peers(beats, passed)
            if self._overdue > self._limit * self._slack:
                behind = min(beats, key=lambda p: beats[p]["step"], default=-1)
                blame = f"; furthest behind is {_name(behind, beats)}" if beats else ""
                self._give_up(
                    f"no step for {self._overdue:.0f} s after step {self._step} "
                    f"(train.hang_secs){blame}"
                )

    def _exchange(self) -> None:
        """Publish our signs of life, and read those that this process watches; a thread of its own,
        as it may block.
        """
        for polls in itertools.count(1):
            ended = self._closed.wait(POLL_SECS) if polls > 1 else False
            with contextlib.suppress(RuntimeError):
                self._publish(-1 if ended else polls)
                if given_up := self._client.key_value_dir_get("tinylm/given_up/"):
                    self._give_up(f"following a peer: {given_up[0][1]}", False)
                whose = "" if jax.process_index() == 0 or self._overdue > self._limit / 2 else "0/"
                found = self._client.key_value_dir_get(f"tinylm/alive/{whose}")
                self._beats = {int(key.split("/")[2]): json.loads(value) for key, value in found}
                self._answered = True
            if ended:
                return

    def _publish(self, polls: int) -> None:
        life = {
            "polls": polls,
            "step": self._step,
            "secs": statistics.median(self._host_secs),
            "host": host(),
        }
        self._client.key_value_set(
            f"tinylm/alive/{jax.process_index()}/", json.dumps(life), allow_overwrite=True
        )

    def _look_at_peers(self, beats: dict[int, dict], passed: float) -> None:
        """Give up where one is silent; name a straggler once."""
        usual = statistics.median_low(beat["secs"] for beat in beats.values()) if beats else 0.0
        for process, beat in beats.items():
            polls, silent = self._seen.get(process, (0, 0.0))
            self._seen[process] = (
                beat["polls"],
                silent + passed if polls == beat["polls"] else 0.0,
            )
            if beat["polls"] >= 0 and self._seen[process][1] > SILENT_SECS:
                self._give_up(
                    f"{_name(process, beats)} gives no sign of life: it is stopped, or its "
                    "machine is gone"
                )
            if beat["secs"] > 2 * usual + _STRAGGLES and process not in self._slow:
                self._slow.add(process)
                say(
                    f"warning: {_name(process, beats)} is slow: its host takes "
                    f"{beat['secs']:.2f} s a step, "
                    f"others {usual:.2f} s"
                )

    def _give_up(self, line: str, tell: bool = True) -> None:
        """End this process with one line and the stacks of its threads; its peers follow where they
        are told.
        """
        print(f"error: {distributed.speaker()}{line}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if self._client and tell:
            with contextlib.suppress(RuntimeError):
                self._client.key_value_set("tinylm/given_up/by", line, allow_overwrite=True)
            time.sleep(
                2 * POLL_SECS if jax.process_index() == 0 else 0
            )  # process 0 carries the key-value store
        os._exit(HangError.exit_code)


def _name(process: int, beats: dict[int, dict]) -> str:
    return f"process {process} ({beats[process]['host']})"
