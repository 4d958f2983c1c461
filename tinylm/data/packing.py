"""Which stretches of the token stream make up each row: windows, whole documents packed, or one
document a row.

A row is one or more pieces, each a stretch of targets; the input of a target is the token before
it, and before a document that is the end of text. So no loss crosses from one document into
another, and each target token of a split is in exactly one row. Windows need no index. The other
two plans depend on the context length and on nothing else, so they are made once for a store, as
two arrays beside it that are memory-mapped.
"""

import heapq
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tinylm.data.store import ArrayFile, ArrayWriter

PLAN = "plan.json"
PACK_DOCUMENTS = 1 << 16


class Pieces(NamedTuple):
    """Pieces of a batch of rows: row of the batch, first column, first token of the split,
    length.
    """

    row: np.ndarray
    column: np.ndarray
    start: np.ndarray
    length: np.ndarray


class StreamPlan:
    """Windows on a grid over the stream, taken as a ring so that the grid may begin anywhere."""

    def __init__(self, num_tokens: int, seq_len: int):
        self.num_tokens, self.seq_len = num_tokens, seq_len
        self.num_rows = -(-num_tokens // seq_len)
        self.num_split = 0

    def pieces(self, rows: np.ndarray, offsets: np.ndarray) -> Pieces:
        """Return the pieces of rows when the grid begins at `offsets`."""
        begin = rows * self.seq_len
        length = np.minimum(self.seq_len, self.num_tokens - begin)
        return Pieces(
            np.arange(len(rows)),
            np.zeros(len(rows), np.int64),
            (begin + offsets) % self.num_tokens,
            length,
        )


class DocumentPlan:
    """Rows listed in an index: row r has the pieces from ends[r - 1] to ends[r] of `pieces` [P,
    (start, length)].
    """

    def __init__(
        self, ends: np.ndarray, pieces: np.ndarray, num_split: int, files: Sequence[ArrayFile] = ()
    ):
        """Take the index, and the files that it is mapped from."""
        self._ends, self._pieces, self.num_split, self._files = ends, pieces, num_split, files
        self.num_rows = len(ends)

    def pieces(self, rows: np.ndarray, offsets: np.ndarray) -> Pieces:
        """Return the pieces of rows; documents stay where they are, so `offsets` are without
        effect.
        """
        for file in self._files:
            file.check()
        first = np.where(rows > 0, self._ends[np.maximum(rows, 1) - 1], 0)
        count = self._ends[rows] - first
        row = np.repeat(np.arange(len(rows)), count)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        chosen = self._pieces[first[row] + nth]
        start, length = chosen[:, 0], chosen[:, 1]
        before = np.cumsum(length) - length
        column = before - np.repeat(before[np.cumsum(count) - count], count)
        return Pieces(row, column, start, length)


def split_documents(ends: np.ndarray, begin: int, seq_len: int) -> tuple[np.ndarray, int]:
    """Cut documents, given by their `ends` after `begin`, into pieces [P, (start, length)]; count
    those cut.
    """
    starts = np.concatenate([[begin], ends[:-1]])
    lengths = ends - starts
    parts = -(-lengths // seq_len)
    nth = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    start = np.repeat(starts, parts) + nth * seq_len
    length = np.minimum(seq_len, np.repeat(ends, parts) - start)
    return np.stack([start, length], axis=1), int((parts > 1).sum())


def first_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Return for each piece the row that it goes to: the first one with room (Johnson 1973, first
    fit).

    Rows are kept in a heap per number of free columns, so a piece costs a look at `seq_len` tops at
    most.
    """
    full = len(lengths)
    tops = np.full(seq_len + 1, full, np.int64)
    heaps: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rows = np.empty(len(lengths), np.int64)
    num_rows = 0
    for i, length in enumerate(lengths.tolist()):
        room = length + int(tops[length:].argmin())
        if tops[room] == full:
            row, room = num_rows, seq_len
            num_rows += 1
        else:
            row = heapq.heappop(heaps[room])
            tops[room] = heaps[room][0] if heaps[room] else full
        rows[i] = row
        left = room - length
        if left:
            heapq.heappush(heaps[left], row)
            tops[left] = heaps[left][0]
    return rows


def plan_chunks(
    ends: np.ndarray, seq_len: int, packed: bool
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Yield (piece counts of rows, pieces, documents cut) for some tens of thousands of documents
    at a time.
    """
    begin = 0
    for first in range(0, len(ends), PACK_DOCUMENTS):
        chunk = np.asarray(ends[first : first + PACK_DOCUMENTS], np.int64)
        pieces, num_split = split_documents(chunk, begin, seq_len)
        begin = int(chunk[-1])
        if packed:
            rows = first_fit(pieces[:, 1], seq_len)
            yield np.bincount(rows), pieces[np.argsort(rows, kind="stable")], num_split
        else:
            yield np.ones(len(pieces), np.int64), pieces, num_split


def write_plan(folder: pathlib.Path, ends: np.ndarray, seq_len: int, packed: bool) -> None:
    """Write the plan of documents that end at `ends`, counted from the begin of their split, into
    `folder`.
    """
    writers = [
        ArrayWriter(folder, name, np.int64, shard_items=2**62) for name in ("ends", "pieces")
    ]
    num_pieces = num_split = 0
    for counts, pieces, chunk_split in plan_chunks(ends, seq_len, packed):
        writers[0].append(np.cumsum(counts) + num_pieces)
        writers[1].append(pieces.ravel())
        num_pieces, num_split = num_pieces + len(pieces), num_split + chunk_split
    for writer in writers:
        writer.close()
    (folder / PLAN).write_text(
        json.dumps([writers[0].total, num_pieces, num_split]), encoding="utf-8"
    )


def load_plan(folder: pathlib.Path) -> DocumentPlan | None:
    """Open a written plan, memory-mapped; None where it isn't there, or not whole."""
    try:
        num_rows, num_pieces, num_split = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        ends = ArrayFile(folder, {"file": "ends-00000.bin", "items": num_rows}, np.int64)
        pieces = ArrayFile(folder, {"file": "pieces-00000.bin", "items": 2 * num_pieces}, np.int64)
    except (OSError, ValueError):
        return None
    return DocumentPlan(ends.mapped(), pieces.mapped().reshape(-1, 2), num_split, (ends, pieces))
