"""What chips can do, for model FLOPs utilization and for plans: a table for GPUs and TPUs, a
measurement for CPUs.

From the makers' data sheets: dense bfloat16 FLOP/s, bytes of memory, bytes/s of memory, and bytes/s
that one chip can send to its neighbours (TPU: all links one way; GPU: NVLink one way). JAX calls
devices by these names.
"""

import dataclasses
import functools
import os
import time

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them; `link_bytes_per_sec` is 0 where devices share a memory."""

    peak_flops: float
    memory_bytes: float
    memory_bytes_per_sec: float
    link_bytes_per_sec: float


CHIPS = {
    "NVIDIA A100": Chip(312e12, 80e9, 2.0e12, 300e9),
    "NVIDIA H100": Chip(989e12, 80e9, 3.35e12, 450e9),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9, 2.0e12, 300e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12, 450e9),
    "NVIDIA L4": Chip(121e12, 24e9, 0.3e12, 32e9),
    "NVIDIA L40S": Chip(362e12, 48e9, 0.86e12, 32e9),
    "TPU v4": Chip(275e12, 32 * 2**30, 1.2e12, 150e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 0.82e12, 100e9),
    "TPU v5e": Chip(197e12, 16 * 2**30, 0.82e12, 100e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2.77e12, 300e9),
    "TPU v5p": Chip(459e12, 95 * 2**30, 2.77e12, 300e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1.64e12, 200e9),
    "TPU v6e": Chip(918e12, 32 * 2**30, 1.64e12, 200e9),
}
SLICE_BYTES_PER_SEC = 6e9  # what one chip can send to another slice over the data center's network


def find_chip(device: jax.Device, devices_here: int = 1) -> Chip | None:
    """Return the chip of a device, or None for one that is not in the table.

    `devices_here` simulated CPU devices share one machine: each has its part of it.
    """
    if device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Chip(
            measured_cpu_flops() / devices_here, memory / devices_here, 20e9 / devices_here, 0
        )
    kinds = [
        name for name in CHIPS if f"{device.device_kind} ".replace("-", " ").startswith(f"{name} ")
    ]
    return CHIPS[max(kinds, key=len)] if kinds else None


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Return FLOP/s of `devices` together, or None for a chip that is not in the table.

    Simulated CPU devices share the machine, so together they have what it measures once.
    """
    chip = find_chip(devices[0], len(devices))
    return chip.peak_flops * len(devices) if chip else None


@functools.cache
def measured_cpu_flops(size: int = 1024, tries: int = 5) -> float:
    """Return the best float32 FLOP/s of this machine's CPU over a few square matrix products
    (NumPy's).
    """
    a = np.ones((size, size), np.float32)
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
