"""Rows: the examples of a split at random access, each a pure function of (seed, index).

Index i is row `i % rows` of epoch `i // rows`. Each epoch has its own order (Grain's index shuffle,
a Feistel network over the row numbers: no permutation is stored) and, for windows, its own offset
of the grid. So any example can be made anywhere, by any thread or process, with nothing remembered.
A mixture interleaves such rows by a fixed schedule.

    seed, step, row of the batch
        |  index = step * batch_size + row
        |  epoch, place = divmod(index, rows)
        |  row of the plan = shuffle(place; seed, epoch)     offset = draw(seed, epoch)
        v
    pieces: |-- start, length --|-- start, length --|        (tinylm.data.packing)
        |  read from the store: [start - 1, start + length)
        v
    tokens     . A A A . B     the token before each target
    targets    A A A . B .
    weights    1 1 1 1 1 1     0 behind the last piece, and on prompts that carry no loss
    segments   1 1 1 1 2 2     packed rows only: which piece, 0 behind the last one
    positions  0 1 2 3 0 1     packed rows only: from the begin of each piece

For example, a split of 10 tokens in windows of 4 targets has three rows an epoch. Epoch 0 has drawn
the offset 1 and the order 2, 0, 1; epoch 1 the offset 3 and the order 0, 2, 1. The stream is a
ring, so each token is the target of one row in each epoch:

    token      0 1 2 3 4 5 6 7 8 9
    epoch 0    2|0 0 0 0|1 1 1 1|2        the row whose target the token is
    epoch 1    1|2 2|0 0 0 0|1 1 1

    index      0  1 | 2  3 | 4  5         batches of two rows
    epoch      0  0 | 0  1 | 1  1
    place      0  1 | 2  0 | 1  2
    row        2  0 | 1  0 | 2  1
    start      9  1 | 5  3 | 1  7

What an example costs is a read of the store for each piece, and a shuffle of one number.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple, Protocol

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
        """Return the examples of `indices`, counted over all epochs: arrays [indices, seq_len]."""


def draw(*purpose: object) -> int:
    """Return 32 random bits that depend on `purpose` alone, as in `draw(seed, "order", epoch)`."""
    text = repr(purpose).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")


class SplitRows:
    """The rows of one split of one store."""

    def __init__(
        self,
        store: Store,
        split: str,
        plan: StreamPlan | DocumentPlan,
        seq_len: int,
        *,
        seed: object = None,
        use_mask: bool = False,
        packed: bool = False,
    ):
        """Take what the rows are read from.

        Args:
          store: the tokens.
          split: its part that is read, "train" or "valid".
          plan: which stretches of the split make up each row.
          seq_len: targets of a row.
          seed: decides the order of each epoch; None gives the rows in order on the grid at 0, as
            evaluation wants.
          use_mask: whether only the tokens that the store's mask marks carry loss.
          packed: whether examples have segments and positions.
        """
        self._store = store
        self._plan = plan
        self._seq_len = seq_len
        self._seed = seed
        self._use_mask = use_mask
        self._packed = packed
        self._begin, self._end = store.manifest.splits[split].tokens
        self._eot_id = store.manifest.tokenizer.eot_id

    def __len__(self) -> int:
        return self._plan.num_rows

    @property
    def split_documents(self) -> int:
        """How many documents are longer than a row, and so lie in several."""
        return self._plan.num_split

    def read(self, indices: np.ndarray) -> Examples:
        """Return the examples of `indices`, counted over all epochs."""
        epochs, places = np.divmod(np.asarray(indices, np.int64), len(self))
        if self._seed is None:
            rows = places
            offsets = np.zeros(len(rows), np.int64)
        else:
            rows, offsets = self._shuffled(epochs.tolist(), places.tolist())
        return self._assemble(len(rows), self._plan.pieces(rows, offsets))

    def _shuffled(self, epochs: list[int], places: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the row at each place of its epoch, and the offset of that epoch's grid."""
        from grain.experimental import index_shuffle

        last = len(self) - 1
        # Indices lie close together, so most often all are of one epoch.
        draws: dict[int, tuple[int, int]] = {}
        rows = np.empty(len(places), np.int64)
        offsets = np.empty(len(places), np.int64)
        for i, (epoch, place) in enumerate(zip(epochs, places, strict=True)):
            if epoch not in draws:
                draws[epoch] = self._draws(epoch)
            order_seed, offset = draws[epoch]
            rows[i] = index_shuffle(place, max_index=last, seed=order_seed, rounds=4)
            offsets[i] = offset
        return rows, offsets

    def _draws(self, epoch: int) -> tuple[int, int]:
        """Return the seed of an epoch's order, and where its grid of windows begins."""
        order_seed = draw(self._seed, "order", epoch)
        num_tokens = self._end - self._begin
        offset = draw(self._seed, "grid", epoch) % min(self._seq_len, num_tokens)
        return order_seed, offset

    def _assemble(self, num_rows: int, pieces: Pieces) -> Examples:
        """Read the pieces of `num_rows` rows from the store."""
        shape = (num_rows, self._seq_len)
        tokens = np.full(shape, self._eot_id, np.int32)
        targets = np.full(shape, self._eot_id, np.int32)
        weights = np.zeros(shape, np.float32)
        window = np.empty(self._seq_len + 1, np.int32)
        if self._store.is_remote:
            self._fetch(pieces)
        for row, column, start, length in pieces.as_numbers():
            # The last target's own token is no input, and the first input is no target.
            piece = window[: length + 1]
            self._read_window(piece, start)
            end = column + length
            tokens[row, column:end] = piece[:-1]
            targets[row, column:end] = piece[1:]
            weights[row, column:end] = 1
            if self._use_mask:
                self._read_ring(self._store.mask, weights[row, column:end], start)

        examples = {"tokens": tokens, "targets": targets, "weights": weights}
        if self._packed:
            segments, positions = _segments_and_positions(shape, pieces)
            examples["segments"] = segments
            examples["positions"] = positions
        return examples

    def _fetch(self, pieces: Pieces) -> None:
        """Have what the pieces read come from the bucket at once, rather than piece by piece."""
        num_tokens = self._end - self._begin
        stretches: list[tuple[int, int]] = []
        for _, _, start, length in pieces.as_numbers():
            first = max(start - 1, 0)
            straight = min(start + length, num_tokens) - first
            stretches.append((self._begin + first, straight))
            if start + length > num_tokens:
                stretches.append((self._begin, start + length - num_tokens))
        self._store.tokens.fetch(stretches)
        if self._use_mask and self._store.mask is not None:
            self._store.mask.fetch(stretches)

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


def _segments_and_positions(
    shape: tuple[int, int], pieces: Pieces
) -> tuple[np.ndarray, np.ndarray]:
    """Return which piece of its row each column is in, 1, 2, ..., or 0 where there is none, and its
    position from the begin of the piece.
    """
    num_rows, seq_len = shape
    segments = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    counting = np.arange(seq_len, dtype=np.int32)
    pieces_so_far = [0] * num_rows
    for row, column, _, length in pieces.as_numbers():
        pieces_so_far[row] += 1
        end = column + length
        segments[row, column:end] = pieces_so_far[row]
        positions[row, column:end] = counting[:length]
    return segments, positions


class MixedRows:
    """Several rows interleaved by weights, within one example of exact over any prefix.

    The weights' common denominator is the period of the schedule, which the quota method fills
    (Balinski and Young, 1975, The Quota Method of Apportionment): at each step the source with the
    largest weight for one more example, among those that this keeps at or below their share rounded
    up.
    """

    def __init__(self, parts: Sequence[Rows], weights: list[Fraction]):
        self._parts = parts
        self._schedule = schedule(tuple(weights))

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def read(self, indices: np.ndarray) -> Examples:
        """Return the examples of `indices`, each from the source whose turn it is."""
        sources, ranks, counts = self._schedule
        periods, places = np.divmod(np.asarray(indices, np.int64), len(sources))
        chosen = sources[places]
        turns_before = periods * counts[chosen] + ranks[places]
        return _read_parts(self._parts, chosen, turns_before)


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
            if name not in out:
                out[name] = np.empty((len(indices), *values.shape[1:]), values.dtype)
            out[name][chosen] = values
    return out


class Schedule(NamedTuple):
    """One period of a mixture.

    Attributes:
      sources: the source whose turn it is: [period].
      ranks: how many turns it had in the period before: [period].
      counts: how many turns each source has in a period: [sources].
    """

    sources: np.ndarray
    ranks: np.ndarray
    counts: np.ndarray


@functools.cache
def schedule(weights: tuple[Fraction, ...]) -> Schedule:
    """Return one period of the mixture with these weights, which sum to 1."""
    period = math.lcm(*(weight.denominator for weight in weights))
    shares = [int(weight * period) for weight in weights]
    counts = [0] * len(weights)
    sources = np.empty(period, np.int64)
    ranks = np.empty(period, np.int64)
    for place in range(period):
        chosen = -1
        largest_claim = 0.0
        for source, share in enumerate(shares):
            # The quota: one more turn keeps the source at or below its share rounded up.
            is_below_quota = counts[source] * period < share * (place + 1)
            claim = share / (counts[source] + 1)
            if is_below_quota and claim > largest_claim:
                chosen = source
                largest_claim = claim
        sources[place] = chosen
        ranks[place] = counts[chosen]
        counts[chosen] += 1
    return Schedule(sources, ranks, np.array(counts, np.int64))
