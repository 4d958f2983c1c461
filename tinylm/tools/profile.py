"""Where a program's time goes: operations of a profile added up by kind.

On CPU and TPU, XLA marks the event of each operation that it runs with `hlo_op`; an operation's
name tells what was fused in it. Loops and calls contain the operations that they run, so they are
left out. On GPU the events are kernels, one line a CUDA stream: XLA names its own after the
operation, those of libraries have names of their own, and a kernel that is part of a CUDA graph has
no other mark. Where operations run side by side, their times add up to more than the clock's.
"""

import collections
import pathlib
import re
from collections.abc import Iterator

from jax.profiler import ProfileData

# Names of operations as they stand in profiles: `while.7`, `call.2`, `async-start.1`.
_CONTAINERS = re.compile(r"^(while|call|conditional|async|ThreadpoolListener)")
# The kinds in the order in which they are looked for: the first pattern that a name matches counts.
_KINDS = {
    # `cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_...`
    "attention": re.compile("sdpa|fmha|flash_[fb]prop"),
    # `all-reduce-start.1`, `ncclDevKernel_AllGather`
    "communication": re.compile("all-|reduce-scatter|collective|nccl"),
    # `dot.12`, `ynn_fusion.3`, `gemm_fusion_dot_1`, `nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT`
    "matmuls": re.compile(
        "ynn_|onednn|dot|gemm|cublas|cutlass|cudnn|nvjet|wgmma|matmul|conv(?!ert)"
    ),
    # `wrapped_scatter`, `dynamic-update-slice.4`
    "gathers and scatters": re.compile("gather|scatter|dynamic"),
    # `loop_transpose_fusion`, `copy_bitcast_fusion.7`, `MemcpyD2D`: nothing but words of these
    "transposes and copies": re.compile(
        r"^((wrapped|loop|input|transpose|copy|bitcast|slice|pad|concatenate|broadcast|reshape|Memcpy\w*|Memset|fusion)[\W_]*)+$"
    ),
    # `input_reduce_fusion.2`
    "reductions": re.compile("reduce"),
}


def secs_by_kind(folder: str) -> dict[str, float]:
    """Return the seconds spent in each kind of operation, the largest first.

    Args:
      folder: of traces, as `jax.profiler.trace` writes them.
    """
    secs: dict[str, float] = collections.defaultdict(float)
    for name, operation_secs in operations(folder):
        secs[kind_of(name)] += operation_secs
    largest_first = sorted(secs.items(), key=lambda item: -item[1])
    return dict(largest_first)


def operations(folder: str) -> Iterator[tuple[str, float]]:
    """Yield name and seconds of each operation in a folder of traces, without containers."""
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
        for name, operation_secs in _events(path):
            if not _CONTAINERS.match(name):
                yield name, operation_secs


def _events(path: pathlib.Path) -> Iterator[tuple[str, float]]:
    """Yield name and seconds of each operation of a trace, those that contain others included."""
    # The trace must outlive its planes.
    trace = ProfileData.from_file(str(path))
    planes = list(trace.planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or planes:
        for line in plane.lines:
            # Other lines of a GPU sum up what its streams did.
            if gpus and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = event.name if gpus else dict(event.stats).get("hlo_op")
                if name:
                    yield str(name), event.duration_ns / 1e9


def kind_of(name: str) -> str:
    """Return the kind of an operation by its name in the compiled program.

    Such a name is `transpose_copy_fusion.3`, or `transpose_copy_fusion_3` as a kernel of a GPU.
    """
    bare = re.sub(r"[.\d]+$", "", name)
    for kind, pattern in _KINDS.items():
        if pattern.search(bare):
            return kind
    return "element by element"
