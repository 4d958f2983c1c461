"""Where a program's time goes: operations of a profile added up by kind.

XLA marks the event of each operation that it runs with `hlo_op`, on every platform; an operation's
name tells what was fused in it. Loops and calls contain the operations that they run, so they are
left out. Where operations run side by side, their times add up to more than the clock's.
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
    # `all-reduce-start.1`, `ncclDevKernel_AllGather`
    "communication": re.compile("all-|reduce-scatter|collective|nccl"),
    # `dot.12`, `ynn_fusion.3`, `gemm_fusion_dot.1`
    "matmuls": re.compile("ynn_|onednn|dot|gemm|cublas|cutlass|cudnn|matmul|conv"),
    # `wrapped_scatter`, `dynamic-update-slice.4`
    "gathers and scatters": re.compile("gather|scatter|dynamic"),
    # `loop_transpose_fusion`, `copy_bitcast_fusion.7`: nothing but words of these
    "transposes and copies": re.compile(
        r"^((wrapped|loop|input|transpose|copy|bitcast|slice|pad|concatenate|broadcast|reshape|memcpy|fusion)[\W_]*)+$"
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
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
        for name, operation_secs in _operations(path):
            if not _CONTAINERS.match(name):
                secs[kind_of(name)] += operation_secs
    largest_first = sorted(secs.items(), key=lambda item: -item[1])
    return dict(largest_first)


def _operations(path: pathlib.Path) -> Iterator[tuple[str, float]]:
    """Yield name and seconds of each operation of a trace."""
    for plane in ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name:
                    yield str(name), event.duration_ns / 1e9


def kind_of(name: str) -> str:
    """Return the kind of an operation by its name in the compiled program.

    Such a name is `transpose_copy_fusion.3`.
    """
    bare = re.sub(r"[.\d]+$", "", name)
    for kind, pattern in _KINDS.items():
        if pattern.search(bare):
            return kind
    return "element by element"
