"""Rows: the examples of a split at random access, each a pure function of (seed, index).

Index i is row `i % rows` of epoch `i // rows`. Each epoch has its own order (Grain's index shuffle,
a Feistel network over the row numbers: no permutation is stored) and, for windows, its own offset
of the grid. So any example can be made anywhere, by any thread or process, with nothing remembered.
A mixture interleaves such rows by a fixed schedule.
"""

import functools
import hashlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from tinylm.data.packing import DocumentPlan, Pieces, StreamPlan
from tinylm.data.store import Store, TokenArray

# One row of a batch for each index that was asked for; `core.batch` has the names and types. It is
# not imported here, for it needs JAX, which preparing goes without.
Examples = dict[str, np.ndarray]


class Rows(Protocol):
    """What train and evaluation read."""

    def __len__(self) -> int:
        """Return the rows of an epoch."""

    def read(self, indices: np.ndarray) -> Examples:
        """Return tokens, targets, weights (and segments, positions when packed), each
        [len(indices), seq_len].
        """


def draw(*purpose: object) -> int:
    """Return 32 random bits that depend on `purpose` alone."""
    text = repr(purpose).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


class SplitRows:
    """The rows of one split of one store; `seed` None gives them in order on the grid at 0, as
    evaluation wants.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        plan: StreamPlan | DocumentPlan,
        seq_len: int,
        seed: object = None,
    ):
        self._store, self._plan, self._seq_len, self._seed = store, plan, seq_len, seed
        self._begin, self._end = store.manifest["splits"][split]["tokens"]
        self._eot_id = store.manifest["tokenizer"]["eot_id"]
        self.use_mask, self.packed = False, False

    def __len__(self) -> int:
        return self._plan.num_rows

    @property
    def split_documents(self) -> int:
        """How many documents are longer than a row, and so lie in several."""
        return self._plan.num_split

    def read(self, indices: np.ndarray) -> Examples:
        """Return the examples of `indices`, counted over all epochs."""
        epochs, rows = np.divmod(np.asarray(indices, np.int64), len(self))
        offsets = np.zeros(len(rows), np.int64)
        if self._seed is not None:
            from grain.experimental import index_shuffle

            last, seeds = (
                len(self) - 1,
                {epoch: self._draw(epoch) for epoch in set(epochs.tolist())},
            )
            shuffled = [
                index_shuffle(row, max_index=last, seed=seeds[epoch][0], rounds=4)
                for epoch, row in zip(epochs.tolist(), rows.tolist(), strict=True)
            ]
            rows = np.array(shuffled, np.int64)
            offsets = np.array([seeds[epoch][1] for epoch in epochs.tolist()], np.int64)
        return self._assemble(len(rows), self._plan.pieces(rows, offsets))

    def _draw(self, epoch: int) -> tuple[int, int]:
        """Return the seed of an epoch's order, and the offset of its grid."""
        offset = draw(self._seed, "grid", epoch) % min(self._seq_len, self._end - self._begin)
        return draw(self._seed, "order", epoch), offset

    def _assemble(self, num_rows: int, pieces: Pieces) -> Examples:
        shape = (num_rows, self._seq_len)
        tokens = np.full(shape, self._eot_id, np.int32)
        targets = np.full(shape, self._eot_id, np.int32)
        weights = np.zeros(shape, np.float32)
        window = np.empty(self._seq_len + 1, np.int32)
        for row, column, start, length in zip(*(part.tolist() for part in pieces), strict=True):
            here = slice(column, column + length)
            self._read_window(window[: length + 1], start)
            tokens[row, here] = window[:length]
            targets[row, here] = window[1 : length + 1]
            weights[row, here] = 1
            if self.use_mask:
                self._read_ring(self._store.mask, weights[row, here], start)
        examples = {"tokens": tokens, "targets": targets, "weights": weights}
        return examples | (_places(shape, pieces) if self.packed else {})

    def _read_window(self, out: np.ndarray, start: int) -> None:
        """Fill `out` with the token before `start`, end of text before the first, and those from
        `start` on.
        """
        if start:
            self._read_ring(self._store.tokens, out, start - 1)
        else:
            out[0] = self._eot_id
            self._read_ring(self._store.tokens, out[1:], 0)

    def _read_ring(self, array: TokenArray | None, out: np.ndarray, start: int) -> None:
        """Fill `out` from `start` of the split, going on at its begin after its end."""
        assert array is not None, "answers alone carry loss only where a store has a mask"
        straight = self._end - self._begin - start
        array.read(out[:straight], self._begin + start)
        if straight < len(out):
            array.read(out[straight:], self._begin)


def _places(shape: tuple[int, int], pieces: Pieces) -> Examples:
    """Return segments (1, 2, ... in each row, 0 where nothing is) and positions from each piece's
    begin.
    """
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    count = np.arange(shape[1], dtype=np.int32)
    nth = np.arange(len(pieces.row)) - np.searchsorted(pieces.row, pieces.row) + 1
    for row, column, length, number in zip(
        pieces.row.tolist(),
        pieces.column.tolist(),
        pieces.length.tolist(),
        nth.tolist(),
        strict=True,
    ):
        segments[row, column : column + length] = number
        positions[row, column : column + length] = count[:length]
    return {"segments": segments, "positions": positions}


class MixedRows:
    """Several rows interleaved by weights, within one example of exact over any prefix.

    The weights' common denominator is the period of the schedule, which the quota method fills
    (Balinski and Young, 1975, The Quota Method of Apportionment): at each step the source with the
    largest weight for one more example, among those that this keeps at or below their share rounded
    up.
    """

    def __init__(self, parts: Sequence[Rows], weights: list[Fraction]):
        self._parts = parts
        self._schedule, self._rank, self._counts = schedule(tuple(weights))

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def read(self, indices: np.ndarray) -> Examples:
        """Return the examples of `indices`, each from the source whose turn it is."""
        periods, places = np.divmod(np.asarray(indices, np.int64), len(self._schedule))
        sources = self._schedule[places]
        local = periods * self._counts[sources] + self._rank[places]
        return _read_parts(self._parts, sources, local)


class JoinedRows:
    """Several rows one after the other, as validation of a mixture wants."""

    def __init__(self, parts: Sequence[Rows]):
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: np.ndarray) -> Examples:
        """Return the examples of `indices` of one epoch."""
        indices = np.asarray(indices, np.int64)
        which = np.searchsorted(self._ends, indices, side="right")
        begins = self._ends - np.diff(self._ends, prepend=0)
        return _read_parts(self._parts, which, indices - begins[which])


def _read_parts(parts: Sequence[Rows], which: np.ndarray, indices: np.ndarray) -> Examples:
    """Return example `indices[i]` of part `which[i]` for each i, in that order."""
    out: Examples = {}
    for part in np.unique(which):
        chosen = np.flatnonzero(which == part)
        for name, values in parts[part].read(indices[chosen]).items():
            out.setdefault(name, np.empty((len(indices), *values.shape[1:]), values.dtype))[
                chosen
            ] = values
    return out


@functools.cache
def schedule(weights: tuple[Fraction, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return one period of the mixture: source of each place, its rank among that source's,
    examples a source.
    """
    period = functools.reduce(np.lcm, [weight.denominator for weight in weights])
    shares = [int(weight * period) for weight in weights]
    counts = [0] * len(weights)
    sources, ranks = np.empty(period, np.int64), np.empty(period, np.int64)
    for place in range(period):
        open_sources = [
            s for s, share in enumerate(shares) if counts[s] * period < share * (place + 1)
        ]
        source = max(open_sources, key=lambda s: shares[s] / (counts[s] + 1))
        sources[place], ranks[place] = source, counts[source]
        counts[source] += 1
    return sources, ranks, np.array(counts, np.int64)
