"""Peak matrix throughput of chips, for model FLOPs utilization: a table for GPUs and TPUs, a measurement for CPUs."""

import functools
import time

import jax
import numpy as np

# Dense bfloat16 FLOP/s of one device, from the makers' data sheets; JAX calls devices by these names.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Return FLOP/s of `devices` together, or None for a chip that is not in the table.

    Simulated CPU devices share the machine, so together they have what it measures once.
    """
    if devices[0].platform == "cpu":
        return measured_cpu_flops()
    kinds = [name for name in PEAK_FLOPS if devices[0].device_kind.startswith(name)]
    return PEAK_FLOPS[max(kinds, key=len)] * len(devices) if kinds else None


@functools.cache
def measured_cpu_flops(size: int = 1024, tries: int = 5) -> float:
    """Return the best float32 FLOP/s of this machine's CPU over a few square matrix products (NumPy's)."""
    a = np.ones((size, size), np.float32)
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
