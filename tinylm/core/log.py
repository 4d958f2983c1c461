"""What the program says to its user: plain lines on stderr, from process 0 alone.

Libraries log to their own loggers, which are kept quiet: no warning reaches a user who can't act on
it. A thread writes, so that a terminal or a pipe that takes nothing more stops no training.
"""

import atexit
import contextlib
import logging
import logging.handlers
import queue
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

_logger = logging.getLogger("tinylm")
_lines: queue.Queue = queue.Queue()


def start(is_main: bool = True) -> None:
    """Send lines of this process to stderr where it is process 0, and quiet the libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _logger.handlers = [logging.handlers.QueueHandler(_lines)]
    logging.handlers.QueueListener(_lines, handler).start()
    atexit.register(flush)
    logging.raiseExceptions = False  # a pipe that broke is nobody's news
    _logger.propagate = False
    _logger.setLevel(logging.INFO if is_main else logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
    for name in (
        "absl",
        "asyncio",
        "jax",
        "orbax",
        "etils",
        "gcsfs",
        "fsspec",
        "s3fs",
        "google",
        "urllib3",
        "aiohttp",
    ):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what is raised is said once, by us
    warnings.filterwarnings("ignore")
    sys.unraisablehook = _unraisable


def _unraisable(found: Any) -> None:
    """Say what nobody could catch; not that of a save that failed further writes ended later."""
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


def flush(secs: float = 2.0) -> None:
    """Wait until all lines are written, but not for long."""
    until = time.monotonic() + secs
    while _lines.unfinished_tasks and time.monotonic() < until:
        time.sleep(0.001)


def say(line: str, from_all: bool = False) -> None:
    """Log one line to the user, of process 0 alone unless `from_all`."""
    _logger.log(logging.ERROR if from_all else logging.INFO, line)


def say_once(line: str, _said: set[str] = set()) -> None:  # noqa: B006
    """Log one line to the user, the first time only."""
    if line not in _said:
        _said.add(line)
        say(line)


@contextlib.contextmanager
def alive(describe: Callable[[], str], after_secs: float = 5.0) -> Iterator[None]:
    """Say what is going on where it takes longer than `after_secs`, then more and more rarely, but
    every minute.

    `describe` is called on another thread, so the work inside has to let go of the interpreter now
    and then.
    """
    done = threading.Event()
    started = time.monotonic()

    def tell() -> None:
        pause = after_secs
        while not done.wait(pause):
            say(f"{describe()} ... {time.monotonic() - started:.0f} s")
            pause = min(2 * pause, 60.0)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
