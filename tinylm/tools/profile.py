"""Where a program's time goes: operations of a profile added up by kind.

XLA marks the event of each operation that it runs with `hlo_op`, on every platform; an operation's
name tells what was fused in it. Loops and calls contain the operations that they run, so they are
left out. Where operations run side by side, their times add up to more than the clock's.
"""

import collections
import pathlib
import re

from jax.profiler import ProfileData

_CONTAINERS = re.compile(r"^(while|call|conditional|async|ThreadpoolListener)")
_KINDS = {
    "communication": re.compile("all-|reduce-scatter|collective|nccl"),
    "matmuls": re.compile("ynn_|onednn|dot|gemm|cublas|cutlass|cudnn|matmul|conv"),
    "gathers and scatters": re.compile("gather|scatter|dynamic"),
    "transposes and copies": re.compile(
        r"^((wrapped|loop|input|transpose|copy|bitcast|slice|pad|concatenate|broadcast|reshape|memcpy|fusion)[\W_]*)+$"
    ),
    "reductions": re.compile("reduce"),
}


def secs_by_kind(folder: str) -> dict[str, float]:
    """Return the seconds spent in each kind of operation, the largest first, from the traces in
    `folder`.
    """
    secs: dict[str, float] = collections.defaultdict(float)
    for path in pathlib.Path(folder).rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    name = dict(event.stats).get("hlo_op")
                    if name and not _CONTAINERS.match(str(name)):
                        secs[kind_of(str(name))] += event.duration_ns / 1e9
    return dict(sorted(secs.items(), key=lambda item: -item[1]))


def kind_of(name: str) -> str:
    """Return the kind of an operation by its name in the compiled program, such as
    `transpose_copy_fusion.3`.
    """
    bare = re.sub(r"[.\d]+$", "", name)
    return next(
        (kind for kind, known in _KINDS.items() if known.search(bare)), "element by element"
    )
