"""tinylm: a distributed trainer for small to mid-size language models on JAX sharding."""

import time
from typing import Any

from tinylm.core.platform import set_flags

STARTED = time.monotonic()  # for the account of a run's time
__version__ = "0.1.0"
__all__ = ["open_run"]

# Before JAX makes a backend: what its compiler needs for right numbers, here and in every process started from here.
set_flags()


def __getattr__(name: str) -> Any:
    """Load `tinylm.open_run` when it is first asked for, so that commands start without it."""
    if name == "open_run":
        from tinylm.run.open_run import open_run

        return open_run
    raise AttributeError(f"module 'tinylm' has no attribute {name!r}")
