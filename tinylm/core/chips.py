"""What chips can do, for model FLOPs utilization and for plans.

GPUs and TPUs are in a table, a CPU is measured.
The makers publish the figures: dense bfloat16 FLOP/s with sums in float32 (what NVIDIA gives "with
sparsity" is twice that), bytes of memory, bytes/s of memory, and bytes/s that one chip can send to
its neighbours (TPU: all links one way, half of the "bidirectional ICI bandwidth"; GPU: NVLink one
way, or PCIe one way where a card has none). JAX calls devices by these names.
"""

import dataclasses
import functools
import os
import re
import time

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them."""

    peak_flops: float  # a second
    memory_bytes: float
    memory_bytes_per_sec: float
    link_bytes_per_sec: float  # 0 where devices share a memory


CHIPS = {
    # "NVIDIA A100 Tensor Core GPU" (data sheet, 2021)
    "NVIDIA A100": Chip(312e12, 80e9, 2.0e12, 300e9),
    "NVIDIA A100 SXM4 40GB": Chip(312e12, 40e9, 1.555e12, 300e9),
    "NVIDIA A100 PCIE 40GB": Chip(312e12, 40e9, 1.555e12, 300e9),
    # "NVIDIA H100 Tensor Core GPU" and "NVIDIA H200 Tensor Core GPU" (data sheets)
    "NVIDIA H100": Chip(989e12, 80e9, 3.35e12, 450e9),
    "NVIDIA H100 PCIe": Chip(756e12, 80e9, 2.0e12, 300e9),
    "NVIDIA H100 NVL": Chip(835e12, 94e9, 3.9e12, 300e9),
    "NVIDIA H200": Chip(989e12, 141e9, 4.8e12, 450e9),
    "NVIDIA H200 NVL": Chip(835e12, 141e9, 4.8e12, 450e9),
    # "NVIDIA DGX B200" (data sheet, an eighth of it) and "NVIDIA Blackwell Architecture Technical
    # Brief"
    "NVIDIA B200": Chip(2250e12, 180e9, 8.0e12, 900e9),
    # "NVIDIA GB200 NVL72" (data sheet): half of a superchip, which JAX sees as two devices
    "NVIDIA GB200": Chip(2500e12, 186e9, 8.0e12, 900e9),
    # "NVIDIA L4" and "NVIDIA L40S" (data sheets)
    "NVIDIA L4": Chip(121e12, 24e9, 0.3e12, 32e9),
    "NVIDIA L40S": Chip(362e12, 48e9, 0.86e12, 32e9),
    # "NVIDIA Ampere GA102 GPU Architecture", "NVIDIA Ada GPU Architecture", "NVIDIA RTX Blackwell
    # GPU Architecture" (white papers, appendices): "BF16 Tensor TFLOPS with FP32 Accumulate"
    "NVIDIA GeForce RTX 3090": Chip(71e12, 24e9, 0.936e12, 32e9),
    "NVIDIA RTX A6000": Chip(154.8e12, 48e9, 0.768e12, 32e9),
    "NVIDIA GeForce RTX 4090": Chip(165.2e12, 24e9, 1.008e12, 32e9),
    "NVIDIA GeForce RTX 5090": Chip(209.5e12, 32e9, 1.792e12, 64e9),
    # "Cloud TPU documentation": the pages of TPU v4, v5e, v5p, v6e and TPU7x (Ironwood)
    "TPU v4": Chip(275e12, 32 * 2**30, 1.2e12, 300e9),
    "TPU v5 lite": Chip(197e12, 16 * 2**30, 0.82e12, 200e9),
    "TPU v5e": Chip(197e12, 16 * 2**30, 0.82e12, 200e9),
    "TPU v5": Chip(459e12, 95 * 2**30, 2.77e12, 600e9),
    "TPU v5p": Chip(459e12, 95 * 2**30, 2.77e12, 600e9),
    "TPU v6 lite": Chip(918e12, 32 * 2**30, 1.64e12, 400e9),
    "TPU v6e": Chip(918e12, 32 * 2**30, 1.64e12, 400e9),
    # A chip of 2,307 TFLOP/s, 192 GiB, 7,380 GB/s and 1,200 GB/s of links in both directions is two
    # devices.
    "TPU7x": Chip(2307e12 / 2, 96 * 2**30, 3.69e12, 300e9),
}
# What may follow the name of a GPU: its form, and its memory. "NVIDIA A100-SXM4-80GB" is an "NVIDIA
# A100", but an "NVIDIA GeForce RTX 4090 Laptop GPU" is another chip, as is a part of one ("MIG").
_FORM = re.compile(r"SXM\d?|PCI[Ee]|HBM\d[Ee]?|\d+GB")
# What one chip can send to another slice over the data center's network.
SLICE_BYTES_PER_SEC = 6e9
# A usual machine's memory.
_CPU_MEMORY_BYTES_PER_SEC = 20e9


def find_chip(device: jax.Device, devices_here: int = 1) -> Chip | None:
    """Return the chip of a device, or None for one that is not in the table.

    `devices_here` simulated CPU devices share one machine: each has its part of it.
    """
    if device.platform == "cpu":
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Chip(
            peak_flops=measured_cpu_flops() / devices_here,
            memory_bytes=memory_bytes / devices_here,
            memory_bytes_per_sec=_CPU_MEMORY_BYTES_PER_SEC / devices_here,
            link_bytes_per_sec=0,
        )
    # Of two names that fit, the longer one is meant: "TPU v5 lite" is not a "TPU v5".
    words = device.device_kind.replace("-", " ").split()
    for num_words in range(len(words), 0, -1):
        name = " ".join(words[:num_words])
        if name in CHIPS and all(_FORM.fullmatch(word) for word in words[num_words:]):
            return CHIPS[name]
    return None


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Return FLOP/s of `devices` together, or None for a chip that is not in the table.

    Simulated CPU devices share the machine, so together they have what it measures once.
    """
    chip = find_chip(devices[0], len(devices))
    if chip is None:
        return None
    return chip.peak_flops * len(devices)


@functools.cache
def measured_cpu_flops(size: int = 1024, tries: int = 5) -> float:
    """Return the best float32 FLOP/s of this machine's CPU over `tries` matrix products of NumPy.

    Args:
      size: of the square matrices.
      tries: the fastest one counts.
    """
    matrix = np.ones((size, size), np.float32)
    secs = []
    for _ in range(tries):
        begun = time.perf_counter()
        matrix @ matrix
        secs.append(time.perf_counter() - begun)
    return 2 * size**3 / min(secs)
