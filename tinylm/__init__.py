"""tinylm: a distributed trainer for small to mid-size language models on JAX sharding."""

import gc
import os
import signal
import sys
import time
from typing import Any

if os.path.basename(sys.argv[0]) == "tinylm" or (
    sys.argv[0] == "-m" and any(word.startswith("tinylm") for word in sys.orig_argv)
):
    # This process is `tinylm ...` or `python -m tinylm...`.
    # Until its flags are read, a command has nothing to clean up. So Ctrl-C ends it without a
    # traceback out of some import, and Python doesn't look for garbage among what it imports, which
    # takes a quarter of that time. `tinylm.cli.run` turns both on again.
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

from tinylm.core.platform import set_flags

STARTED = time.monotonic()  # for the account of a run's time
__version__ = "0.1.0"
__all__ = ["open_run"]  # noqa: F822  made when it is asked for, below

# Before JAX makes a backend: what its compiler needs for right numbers, here and in every process
# started from here.
set_flags()


def __getattr__(name: str) -> Any:
    """Load `tinylm.open_run` when it is first asked for, so that commands start without it."""
    if name == "open_run":
        from tinylm.run.open_run import open_run

        return open_run
    raise AttributeError(f"module 'tinylm' has no attribute {name!r}")
