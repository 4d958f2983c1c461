"""What a compiled program communicates, read from its text: collectives by kind and mesh axis.

Figures are bytes that one device sends in one step. The text is XLA's HLO, in which a program is a
list of named computations: the entry, and the bodies of its loops and fusions.

    %body (p: f32[8]) -> f32[8] {                                       a computation
      %g = f32[32]{0} all-gather(%p), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
    }
    ENTRY %main (x: f32[8]) -> f32[8] {                                 the entry
      %w = f32[8]{0} while(%x), condition=%cond, body=%body, ... "known_trip_count":{"n":"5"}
    }

Three rules turn lines into bytes:

- A collective inside a loop counts once for each trip. A loop whose number of trips isn't known
  when compiling (the steps of one call) counts once, so the figures are those of one step.
- Compilers cut one collective into pieces that share a channel, some of them in a loop that the
  rest overlaps with. So each channel counts once, as its piece that runs least often. What a
  shard_map sends is the exception: JAX gives all of it the same channel, and each counts, the
  pieces of a chain of fusions once.
- By the ring algorithm over n members a device sends (n - 1) / n of the gathered or scattered
  array, twice that for an all-reduce (Chan et al. 2007, "Collective communication"). Of an exchange
  of rows, whose result has room for more than comes where loads are even, what comes then counts,
  and what a program does instead where loads are too uneven doesn't count. It is a ragged
  all-to-all; on CPU a gather stands in for it, and counts as if it were one. The TPU's
  compiler writes a reduce-scatter as a fusion called `all-reduce-scatter`, of an all-reduce and a
  slice, which sends what a reduce-scatter sends. What goes from slice to slice is sent to the
  hosts, which add it up: it counts as an all-reduce along the replicas.
"""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from tinylm.core.expert_shards import REAL_ROWS
from tinylm.core.mesh import AXES, axes_spanned, mesh_sizes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# `%body (p: f32[8]) -> f32[8] {` or `ENTRY %main (x: f32[8]) -> f32[8] {`
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
# `%g = f32[32]{0} all-gather(%p), ...`, or in two halves: `... all-gather-start(%p), ...`
_COLLECTIVE = re.compile(
    rf"= (?P<shapes>.*?) (?:ragged-)?(?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\("
)
# `op_name=".../real_rows_16384_of_24576/ragged_all_to_all"`
_REAL_ROWS = re.compile(REAL_ROWS.format(r"(\d+)", r"(\d+)"))
# What a slice of TPUs has hosts add up with what the others have:
# `= (f32[8,128]{1,0}, u32[], token[]) send(%x, ...), ... _xla_megascale_transfer_type="ALL_REDUCE"`
_BETWEEN_SLICES = re.compile(
    r'= \((?P<shape>\S+), .* send\(.*_megascale_transfer_type="ALL_REDUCE"'
)
# `calls=%fusion.1`, `condition=%cond, body=%body`, `branch_computations={%one, %two}`
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations"
    r"|true_computation|false_computation)"
    r"=\{?((?:%[\w.-]+(?:, )?)+)"
)
# `%cond`, the name of a computation or of an operation
NAME = re.compile(r"%([\w.-]+)")
# `bf16[8,128]` in a shape, or in a tuple of shapes: `(bf16[8,128]{1,0}, u32[])`
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
# `{1,0:T(8,128)}` after an array: its layout in memory
_LAYOUT = re.compile(r"\{[^}]*\}")
# `channel_id=2`
_CHANNEL = re.compile(r"channel_id=(\d+)")
# `"known_trip_count":{"n":"5"}`, with or without quotes
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
# `condition=%condition, body=%body` of a while loop
_LOOP_PART = re.compile(r"(condition|body)=%?([\w.-]+)")
# `compare(%i.1, %limit), direction=LT`
_LESS = re.compile(r"compare\((%[\w.-]+), (%[\w.-]+)\), direction=LT")
# `ROOT %out = (bf16[10]{0}, u32[]) tuple(%moved, %next)`
_ROOT_TUPLE = re.compile(r"ROOT .* tuple\((.*?)\)")

# How collectives list the devices of their groups.
# `source_target_pairs={{0,2},{2,4}}`: a permutation, whose pairs take the place of groups
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{}]+)\}")
# `replica_groups={{0,1},{2,3}}`: all groups, listed; the first one is caught
_LISTED_GROUPS = re.compile(r"replica_groups=\{\{([\d,]+)\}")
# `replica_groups=[2,4]<=[4,2]T(1,0)`: 0 to 7 as a [4,2] array, transposed, as 2 rows of 4
_STRIDED_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# `replica_groups=mesh['a'=4,'b'=2] {'a'}`: the devices that differ along axis a
_NAMED_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}")

# `%f = (f32[8]{0}, ...) fusion(%x), kind=kCustom, calls=%async_collective_fusion.1`
_FUSED = re.compile(r" fusion\(.*\bcalls=%([\w.-]+)")
# The channel of all that shard_maps send. Compilers may drop their names, and combine several.
_CHANNEL_BY_HAND = "1"
# `frontend_attributes={chain_id="5"}`, which the pieces of one collective in fusions share
_CHAIN = re.compile(r'chain_id="(\d+)"')
# How the computation of a fusion is called that is an all-reduce and keeps a slice.
_REDUCE_SCATTER = "all-reduce-scatter"

# Types whose name doesn't end in their width in bits, or not in the width that they take.
_ITEM_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4}

ENTRY = ""  # the name under which the entry is kept

Computations = dict[str, list[str]]  # the lines of each computation by its name


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of a program of one kind along the same mesh axes."""

    kind: str  # one of KINDS
    axis: str  # the mesh axes that their groups span, "+" between them
    bytes_per_step: float  # what one device sends


class _Call(NamedTuple):
    """That a computation runs another one."""

    callee: str
    times: int  # in one run of the caller


def read_collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Return the collectives of a compiled program, those of one kind and axis added up.

    Args:
      text: `compiled.as_text()` of a program for one step.
      mesh: the mesh that it was compiled for.
    """
    computations = split_into_computations(text)
    trips_of = count_trips(computations)
    fusions = fusions_in(computations)
    by_channel: dict[object, Collective] = {}
    for name, lines in computations.items():
        # The entry never gets to some.
        if not trips_of[name]:
            continue
        for number, line in enumerate(lines):
            found = read_collective(line, name, trips_of[name], mesh)
            if found is None:
                continue
            channel = channel_of(line, name in fusions) or (name, number)
            known = by_channel.get(channel)
            if known is None or found.bytes_per_step < known.bytes_per_step:
                by_channel[channel] = found
    totals: dict[tuple[str, str], float] = collections.defaultdict(float)
    for one in by_channel.values():
        totals[one.kind, one.axis] += one.bytes_per_step
    return [Collective(kind, axis, sent) for (kind, axis), sent in sorted(totals.items())]


def split_into_computations(text: str) -> Computations:
    """Return the lines of each computation by its name, those of the entry under ENTRY."""
    computations: Computations = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head is None:
            lines.append(line)
        else:
            name = ENTRY if line.startswith("ENTRY") else head.group(1)
            lines = computations.setdefault(name, [])
    return computations


def read_collective(line: str, computation: str, trips: int, mesh: Mesh) -> Collective | None:
    """Return the collective of a line that runs `trips` times a step, None where nothing is sent.

    Such a line is

        %g = f32[32]{0} all-gather(%p), channel_id=2, replica_groups=[2,4]<=[8], dimensions={0}
    """
    between = _BETWEEN_SLICES.search(line)
    if between is not None:
        num_replicas = mesh_sizes(mesh).replica
        array_bytes = _array_bytes(*_ARRAY.findall(_LAYOUT.sub("", between["shape"]))[0])
        sent = 2 * array_bytes * (num_replicas - 1) / num_replicas
        return Collective("all-reduce", AXES.replica, sent * trips)
    found = _COLLECTIVE.search(line)
    if found is None:
        return None
    group = _first_group(line, mesh.size)
    if len(group) == 1:
        return None
    axis = "+".join(axes_spanned(mesh, group))
    sent = _sent_bytes(found, len(group)) * trips
    exchange = _REAL_ROWS.search(line)
    if exchange:
        real, rows = map(int, exchange.groups())
        return Collective("all-to-all", axis, sent * real / rows)
    if computation.startswith(_REDUCE_SCATTER):
        return Collective("reduce-scatter", axis, sent / 2)
    return Collective(found["kind"], axis, sent)


def fusions_in(computations: Computations) -> set[str]:
    """Return the names of the fusions that may each hold a piece of a collective."""
    names: set[str] = set()
    for lines in computations.values():
        for line in lines:
            names.update(_FUSED.findall(line))
    return {name for name in names if not name.startswith(_REDUCE_SCATTER)}


def channel_of(line: str, is_in_fusion: bool) -> tuple[str, str] | None:
    """Return what pieces of one collective have in common, None where the line stands alone.

    It is their channel, and their chain where there is one.

    Args:
      line: of the collective.
      is_in_fusion: whether it is in one of `fusions_in`.
    """
    found = _CHANNEL.search(line)
    if found is None or _BETWEEN_SLICES.search(line):
        return None
    channel = found.group(1)
    if not is_in_fusion:
        return None if channel == _CHANNEL_BY_HAND else (channel, "")
    chain = _CHAIN.search(line)
    return (channel, chain.group(1) if chain else "")


def count_trips(computations: Computations) -> dict[str, int]:
    """Return how often each computation runs in one run of the program."""
    calls: dict[str, list[_Call]] = {}
    for name, lines in computations.items():
        calls[name] = []
        for line in lines:
            times = 1
            if " while(" in line:
                times = loop_trips(line, computations)
            callees = _callees(line)
            if " conditional(" in line:
                callees = _branches_taken(callees, computations)
            for callee in callees:
                calls[name].append(_Call(callee, times))
    trips: dict[str, int] = collections.Counter()
    trips[ENTRY] = 1
    for name in _callers_first(calls):
        for call in calls[name]:
            trips[call.callee] += trips[name] * call.times
    return trips


def _callees(line: str) -> list[str]:
    """Return the names of the computations that a line runs, or may run."""
    return [callee for called in _CALLED.findall(line) for callee in NAME.findall(called)]


def _branches_taken(callees: list[str], computations: Computations) -> list[str]:
    """Leave out, of the branches of a condition, those that take the place of an exchange of rows,
    where there is one: they run where loads are very uneven.
    """
    exchanging = [callee for callee in callees if _exchanges_rows(callee, computations)]
    return exchanging or callees


def _exchanges_rows(name: str, computations: Computations) -> bool:
    """Say whether a computation, or one that it runs, sends rows to their experts."""
    for line in computations.get(name, []):
        if _COLLECTIVE.search(line) and _REAL_ROWS.search(line):
            return True
        if any(_exchanges_rows(callee, computations) for callee in _callees(line)):
            return True
    return False


def _callers_first(calls: dict[str, list[_Call]]) -> list[str]:
    """Return the computations that the entry reaches, each after all of its callers."""
    callees_first: dict[str, None] = {}

    def visit(name: str) -> None:
        if name not in calls or name in callees_first:
            return
        for call in calls[name]:
            visit(call.callee)
        callees_first[name] = None

    visit(ENTRY)
    return list(reversed(callees_first))


def loop_trips(line: str, computations: Computations) -> int:
    """Return the trips of a while loop as XLA annotates them, or as its counter tells; else 1."""
    annotated = _TRIPS.search(line)
    if annotated:
        return int(annotated.group(1))
    parts = dict(_LOOP_PART.findall(line))
    condition = computations.get(parts.get("condition", ""), [])
    body = computations.get(parts.get("body", ""), [])
    return _trips_of_counter("\n".join(condition), "\n".join(body)) or 1


def _trips_of_counter(condition: str, body: str) -> int | None:
    """Return the trips of a loop that counts from 0 up to a constant, None where it doesn't.

    The condition names the counter and its limit, the body what the counter grows by:

        %i.1 = u32[] get-tuple-element(%p.1), index=1
        %limit = u32[] constant(8)
        ROOT %less = pred[] compare(%i.1, %limit), direction=LT

        %next = u32[] add(%i, %step)
        ROOT %out = (bf16[10]{0}, u32[]) tuple(%moved, %next)
    """
    compared = _LESS.search(condition)
    if compared is None:
        return None
    counter, limit_name = compared.groups()
    limit = _constant(limit_name, condition)
    if not limit:
        return None
    # `%i.1 = u32[] get-tuple-element(%p.1), index=1`
    place = re.search(rf"{re.escape(counter)} = .*index=(\d+)", condition)
    result = _ROOT_TUPLE.search(body)
    if place is None or result is None:
        return limit
    results = NAME.findall(result.group(1))
    next_counter = re.escape(results[int(place.group(1))])
    # `%next = u32[] add(%i, %step)`
    added = re.search(rf"%{next_counter} = .* add\(%[\w.-]+, (%[\w.-]+)\)", body)
    growth = 1
    if added:
        growth = _constant(added.group(1), body) or 1
    return math.ceil(limit / growth)


def _constant(name: str, computation: str) -> int | None:
    """Return the integer of `%limit = u32[] constant(8)`, None where `name` isn't a constant."""
    found = re.search(rf"{re.escape(name)} = [su]32\[\].* constant\((\d+)\)", computation)
    return int(found.group(1)) if found else None


def _sent_bytes(found: re.Match, num_members: int) -> float:
    """Return the bytes that one device sends for one collective of `num_members`."""
    # What is in a layout isn't an array.
    shapes = _LAYOUT.sub("", found["shapes"])
    sizes = [_array_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(shapes)]
    # The first half of a collective in two halves lists its operand and its result.
    whole_or_result = max(sizes) if found["start"] else sum(sizes)
    ring = (num_members - 1) / num_members
    kind = found["kind"]
    if kind == "all-reduce":
        return 2 * whole_or_result * ring
    if kind == "reduce-scatter" and not found["start"]:
        # Its result is a member's part.
        return whole_or_result * num_members * ring
    if kind == "collective-permute":
        return whole_or_result
    return whole_or_result * ring


def _array_bytes(dtype: str, dims: str) -> float:
    """Return the size of `bf16[8,128]`, given its two parts."""
    width = re.search(r"\d+", dtype)
    default_bits = int(width.group()) if width else 32
    bits = _ITEM_BITS.get(dtype, default_bits)
    # A scalar, `u32[]`, has no sizes.
    num_items = math.prod(_integers(dims)) if dims else 1
    return num_items * bits / 8


def _first_group(line: str, num_devices: int) -> np.ndarray:
    """Return the numbers of the devices of a collective's first group."""
    pairs = _PAIRS.search(line)
    if pairs:
        for source, target in re.findall(r"(\d+),(\d+)", pairs.group(1)):
            # A device that sends to itself sends nothing.
            if source != target:
                return np.array([int(source), int(target)])
        return np.array([0])

    listed = _LISTED_GROUPS.search(line)
    if listed:
        return np.array(_integers(listed.group(1)))

    devices = np.arange(num_devices)
    strided = _STRIDED_GROUPS.search(line)
    if strided:
        groups_shape, source_shape, order = strided.groups()
        devices = devices.reshape(_integers(source_shape))
        if order:
            devices = devices.transpose(_integers(order))
        groups = devices.reshape(_integers(groups_shape))
        return groups[0]

    named = _NAMED_GROUPS.search(line)
    if named:
        # `'a'=4,'b'=2`
        axes = re.findall(r"'([^']+)'=(\d+)", named.group(1))
        spanned = re.findall(r"'([^']+)'", named.group(2))
        sizes = [int(size) for _, size in axes]
        first = tuple(slice(None) if name in spanned else 0 for name, _ in axes)
        return devices.reshape(sizes)[first].ravel()

    # `replica_groups={}`: one group of all devices.
    return devices


def _integers(text: str) -> tuple[int, ...]:
    """Return the numbers of `4,2`."""
    return tuple(int(number) for number in text.split(","))
