"""tinylm: a distributed trainer for small to mid-size language models on JAX sharding."""

import os
import signal
import sys
import time
from typing import Any

if os.path.basename(sys.argv[0]) in ("-m", "tinylm") and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    # `python -m tinylm...` or `tinylm ...`: until its flags are read, a command has nothing to
    # clean up. Ctrl-C then ends it without a traceback out of some import; `tinylm.cli.run` puts
    # Python's handler back.
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
