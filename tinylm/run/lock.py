"""One run in a workdir at a time: a lease in `lock.json` that says who runs, renewed while it does.

On a disk the file is locked too, which the system ends when its holder dies. Where that doesn't
tell (another host, a bucket), a newcomer watches the lease for longer than it takes to be renewed:
one that doesn't change is a dead one's. No two clocks are compared. Process 0 holds it for all
processes of its job.
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
from typing import Any

from etils import epath

from tinylm.core.errors import UserError
from tinylm.core.storage import failures

RENEW_SECS = 5.0


class WorkdirLock:
    """The lease of a folder, taken at once; raises UserError naming the run that has it."""

    def __init__(self, folder: epath.Path):
        """Take the lease, or refuse."""
        self._path, self._renewals, self._ended = folder / "lock.json", 0, threading.Event()
        self._file: Any = None
        free, there = self._lock_file(), self._read()
        self._me: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "id": os.urandom(8).hex(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        if free and (there is None or self._dead(there)):
            there = self._me
            self._write()
            if self._file is None:  # without a lock on the file the last to write has it
                time.sleep(1)
                there = self._read() or self._me
        if not free or there is None or there["id"] != self._me["id"]:
            who = (
                f"process {there['pid']} on {there['host']} since {there['since']}"
                if there
                else "another process"
            )
            raise UserError(
                f"--workdir={os.fspath(folder)} is in use by {who}; wait, stop it, or name another."
            )
        threading.Thread(target=self._renew, daemon=True).start()
        atexit.register(self.release)

    def release(self) -> None:
        """Give the folder free."""
        if not self._ended.is_set():
            self._ended.set()
            with contextlib.suppress(*failures()):
                self._path.write_text("", encoding="utf-8")
            if self._file is not None:
                self._file.close()

    def _lock_file(self) -> bool:
        """Lock the file, where it is on a disk that knows locks; say whether nobody else has it."""
        with contextlib.suppress(OSError):  # a bucket, or a file system without locks
            file = pathlib.Path(os.fspath(self._path)).open("a", encoding="utf-8")  # noqa: SIM115  held while the run lasts
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._file = file
            except BlockingIOError:
                return False
        return True

    def _dead(self, there: dict[str, Any]) -> bool:
        """Say whether who wrote a lease is dead: known of this host's processes, seen by waiting
        for other hosts'.
        """
        if there["host"] == socket.gethostname() and (
            self._file or not pathlib.Path(f"/proc/{there['pid']}").exists()
        ):
            return True
        for _ in range(3 * round(RENEW_SECS)):
            time.sleep(1)
            if (now := self._read()) != there:
                return now is None
        return True

    def _read(self) -> dict[str, Any] | None:
        for _ in range(3):  # it may be in the middle of being renewed
            with contextlib.suppress(ValueError, RecursionError, *failures()):
                match json.loads(self._path.read_text(encoding="utf-8")):
                    case {"host": str(), "pid": int(), "id": str(), "since": str()} as there:
                        return there
            time.sleep(0.05)
        return None

    def _write(self) -> None:
        self._renewals += 1
        with contextlib.suppress(*failures()):
            self._path.write_text(
                json.dumps({**self._me, "renewals": self._renewals}), encoding="utf-8"
            )

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_SECS):
            self._write()
