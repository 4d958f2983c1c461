"""What each host of a job costs it: its own work between steps, its waiting for data, its memory.

Every process measures itself from one log line to the next and tells process 0 (core/watchdog.py),
which writes the largest of each into the log line, and on which host it was. So the line takes no
step of the devices and waits for nobody; what it says of the other hosts is up to a second and a
log line old.
"""

import collections
import statistics
from collections.abc import Iterable
from typing import Any

import jax

from tinylm.core import buckets
from tinylm.core.vitals import ON, Vitals, device_bytes, resident_bytes
from tinylm.core.watchdog import Watchdog


class Hosts:
    """The figures of all hosts of a run, on process 0; elsewhere those of this one."""

    def __init__(self, watchdog: Watchdog):
        """Begin to measure."""
        self._watchdog = watchdog
        self._devices = jax.local_devices()
        # Since the last line: steps sent, and the seconds that the host took for them.
        self._steps = 0
        self._host_secs = 0.0
        self._input_wait_secs = 0.0
        self._traffic = buckets.traffic()
        # By process: its name, its host work a step summed over the lines, and their number.
        self._names: dict[int, str] = {}
        self._sums: dict[int, float] = collections.defaultdict(float)
        self._lines: collections.Counter[int] = collections.Counter()

    def note(self, steps: int, host_secs: float, input_wait_secs: float) -> None:
        """Count steps that were sent to the device.

        Args:
          steps: so many.
          host_secs: that this process was at work for all of them, without waiting for the device.
          input_wait_secs: of these it waited for their batches.
        """
        self._steps += steps
        self._host_secs += host_secs
        self._input_wait_secs += input_wait_secs

    def figures(self) -> dict[str, Any]:
        """Return the largest of each figure for a log line and, of several hosts, whose it is.

        Called on all processes at each log line. Lines of one dispatch have the same figures.
        """
        if self._steps:
            self._watchdog.tell(self._measured())
        told = self._watchdog.told()
        for process, (name, vitals) in told.items():
            self._names[process] = f"{name} (process {process})"
            self._sums[process] += vitals.host_secs
            self._lines[process] += 1
        return largest({self._names[process]: vitals for process, (_, vitals) in told.items()})

    def _measured(self) -> Vitals:
        """Return this process's figures since the last line, and begin the next."""
        traffic = buckets.traffic()
        found = Vitals(
            host_secs=round(self._host_secs / self._steps, 6),
            input_wait_secs=round(self._input_wait_secs / self._steps, 6),
            memory_bytes=resident_bytes(),
            device_memory_bytes=device_bytes(self._devices),
            bucket_bytes=(traffic.num_bytes - self._traffic.num_bytes) / self._steps,
            bucket_requests=(traffic.requests - self._traffic.requests) / self._steps,
        )
        self._steps = 0
        self._host_secs = 0.0
        self._input_wait_secs = 0.0
        self._traffic = traffic
        return found

    def summary(self) -> str:
        """Return which host was the slowest over the run, or nothing in a job of one process."""
        if len(self._names) < 2:
            return ""
        mean = {process: self._sums[process] / self._lines[process] for process in self._names}
        slowest = max(mean, key=lambda process: mean[process])
        usual = statistics.median(mean.values())
        return (
            f"Slowest of {len(mean)} processes: {self._names[slowest]}, with "
            f"{1e3 * mean[slowest]:.1f} ms of host work a step (median {1e3 * usual:.1f} ms)."
        )


def largest(vitals: dict[str, Vitals]) -> dict[str, Any]:
    """Return the largest of each figure that any host has and, of several hosts, its name.

    Args:
      vitals: by the name of the host.
    """
    found: dict[str, Any] = {}
    for field in Vitals._fields:
        value, name = max(_values(vitals, field))
        # Devices that keep no account, and runs that read no bucket, have nothing to say.
        if not value and field not in ("host_secs", "input_wait_secs"):
            continue
        found[field] = value
        if len(vitals) > 1:
            found[field + ON] = name
    return found


def _values(vitals: dict[str, Vitals], field: str) -> Iterable[tuple[float, str]]:
    return ((getattr(one, field), name) for name, one in vitals.items())
