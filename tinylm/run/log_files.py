"""The logs of a run, which grow line by line: on a disk, or as objects in a bucket.

An object can't grow, so in a bucket a log is written whole each time, now and then, by a thread:
training doesn't wait for it, not even while the bucket fails. What can't be written is kept, and is
written with the next that can.

A crash may leave a torn line at the end. It is cut off when the log is first written again.
"""

import math
import os
import threading
import time
from concurrent import futures

from etils import epath

from tinylm.core import buckets, storage
from tinylm.core.errors import StorageError
from tinylm.core.log import say

# How often a log in a bucket is written at most, and how much of the network that may take.
BUCKET_SECS = 30.0
_MOST_BYTES_PER_SEC = 250_000


class LogFile:
    """A log on a disk."""

    def __init__(self, path: epath.Path):
        """Write nothing yet."""
        self.path = path
        self._unwritten = ""
        # Whether the file is known to end with a whole line.
        self._is_whole = False
        self._is_failing = False

    def append(self, text: str, now: bool = False) -> None:
        """Add whole lines.

        Args:
          text: the lines.
          now: for a log in a bucket; a disk always takes them now.
        """
        self._unwritten += text
        try:
            self._write(self._unwritten.encode())
        except storage.failures() as error:
            # A part of it may have been written, so the next time a torn line is looked for again.
            self._is_whole = False
            if not self._is_failing:
                self._is_failing = True
                say(_warning(self.path, error))
            return
        self._unwritten = ""
        self._is_failing = False

    def _write(self, content: bytes) -> None:
        if not self._is_whole:
            old = _content_of(self.path)
            whole = _whole_lines(old)
            if whole != old:
                os.truncate(self.path, len(whole))
            self._is_whole = True
        with self.path.open("ab") as file:
            file.write(content)

    def wait(self, secs: float | None = None) -> None:
        """Wait for nothing: what could be written is."""

    def flush(self, outage_secs: float) -> None:
        """Write what could not be written before; raise StorageError where it still can't.

        Args:
          outage_secs: for a log in a bucket.
        """
        if self._unwritten:
            self.append("")
        if self._unwritten:
            raise StorageError(
                f"{self.path} cannot be written, its last lines are lost; free space there."
            )


class LogObject:
    """A log in a bucket."""

    def __init__(self, path: epath.Path):
        """Write nothing yet."""
        self.path = path
        # The lines to write, and the lock that they are under.
        self._unwritten = ""
        self._lock = threading.Lock()
        # All that the object holds; None where that isn't known.
        self._written: bytes | None = None
        self._writer = futures.ThreadPoolExecutor(1)
        self._writing: futures.Future[None] | None = None
        self._began = -math.inf
        self._is_failing = False

    def append(self, text: str, now: bool = False) -> None:
        """Add whole lines.

        Args:
          text: the lines.
          now: whether they are sent at once. Otherwise they may wait for more to come.
        """
        with self._lock:
            self._unwritten += text
        num_bytes = len(self._written or b"")
        pause_secs = max(BUCKET_SECS, num_bytes / _MOST_BYTES_PER_SEC)
        is_busy = self._writing is not None and not self._writing.done()
        is_time = time.monotonic() - self._began >= pause_secs and not is_busy
        if now or is_time:
            self._began = time.monotonic()
            self._writing = self._writer.submit(self._try_to_write)

    def _try_to_write(self) -> None:
        """Write on the thread; say it once where that fails."""
        try:
            self._write()
        except storage.failures() as error:
            if not self._is_failing:
                self._is_failing = True
                say(_warning(self.path, error))
        else:
            self._is_failing = False

    def _write(self) -> None:
        with self._lock:
            text = self._unwritten
        if not text:
            return
        try:
            if self._written is None:
                self._written = _whole_lines(_content_of(self.path))
            content = self._written + text.encode()
            self.path.write_bytes(content)
        except BaseException:
            # The service may have taken it all the same.
            self._written = None
            raise
        self._written = content
        with self._lock:
            self._unwritten = self._unwritten[len(text) :]

    def wait(self, secs: float | None = None) -> None:
        """Wait until what was sent is written, or was refused; at most so many seconds."""
        if self._writing is not None:
            futures.wait([self._writing], secs)

    def flush(self, outage_secs: float) -> None:
        """Write all that is left.

        Args:
          outage_secs: how long to try where the bucket fails.

        Raises:
          UserError, StorageError: it can't be written.
        """
        self.wait()
        buckets.patiently(os.fspath(self.path), "--workdir", self._write, outage_secs)


def open_log(path: epath.Path) -> LogFile | LogObject:
    """Return the log at a path, which need not be there yet."""
    return LogObject(path) if storage.in_bucket(path) else LogFile(path)


def _warning(path: epath.Path, error: Exception) -> str:
    reason = storage.in_words(error)
    return f"warning: {path} cannot be written: {reason}; its lines are kept until it can."


def _content_of(path: epath.Path) -> bytes:
    """Return what a file holds; nothing where it isn't there.

    It is read rather than asked for first: a library for buckets may answer from a listing that it
    keeps that an object isn't there, and what the object holds would then be written over.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _whole_lines(content: bytes) -> bytes:
    """Return content without the torn line at its end."""
    return content[: content.rfind(b"\n") + 1]
