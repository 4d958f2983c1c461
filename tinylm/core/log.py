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

# What these libraries raise is printed once, by us.
_SILENCED = (
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
)
_LONGEST_PAUSE_SECS = 60.0

_logger = logging.getLogger("tinylm")
_lines: queue.Queue = queue.Queue()
_said_once: set[str] = set()
# What this process is doing, the innermost last.
_at_work: list[Callable[[], str]] = []
# What `start` changed in this process, to be undone by `stop`.
_undo = contextlib.ExitStack()


def start(is_main: bool = True, library_logs: bool = False) -> None:
    """Send lines of this process to stderr where it is process 0.

    Args:
      is_main: whether this is process 0; others show only what is said `from_all`.
      library_logs: whether libraries may log and warn as well.
    """
    stop()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    _undo.callback(setattr, _logger, "handlers", _logger.handlers)
    _logger.handlers = [logging.handlers.QueueHandler(_lines)]
    listener = logging.handlers.QueueListener(_lines, handler)
    listener.start()
    _undo.callback(_stop_listener, listener)
    atexit.register(flush)
    # Nobody needs to hear of a pipe that broke.
    _undo.callback(setattr, logging, "raiseExceptions", logging.raiseExceptions)
    logging.raiseExceptions = False
    _undo.callback(setattr, _logger, "propagate", _logger.propagate)
    _logger.propagate = False
    _set_level(_logger, logging.INFO if is_main else logging.ERROR)
    if not library_logs:
        _silence_libraries()
    _undo.callback(setattr, sys, "unraisablehook", sys.unraisablehook)
    sys.unraisablehook = _unraisable


def stop() -> None:
    """Undo what `start` did, for a process that goes on."""
    flush()
    _undo.close()


def _silence_libraries() -> None:
    """Keep the loggers and warnings of libraries quiet."""
    _set_level(logging.getLogger(), logging.ERROR)
    for name in _SILENCED:
        _set_level(logging.getLogger(name), logging.CRITICAL)
    _undo.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore")


def _set_level(logger: logging.Logger, level: int) -> None:
    """Set the level of a logger until `stop`."""
    _undo.callback(logger.setLevel, logger.level)
    logger.setLevel(level)


def _stop_listener(listener: logging.handlers.QueueListener) -> None:
    """End the thread that writes, unless its terminal takes no more lines."""
    if not _lines.unfinished_tasks:
        listener.stop()


def _unraisable(found: Any) -> None:
    """Print an error that nobody could catch, as Python does, with one exception.

    After a save that failed, libraries for buckets end their other writes when their event loop is
    closed already.
    """
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


def say_once(line: str) -> None:
    """Log one line to the user, the first time only."""
    if line not in _said_once:
        _said_once.add(line)
        say(line)


@contextlib.contextmanager
def at_work(describe: Callable[[], str]) -> Iterator[None]:
    """Have `current_work` return what `describe` returns, while the body runs."""
    _at_work.append(describe)
    try:
        yield
    finally:
        _at_work.remove(describe)


def current_work() -> str:
    """Return a line on what this process is doing right now, "" where it hasn't said."""
    # A copy, since the works of other threads come and go.
    works = list(_at_work)
    return works[-1]() if works else ""


@contextlib.contextmanager
def alive(describe: Callable[[], str], after_secs: float = 5.0) -> Iterator[None]:
    """Say what is going on where it takes long: after `after_secs`, then ever more rarely.

    Args:
      describe: returns a line. It is called on another thread, so the work inside has to let go of
        the interpreter now and then.
      after_secs: the first pause; each next one is twice as long, up to a minute.
    """
    done = threading.Event()
    started = time.monotonic()

    def tell() -> None:
        pause = after_secs
        while not done.wait(pause):
            say(f"{describe()} ... {time.monotonic() - started:.0f} s")
            pause = min(2 * pause, _LONGEST_PAUSE_SECS)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        with at_work(describe):
            yield
    finally:
        done.set()
        thread.join()
