"""One run in a workdir at a time: a lease in `lock.json` that says who runs, renewed while it does.

This is for a folder on a disk; `bucket_lock` is for one in a bucket. The file is locked too, and
the system ends that lock when its holder dies. Where this doesn't tell (another host), a newcomer
watches the lease for longer than its holder takes to renew it: one that doesn't change belongs to
a dead process. So no two clocks are compared. Process 0 holds the lease for all processes of its
job.
"""

import atexit
import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
from typing import IO, Any

from etils import epath

from tinylm.core.errors import UserError
from tinylm.core.storage import failures

RENEW_SECS = 5.0


class WorkdirLock:
    """The lease of a run's folder, from when this is made until `release`."""

    def __init__(self, folder: epath.Path):
        """Take the lease; raise UserError, which names its holder, where another run has it."""
        self._path = folder / "lock.json"
        self._file: IO[str] | None = None
        self._renewals = 0
        self._ended = threading.Event()
        self._me: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "id": os.urandom(8).hex(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        is_free = self._lock_file()
        holder = self._read()
        if not is_free or (holder is not None and not self._is_dead(holder)):
            raise in_use(folder, holder)
        self._write()
        if self._file is None:
            # Without a lock on the file two may write at the same time; the last one has the lease.
            time.sleep(1)
            holder = self._read()
            if holder is not None and holder["id"] != self._me["id"]:
                raise in_use(folder, holder)
        threading.Thread(target=self._renew, daemon=True).start()
        atexit.register(self.release)

    def release(self) -> None:
        """Give the folder free."""
        if self._ended.is_set():
            return
        self._ended.set()
        with contextlib.suppress(*failures()):
            self._path.write_text("", encoding="utf-8")
        if self._file is not None:
            self._file.close()

    def _lock_file(self) -> bool:
        """Lock the file where that is possible; say whether it is free of another one's lock."""
        # A file system without locks raises an OSError, and then the lease decides.
        with contextlib.suppress(OSError):
            # The file stays open while the run lasts, because closing it would end the lock.
            file = pathlib.Path(os.fspath(self._path)).open("a", encoding="utf-8")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            self._file = file
        return True

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """Say whether the process that wrote a lease is dead.

        On this host a lock that we got, or the list of processes, tells. For other hosts this waits
        until the lease changes, or for three times the interval between renewals.
        """
        if holder["host"] == socket.gethostname():
            if self._file is not None:
                return True
            if not pathlib.Path(f"/proc/{holder['pid']}").exists():
                return True
        for _ in range(3 * round(RENEW_SECS)):
            time.sleep(1)
            now = self._read()
            if now != holder:
                # It was renewed, unless it is gone because its holder gave the folder free.
                return now is None
        return True

    def _read(self) -> dict[str, Any] | None:
        """Return the lease that is there, or None where the file holds none."""
        # A reader may see the file in the middle of a renewal, empty or cut, so it looks again.
        for _ in range(3):
            with contextlib.suppress(ValueError, RecursionError, *failures()):
                match json.loads(self._path.read_text(encoding="utf-8")):
                    case {"host": str(), "pid": int(), "id": str(), "since": str()} as lease:
                        return lease
            time.sleep(0.05)
        return None

    def _write(self) -> None:
        """Write the lease as one that was just renewed."""
        self._renewals += 1
        lease = {**self._me, "renewals": self._renewals}
        with contextlib.suppress(*failures()):
            self._path.write_text(json.dumps(lease), encoding="utf-8")

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECS):
            self._write()


def in_use(folder: epath.Path, holder: dict[str, Any] | None) -> UserError:
    """Return the error for a folder that another process has; it may have no lease to read."""
    who = "another process"
    if holder is not None:
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    return UserError(
        f"--workdir={os.fspath(folder)} is in use by {who}; wait, stop it, or name another."
    )
