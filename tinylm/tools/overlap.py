"""How much of a program's communication hides behind its products, read from its schedule.

The text of a compiled TPU program is a schedule (`is_scheduled=true`): the operations of a
computation run in the order of its lines. A collective is asynchronous where one line starts it and
a later one waits for it. The link works while the lines between them run:

    start of A     (4 ms on the link)
    product        3 ms          hides 3 ms of A
    start of B     (2 ms)
    product        2 ms          hides the rest of A, 1 ms, and 1 ms of B
    wait for A     nothing is left of it
    wait for B     1 ms of it is not hidden

The time of a product is its FLOPs at the chip's peak rate for bfloat16, that of a collective its
bytes at the rate of the link. The real product takes longer, so what this says is the least that is
hidden. What isn't known counts as not hidden: everything but products, kernels written in Pallas,
and a collective that is started in one trip of a loop and waited for in the next one.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

from tinylm.core.chips import SLICE_BYTES_PER_SEC, Chip
from tinylm.core.mesh import crosses_slices
from tinylm.tools.programs import (
    ENTRY,
    KINDS,
    NAME,
    Collective,
    channel_of,
    count_trips,
    fusions_in,
    loop_trips,
    read_collective,
    split_into_computations,
)

# `  ROOT %name = bf16[8,128]{1,0} convolution(%a, %b), ...`; a tuple's shape is in brackets
_OPERATION = re.compile(
    r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<code>[\w-]+)\((?P<rest>.*)"
)
# `bf16[2,1024,768]{2,1,0}`: the sizes of an array
_SIZES = re.compile(r"^\w+\[([\d,]*)\]")
# `calls=%fused_computation.12`, `to_apply=%region_1`
_CALLS = re.compile(r"(?:calls|to_apply)=%([\w.-]+)")
# `condition=%cond, body=%body`
_BODY = re.compile(r"body=%([\w.-]+)")
# `lhs_contracting_dims={1}`
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
# `dim_labels=0bf_0oi->0bf`: b batch, f features, i and o features in and out, digits the window's
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
# `window={size=1x12 pad=0_0x11_11 rhs_reversal=0x1}`
_WINDOW = re.compile(r"window=\{([^}]*)\}")


@dataclasses.dataclass
class _Flight:
    """A collective on its way, from its start to its wait."""

    channel: object  # what pieces of one collective have in common
    what: Collective
    secs: float  # that the link takes
    left_secs: float  # that are not hidden yet


class _Work(NamedTuple):
    """What one run of a computation takes."""

    product_secs: float
    hiding_secs: float  # the part of it that hides collectives which start and end in it


def is_schedule(text: str) -> bool:
    """Say whether the lines of a program's text are in the order in which they run."""
    return "is_scheduled=true" in text.split("\n", 1)[0]


def link_rate(mesh: Mesh, chip: Chip, axis: str) -> float:
    """Return the bytes/s that a chip sends along a mesh axis, or along several ("data+model")."""
    return SLICE_BYTES_PER_SEC if crosses_slices(mesh, axis) else chip.link_bytes_per_sec


def hidden_bytes(text: str, mesh: Mesh, chip: Chip) -> dict[tuple[str, str], float]:
    """Return the bytes of a step that products hide, by kind and axis of the collective.

    Args:
      text: `compiled.as_text()` of a program for one step.
      mesh: the mesh that it was compiled for.
      chip: of its devices.
    """
    return _Schedule(text, mesh, chip).hidden_bytes()


class _Schedule:
    """A program as computations that are walked in the order of their lines."""

    def __init__(self, text: str, mesh: Mesh, chip: Chip):
        """Walk all computations that the program runs."""
        self.computations = split_into_computations(text)
        self.trips = count_trips(self.computations)
        self.mesh = mesh
        self.chip = chip
        # What operations call, whose collectives count there.
        self.called = set(re.findall(r"\bcalls=%([\w.-]+)", text))
        self.fusions = fusions_in(self.computations)
        self.flights: dict[str, list[_Flight]] = {}  # of each computation that was walked
        self.work: dict[str, _Work] = {}
        self.sizes: dict[str, dict[str, tuple[int, ...]]] = {}
        self.work_of(ENTRY)

    def hidden_bytes(self) -> dict[tuple[str, str], float]:
        """Return the hidden bytes of a step by kind and axis.

        As in `read_collectives` each channel counts once, as its piece that runs least often.
        """
        by_channel: dict[object, tuple[float, _Flight]] = {}
        for name, flights in self.flights.items():
            for flight in flights:
                sent_bytes = flight.what.bytes_per_step * self.trips[name]
                known = by_channel.get(flight.channel)
                if known is None or sent_bytes < known[0]:
                    by_channel[flight.channel] = sent_bytes, flight
        found: dict[tuple[str, str], float] = collections.defaultdict(float)
        for sent_bytes, flight in by_channel.values():
            hidden_part = 1 - flight.left_secs / flight.secs
            found[flight.what.kind, flight.what.axis] += hidden_part * sent_bytes
        return dict(found)

    def work_of(self, name: str) -> _Work:
        """Walk a computation, once, and return what one run of it takes."""
        if name not in self.work:
            self.work[name] = self._walk(name)
        return self.work[name]

    def _walk(self, name: str) -> _Work:
        flights: list[_Flight] = []
        in_flight: dict[str, _Flight] = {}
        product_secs = 0.0
        hiding_secs = 0.0
        for line in self.computations.get(name, []):
            operation = _OPERATION.match(line)
            if operation is None:
                continue
            work = self._work_of_line(operation, name)
            product_secs += work.product_secs
            hiding_secs += work.hiding_secs
            # What a loop hides by itself keeps the link from the collectives around it.
            free_secs = work.product_secs - work.hiding_secs
            # The link takes one after the other.
            for flight in in_flight.values():
                hidden_secs = min(free_secs, flight.left_secs)
                flight.left_secs -= hidden_secs
                free_secs -= hidden_secs

            for mark, flight in self._started_by(operation, name):
                if mark is None:
                    flights.append(flight)
                else:
                    in_flight[mark] = flight
            for mark in self._waited_for_by(operation, name):
                if mark in in_flight:
                    flights.append(in_flight.pop(mark))
        # What nobody waits for here is waited for elsewhere, or never.
        for flight in in_flight.values():
            flight.left_secs = flight.secs
            flights.append(flight)
        self.flights[name] = flights
        hiding_secs += sum(flight.secs - flight.left_secs for flight in flights)
        return _Work(product_secs, hiding_secs)

    def _work_of_line(self, operation: re.Match, computation: str) -> _Work:
        """Return what an operation takes, without the collectives that it starts."""
        code = operation["code"]
        rest = operation["rest"]
        if code in ("dot", "convolution"):
            flops = product_flops(operation, self._sizes_in(computation))
            return _Work(flops / self.chip.peak_flops, 0.0)
        if code == "while":
            body = _BODY.search(rest)
            if body is None:
                return _Work(0.0, 0.0)
            once = self.work_of(body.group(1))
            trips = loop_trips(operation.string, self.computations)
            return _Work(once.product_secs * trips, once.hiding_secs * trips)
        called = _CALLS.search(rest)
        if code in ("fusion", "call") and called:
            return self.work_of(called.group(1))
        return _Work(0.0, 0.0)

    def _started_by(
        self, operation: re.Match, computation: str
    ) -> Iterator[tuple[str | None, _Flight]]:
        """Yield the collectives that an operation starts, each with its mark, by which the
        operation that waits for it is known; None where it is over with this operation.
        """
        for line, name in self._collective_lines(operation, computation):
            role = self._role(line, name)
            if role in ("continued", "waited for"):
                continue
            what = read_collective(line, name, 1, self.mesh)
            if what is None:
                continue
            is_asynchronous = role == "started" or operation["code"].endswith("-start")
            mark = self._mark(operation, line)
            channel = channel_of(line, name in self.fusions) or (computation, operation["name"])
            secs = what.bytes_per_step / link_rate(self.mesh, self.chip, what.axis)
            flight = _Flight(channel, what, secs, secs)
            yield mark if is_asynchronous else None, flight

    def _waited_for_by(self, operation: re.Match, computation: str) -> Iterator[str]:
        """Yield the marks of the collectives that an operation waits for."""
        # `%g.done = f32[8]{0} all-gather-done(%g)`, or `async-done(%g)`
        if operation["code"].endswith("-done"):
            yield NAME.findall(operation["rest"])[0]
            return
        for line, name in self._collective_lines(operation, computation):
            if self._role(line, name) == "waited for":
                yield self._mark(operation, line)

    def _collective_lines(self, operation: re.Match, computation: str) -> Iterator[tuple[str, str]]:
        """Yield the lines that hold an operation's collectives, and their computation."""
        if operation["code"].removesuffix("-start") in KINDS and computation not in self.called:
            yield operation.string, computation
        called = _CALLS.search(operation["rest"])
        # `%c = (...) call-start(%x), async_execution_thread="sparsecore", to_apply=%gathers`: TPU7x
        # has a core of its own for collectives.
        if operation["code"] in ("fusion", "async-start", "call-start") and called:
            name = called.group(1)
            for line in self.computations.get(name, []):
                inner = _OPERATION.match(line)
                if inner and inner["code"] in KINDS:
                    yield line, name

    def _role(self, line: str, name: str) -> str:
        """Return what a fusion does with a collective that is cut into several fusions.

        Each of them has a line of the collective. One starts it, and one waits for it:

            %g = bf16[8,3]{1,0} all-gather(%p), channel_id=46, ...
            ROOT %s = (bf16[1,3], ...) custom-call(%g), custom_call_target="AsyncCollectiveStart"

            %g = bf16[8,3]{1,0} all-gather(%p), channel_id=46, ...
            ROOT %d = bf16[8,3] custom-call(%p, %g), custom_call_target="AsyncCollectiveDone"

        Those between, named `async_collective_fusion`, move a part of it while they compute.
        """
        operation = _OPERATION.match(line)
        assert operation is not None, "it was read as an operation before"
        mark = re.compile(rf"%{re.escape(operation['name'])}\b")
        for other in self.computations.get(name, []):
            if "AsyncCollectiveStart" in other and mark.search(other):
                return "started"
            if "AsyncCollectiveDone" in other and mark.search(other):
                return "waited for"
        if name.startswith("async_collective_fusion"):
            return "continued"
        return "whole"

    def _mark(self, operation: re.Match, line: str) -> str:
        """Return the channel of a collective that is cut into fusions, or the name of the operation
        that starts it.
        """
        if operation["code"] == "fusion":
            return str(channel_of(line, is_in_fusion=True))
        return operation["name"]

    def _sizes_in(self, computation: str) -> dict[str, tuple[int, ...]]:
        """Return the sizes of the arrays in a computation by their names."""
        if computation not in self.sizes:
            self.sizes[computation] = {}
            for line in self.computations[computation]:
                operation = _OPERATION.match(line)
                if operation:
                    self.sizes[computation][operation["name"]] = _sizes(operation["shape"])
        return self.sizes[computation]


def product_flops(operation: re.Match, sizes: dict[str, tuple[int, ...]]) -> float:
    """Return the FLOPs of a product, two for each multiplication, given the sizes of its operands.

    Such a line is

        %y = f32[8,16]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
        %y = f32[8,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
    """
    operands = NAME.findall(operation["rest"])[:2]
    if len(operands) < 2 or not all(sizes.get(name) for name in operands):
        return 0.0
    left, right = (sizes[name] for name in operands)
    result = _sizes(operation["shape"])
    if operation["code"] == "dot":
        contracted = _CONTRACTED.search(operation["rest"])
        dims = _integers(contracted.group(1)) if contracted else ()
        return 2.0 * math.prod(result) * math.prod(left[dim] for dim in dims)

    labels = _LABELS.search(operation["rest"])
    if labels is None:
        return 0.0
    left_labels, right_labels, result_labels = labels.groups()
    window = _window(operation["rest"])
    multiplications = 1
    for label in set(left_labels + right_labels + result_labels):
        if label == "b":
            multiplications *= result[result_labels.index("b")]
        elif label == "i":
            multiplications *= right[right_labels.index("i")]
        elif label == "o":
            multiplications *= right[right_labels.index("o")]
        elif label.isdigit():
            multiplications *= _pairs_in_window(
                left[left_labels.index(label)],
                right[right_labels.index(label)],
                result[result_labels.index(label)],
                window.get(int(label), {}),
            )
    return 2.0 * multiplications


def _window(rest: str) -> dict[int, dict[str, str]]:
    """Return the settings of each dimension of `window={size=1x12 pad=0_0x11_11}` by their
    names.
    """
    found = _WINDOW.search(rest)
    dims: dict[int, dict[str, str]] = collections.defaultdict(dict)
    if found:
        for setting in found.group(1).split():
            name, _, values = setting.partition("=")
            for dim, value in enumerate(values.split("x")):
                dims[dim][name] = value
    return dims


def _pairs_in_window(left: int, right: int, result: int, window: dict[str, str]) -> int:
    """Return how many pairs of a place of the result and one of the window meet an element.

    TPUs compute products of several matrices as convolutions in which most pairs meet padding.
    """
    stride = int(window.get("stride", 1))
    left_step = int(window.get("lhs_dilate", 1))
    right_step = int(window.get("rhs_dilate", 1))
    before = int(window.get("pad", "0_0").split("_")[0])
    places = np.arange(result)[:, None] * stride + np.arange(right)[None] * right_step - before
    meets = (places >= 0) & (places < (left - 1) * left_step + 1) & (places % left_step == 0)
    return int(meets.sum())


def _sizes(shape: str) -> tuple[int, ...]:
    """Return the sizes of `bf16[2,1024,768]{2,1,0}`; none for a scalar or a tuple."""
    found = _SIZES.match(shape)
    return _integers(found.group(1)) if found else ()


def _integers(text: str) -> tuple[int, ...]:
    """Return the numbers of `4,2`."""
    return tuple(int(number) for number in text.split(",") if number)
