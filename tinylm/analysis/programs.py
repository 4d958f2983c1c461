"""What a compiled program communicates, read from its text: collectives by kind and by mesh axis, with bytes a step.

A collective inside a loop counts once a trip; a loop whose trips are not known when compiling (the steps of one call)
counts once, so the figures are those of one step. Compilers cut one collective into pieces that share a channel, some
in a loop that it overlaps with, which is why each channel counts once, as its piece of the fewest trips; but all sums
of a shard_map (psum) share one channel, and each counts. Bytes are what one device sends by the ring algorithm over n
members: (n - 1) / n of the gathered or scattered array, twice that for an all-reduce (Chan et al. 2007, "Collective
communication"). The TPU's compiler writes a reduce-scatter as a fusion `all-reduce-scatter` of an all-reduce and a
slice; it sends what a reduce-scatter sends.
"""

import collections
import dataclasses
import math
import re

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_ITEM_BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?((?:%[\w.-]+(?:, )?)+)"
)
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program: its kind, the mesh axes that its groups span, bytes a device sends in a step."""

    kind: str
    axis: str
    bytes_per_step: float


def read_collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Return the collectives of a compiled program for `mesh`, those of one kind and axis added up."""
    computations = _computations(text)
    trips = _trips(computations)
    channels: dict[tuple, tuple[str, str, float]] = {}
    for name, lines in computations.items():
        for number, line in enumerate(lines):
            found = _COLLECTIVE.search(line)
            if not found or not trips[name]:
                continue
            channel = "/psum" not in line and re.search(r"channel_id=(\d+)", line)
            key = ("channel", channel.group(1)) if channel else (name, number)
            axis, members = _span(line, mesh)
            scatters = name.startswith("all-reduce-scatter")
            kind = "reduce-scatter" if scatters else found.group(2)
            sent = _sent_bytes(found, members) * trips[name] / (2 if scatters else 1)
            if members > 1 and sent < channels.get(key, ("", "", math.inf))[2]:
                channels[key] = (kind, axis, sent)
    totals: dict[tuple[str, str], float] = collections.defaultdict(float)
    for kind, axis, sent in channels.values():
        totals[kind, axis] += sent
    return [Collective(kind, axis, sent) for (kind, axis), sent in sorted(totals.items())]


def _computations(text: str) -> dict[str, list[str]]:
    """Return the lines of each computation by its name, the entry as ''."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            lines = found.setdefault("" if line.startswith("ENTRY") else head.group(1), [])
        else:
            lines.append(line)
    return found


def _trips(computations: dict[str, list[str]]) -> dict[str, int]:
    """Return how often each computation runs in a run of the program."""
    calls: dict[str, list[tuple[str, int]]] = {name: [] for name in computations}
    for name, lines in computations.items():
        for line in lines:
            times = _loop_trips(line, computations) if " while(" in line else 1
            for called in _CALLED.finditer(line):
                calls[name] += [(callee, times) for callee in re.findall(r"%([\w.-]+)", called.group(1))]
    trips: dict[str, int] = collections.Counter({"": 1})
    order = _callers_first(calls)
    for name in order:
        for callee, times in calls[name]:
            trips[callee] += trips[name] * times
    return trips


def _callers_first(calls: dict[str, list[tuple[str, int]]]) -> list[str]:
    """Return the computations that the entry reaches, each after all its callers."""
    done: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in calls and name not in done:
            for callee, _ in calls[name]:
                visit(callee)
            done[name] = None

    visit("")
    return list(reversed(done))


def _loop_trips(line: str, computations: dict[str, list[str]]) -> int:
    """Return the trips of a while loop: as annotated, or its counter's limit over what it grows by; else 1."""
    known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
    if known:
        return int(known.group(1))
    called = dict(re.findall(r"(condition|body)=%?([\w.-]+)", line))
    condition, body = ("\n".join(computations.get(called.get(part, ""), ())) for part in ("condition", "body"))
    compared = re.search(r"compare\((%[\w.-]+), (%[\w.-]+)\), direction=LT", condition)
    limit = _constant(compared.group(2), condition) if compared else None
    if not compared or not limit:
        return 1
    place = re.search(rf"{re.escape(compared.group(1))} = .*index=(\d+)", condition)
    made = re.search(r"ROOT .* tuple\((.*?)\)", body)
    name = re.findall(r"%[\w.-]+", made.group(1))[int(place.group(1))] if made and place else "%"
    added = re.search(rf"{re.escape(name)} = .* add\(%[\w.-]+, (%[\w.-]+)\)", body)
    return -(-limit // ((_constant(added.group(1), body) if added else None) or 1))


def _constant(name: str, text: str) -> int | None:
    """Return the value of the integer constant that a computation calls `name`, or None."""
    found = re.search(rf"{re.escape(name)} = [su]32\[\].* constant\((\d+)\)", text)
    return int(found.group(1)) if found else None


def _sent_bytes(found: re.Match, members: int) -> float:
    """Return the bytes that one device sends for one collective of `members`."""
    shapes, kind, is_start = found.groups()
    sizes = [_array_bytes(*array.groups()) for array in _ARRAY.finditer(re.sub(r"\{[^}]*\}", "", shapes))]
    result = max(sizes) if is_start else sum(sizes)
    part = (members - 1) / members
    return {
        "all-gather": result * part,
        "all-reduce": 2 * result * part,
        "reduce-scatter": (result if is_start else result * members) * part,
        "all-to-all": result * part,
        "collective-permute": result,
    }[kind]


def _array_bytes(dtype: str, dims: str) -> float:
    width = re.search(r"\d+", dtype)
    bits = _ITEM_BITS.get(dtype) or (int(width.group()) if width else 32)
    return math.prod(int(dim) for dim in dims.split(",") if dim) * bits / 8


def _span(line: str, mesh: Mesh) -> tuple[str, int]:
    """Return the mesh axes along which the devices of a group differ ("+" between them), and how many they are."""
    group = _first_group(line, mesh.size)
    places = np.stack(np.unravel_index(group, mesh.devices.shape))
    differing = [name for name, row in zip(mesh.axis_names, places, strict=True) if len(set(row.tolist())) > 1]
    return "+".join(differing), len(group)


def _first_group(line: str, num_devices: int) -> np.ndarray:
    """Return the devices of the first group of a collective, in any of the three notations, or of a permutation."""
    pairs = re.search(r"source_target_pairs=\{([\d,{}]+)\}", line)
    if pairs:
        ends = [pair for pair in re.findall(r"(\d+),(\d+)", pairs.group(1)) if pair[0] != pair[1]]
        return np.array(ends[0] if ends else (0,), int)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return np.array([int(number) for number in listed.group(1).split(",")])
    strided = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if strided:
        shape, source, order = (tuple(map(int, part.split(","))) if part else None for part in strided.groups())
        return np.arange(num_devices).reshape(source).transpose(order).reshape(shape)[0]
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named.group(1))}
        ours = re.findall(r"'([^']+)'", named.group(2))
        places = np.arange(num_devices).reshape(tuple(sizes.values()))
        return places[tuple(slice(None) if name in ours else 0 for name in sizes)].ravel()
    return np.arange(num_devices)  # no groups: all devices
