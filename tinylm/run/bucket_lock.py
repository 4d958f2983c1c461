"""One run in a workdir at a time, where the workdir is in a bucket: numbered leases.

The holder rewrites its own object every RENEW_SECS, `lock/00007.json`. To follow a lease that was
given free, or that wasn't renewed for WATCH_SECS, a newcomer makes the next one, with the condition
that it isn't there yet (ifGenerationMatch=0 in Google's protocol, If-None-Match: * in S3's), which
the service grants to one request alone. The highest number counts:

    00007 renewed ... holder paused        holder awake: finds 00008, ends
    newcomer:             00007 unchanged for WATCH_SECS | makes 00008 | removes 00007

Numbers never begin again while the folder exists, for a newcomer that was itself paused might
otherwise make a number that was in use before. No two clocks are compared.
"""

import atexit
import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
from typing import Any

from etils import epath

from tinylm.core import buckets
from tinylm.core.errors import UserError
from tinylm.core.storage import failures, reach
from tinylm.run.lock import in_use

RENEW_SECS = 5.0
# gcsfs pauses for up to 17 s between two tries of a request, so that a holder may renew its lease
# this late after its service has failed.
WATCH_SECS = 40.0


class BucketLock:
    """The lease of a run's folder in a bucket, from when this is made until `release`."""

    def __init__(self, folder: epath.Path):
        """Take the lease.

        Raises:
          UserError: Another run has it, which the line names.
          StorageError: The bucket can't be reached.
        """
        self._folder = folder
        self._url = os.fspath(folder / "lock")
        self._renewals = 0
        self._ended = threading.Event()
        # Held while this writes its lease, so that a renewal can't follow upon the release.
        self._writing = threading.Lock()
        self._me: dict[str, Any] = {
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "id": os.urandom(8).hex(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._number = reach(folder, "--workdir", self._take)
        threading.Thread(target=self._renew, daemon=True).start()
        atexit.register(self.release)

    def release(self) -> None:
        """Give the folder free."""
        if self._ended.is_set():
            return
        self._ended.set()
        # A service that fails must not hold up the end: other processes of the job may be gone
        # already, for which JAX ends this one. Without a release, the lease just gets too old.
        releasing = threading.Thread(target=self._give_free, daemon=True)
        releasing.start()
        releasing.join(RENEW_SECS)

    def _give_free(self) -> None:
        with self._writing, contextlib.suppress(*failures()):
            buckets.write_there(b"", self._object(self._number))

    def _take(self) -> int:
        """Make the lease that follows the last one; return its number."""
        last = self._last()
        holder = None
        if last:
            holder = self._read(last)
        if holder is not None and not self._is_dead(last, holder):
            raise in_use(self._folder, holder)

        number = last + 1
        is_made = buckets.create_there(self._content(), self._object(number))
        found = self._read(number)
        # A request that is tried again finds what its first try has made.
        is_mine = found is not None and found["id"] == self._me["id"]
        # Where this process was paused since it looked, it may have made a number of the past.
        if not (is_made or is_mine) or self._last() != number:
            if is_made:
                buckets.remove_there(self._object(number))
            last = self._last()
            raise in_use(self._folder, self._read(last))
        for old in self._numbers():
            if old < number:
                buckets.remove_there(self._object(old))
        return number

    def _is_dead(self, number: int, holder: dict[str, Any]) -> bool:
        """Say whether the process that wrote a lease is dead.

        On this machine the list of processes tells. Otherwise this waits until the lease changes,
        or for WATCH_SECS.
        """
        is_here = (holder["host"], holder["machine"]) == (self._me["host"], self._me["machine"])
        if is_here and not pathlib.Path(f"/proc/{holder['pid']}").exists():
            return True
        until = time.monotonic() + WATCH_SECS
        while time.monotonic() < until:
            time.sleep(RENEW_SECS / 5)
            now = self._read(number)
            if now != holder:
                # It was renewed, unless it is empty because its holder gave the folder free.
                return now is None and self._last() == number
        return True

    def _renew(self) -> None:
        """Renew the lease until the release; end the process where another one has taken over."""
        while not self._ended.wait(RENEW_SECS):
            # While the service fails, nobody can take the lease over either.
            with contextlib.suppress(*failures()):
                last = self._last()
                if last > self._number:
                    self._stop(last)
                with self._writing:
                    if not self._ended.is_set():
                        buckets.write_there(self._content(), self._object(self._number))

    def _stop(self, last: int) -> None:
        """End this process, which was taken for dead, before it writes any more."""
        holder = None
        with contextlib.suppress(*failures()):
            holder = self._read(last)
        line = f"this process was not heard of for {WATCH_SECS:.0f} s, and meanwhile "
        print(f"error: {line}{in_use(self._folder, holder)}", file=sys.stderr, flush=True)
        os._exit(UserError.exit_code)

    def _content(self) -> bytes:
        """Return the lease as one that was just renewed."""
        self._renewals += 1
        return json.dumps({**self._me, "renewals": self._renewals}).encode()

    def _object(self, number: int) -> str:
        return f"{self._url}/{number:05}.json"

    def _numbers(self) -> list[int]:
        """Return the numbers of the leases that are there."""
        stems = [pathlib.PurePosixPath(name).stem for name in buckets.names_there(self._url)]
        return [int(stem) for stem in stems if stem.isdecimal()]

    def _last(self) -> int:
        """Return the highest number of a lease; 0 where there is none."""
        return max(self._numbers(), default=0)

    def _read(self, number: int) -> dict[str, Any] | None:
        """Return a lease; None where it is gone or was given free."""
        content = buckets.read_there(self._object(number))
        with contextlib.suppress(ValueError, RecursionError):
            match json.loads(content or b""):
                case {
                    "host": str(),
                    "machine": str(),
                    "pid": int(),
                    "id": str(),
                    "since": str(),
                } as lease:
                    return lease
        return None


def _machine() -> str:
    """Return what tells a machine that runs, and a container on it, from all others.

    Host names don't: many machines are called localhost.
    """
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return os.urandom(8).hex()
