"""What a process of a job measures of itself, for its peers to read and for metrics.jsonl.

Steps end at the same moment on all hosts, since each waits for the others' gradients; so what tells
a slow host from a fast one is the time that a host spends by itself, between two steps.
"""

import resource
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax

# Ends the name of the field of metrics.jsonl that says on which host the largest value was.
ON = "_on"


class Vitals(NamedTuple):
    """What a process tells of itself, as of the last steps that it logged.

    Attributes:
      host_secs: that it was at work by itself for each step: loading, logging, sending.
      input_wait_secs: of these it waited for the step's batch.
      memory_bytes: the most memory that the process has had.
      device_memory_bytes: the most that one of its devices has had; 0 for those that don't say, as
        CPUs, whose memory is the process's.
      bucket_bytes: of data that came from a bucket for each step.
      bucket_requests: that these took.
    """

    host_secs: float = 0.0
    input_wait_secs: float = 0.0
    memory_bytes: float = 0.0
    device_memory_bytes: float = 0.0
    bucket_bytes: float = 0.0
    bucket_requests: float = 0.0


def resident_bytes() -> int:
    """Return the most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def device_bytes(devices: Sequence[jax.Device]) -> int:
    """Return the most memory that one of some devices has had; 0 where they don't say."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices]
    return max(peaks, default=0)
