"""Which stretches of the token stream make up each row: windows, whole documents packed, or one
document a row.

A row is one or more pieces, each a stretch of targets; the input of a target is the token before
it, and before a document that is the end of text. So no loss crosses from one document into
another, and each target token of a split is in exactly one row. With documents A, B, C, D of which
`.` is the end of text, and rows of 8 targets:

    tokens of the split   A A A . B B B B B B B B B . C C . D D .
    stream, offset 0     |A A A . B B B B|B B B B B . C C|. D D .|
    stream, offset 3     |. B B B B B B B|B B . C C . D D|. A A A|    the last window is short
    packed               |A A A . B .|B B B B B B B B|C C . D D .|
    single               |A A A .|B B B B B B B B|B .|C C .|D D .|

B is longer than a row, so it is cut into 8 and 2, which are placed as if they were documents.

Windows need no index. The other two plans depend on the context length and on nothing else, so they
are made once for a store, as two arrays that are memory-mapped. First fit is from Johnson (1973,
Near-optimal bin packing algorithms); it is planned for some tens of thousands of documents at a
time, which bounds memory and costs a few part-filled rows.
"""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tinylm.data.manifest import Shard
from tinylm.data.store import ArrayFile, ArrayWriter

PLAN = "plan.json"
PACK_DOCUMENTS = 1 << 16


class Pieces(NamedTuple):
    """The pieces of a batch of rows, one an index, in the order of the rows: each array [pieces].

    Attributes:
      row: the row of the batch.
      column: where it begins in the row.
      start: its first target, as a token of the split.
      length: how many targets it has.
    """

    row: np.ndarray
    column: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def as_numbers(self) -> Iterator[tuple[int, int, int, int]]:
        """Return row, column, start and length of each piece, as Python's numbers: to a loop, these
        come faster than NumPy's.
        """
        return zip(*(array.tolist() for array in self), strict=True)


def count_within(counts: np.ndarray) -> np.ndarray:
    """Return 0, 1, ... up to each count in turn: [2, 3] gives [0, 1, 0, 1, 2]."""
    begins = np.cumsum(counts) - counts
    return np.arange(counts.sum()) - np.repeat(begins, counts)


class StreamPlan:
    """Windows on a grid over the stream, taken as a ring so that the grid may begin anywhere."""

    def __init__(self, num_tokens: int, seq_len: int):
        self.num_tokens = num_tokens
        self.seq_len = seq_len
        self.num_rows = -(-num_tokens // seq_len)  # rounded up
        self.num_split = 0

    def pieces(self, rows: np.ndarray, offsets: np.ndarray) -> Pieces:
        """Return the pieces of rows, one each.

        Args:
          rows: which windows: [rows].
          offsets: where the grid begins for each: [rows].
        """
        begin = rows * self.seq_len
        return Pieces(
            row=np.arange(len(rows)),
            column=np.zeros(len(rows), np.int64),
            start=(begin + offsets) % self.num_tokens,
            length=np.minimum(self.seq_len, self.num_tokens - begin),
        )


class DocumentPlan:
    """Rows listed in an index: row r has the pieces from ends[r - 1] to ends[r]."""

    def __init__(
        self, ends: np.ndarray, pieces: np.ndarray, num_split: int, files: Sequence[ArrayFile] = ()
    ):
        """Take the index.

        Args:
          ends: the number of pieces up to the end of each row: [rows].
          pieces: first token of the split, and length: [pieces, 2].
          num_split: how many documents are cut.
          files: what both arrays are mapped from.
        """
        self.num_rows = len(ends)
        self.num_split = num_split
        self._ends = ends
        self._pieces = pieces
        self._files = files

    def pieces(self, rows: np.ndarray, offsets: np.ndarray) -> Pieces:
        """Return the pieces of rows; documents stay where they are, so `offsets` are without
        effect.
        """
        for file in self._files:
            file.check()
        # Of each row: where its pieces begin in the index, and how many it has.
        is_first_row = rows == 0
        begin = np.where(is_first_row, 0, self._ends[rows - 1])
        counts = self._ends[rows] - begin

        # Of each piece: its row of the batch, and its place in the index.
        row = np.repeat(np.arange(len(rows)), counts)
        place = begin[row] + count_within(counts)
        start, length = self._pieces[place].T

        # A piece begins where those before it in the batch end, counted from the begin of its row.
        before = np.cumsum(length) - length
        first_piece = np.cumsum(counts) - counts
        before_row = before[first_piece]
        column = before - before_row[row]
        return Pieces(row, column, start, length)


def split_documents(ends: np.ndarray, begin: int, seq_len: int) -> tuple[np.ndarray, int]:
    """Cut documents into pieces of at most `seq_len` tokens.

    Args:
      ends: where they end: [documents].
      begin: where the first one begins.
      seq_len: targets of a row.

    Returns:
      Start and length of each piece, [pieces, 2], and how many documents are cut.
    """
    starts = np.concatenate([[begin], ends[:-1]])
    num_parts = -(-(ends - starts) // seq_len)  # rounded up
    num_cut = int((num_parts > 1).sum())
    piece_starts = np.repeat(starts, num_parts) + count_within(num_parts) * seq_len
    left = np.repeat(ends, num_parts) - piece_starts
    piece_lengths = np.minimum(seq_len, left)
    return np.stack([piece_starts, piece_lengths], axis=1), num_cut


def first_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Return for each piece the row that it goes to: the first one with room.

    A tree over the rows knows the most free columns of any row below each of its nodes, so a piece
    costs as many looks as the tree has levels, however long rows are:

        node 1              8
        nodes 2, 3      3       8       a piece of 3 goes left at node 1, right at node 2: to row 1
        rows          0   3   8   8
    """
    # As many rows as pieces are enough. Node i has the children 2i and 2i + 1; rows come last.
    num_rows = 1 << max(len(lengths) - 1, 0).bit_length()
    most_free = [seq_len] * (2 * num_rows)
    rows = np.empty(len(lengths), np.int64)
    for i, length in enumerate(lengths.tolist()):
        node = 1
        while node < num_rows:
            node *= 2
            if most_free[node] < length:
                node += 1
        rows[i] = node - num_rows
        most_free[node] -= length
        while node > 1:
            node //= 2
            most = max(most_free[2 * node], most_free[2 * node + 1])
            if most_free[node] == most:
                break
            most_free[node] = most
    return rows


class PlannedChunk(NamedTuple):
    """The rows of some documents.

    Attributes:
      counts: how many pieces each row has: [rows].
      pieces: start and length of each piece, in the order of the rows: [pieces, 2].
      num_split: how many documents are cut.
    """

    counts: np.ndarray
    pieces: np.ndarray
    num_split: int


def plan_chunks(ends: np.ndarray, seq_len: int, packed: bool) -> Iterator[PlannedChunk]:
    """Yield the rows of `PACK_DOCUMENTS` documents at a time."""
    begin = 0
    for first in range(0, len(ends), PACK_DOCUMENTS):
        chunk_ends = np.asarray(ends[first : first + PACK_DOCUMENTS], np.int64)
        pieces, num_split = split_documents(chunk_ends, begin, seq_len)
        begin = int(chunk_ends[-1])
        if packed:
            lengths = pieces[:, 1]
            rows = first_fit(lengths, seq_len)
            counts = np.bincount(rows)
            pieces = pieces[np.argsort(rows, kind="stable")]
        else:
            counts = np.ones(len(pieces), np.int64)
        yield PlannedChunk(counts, pieces, num_split)


def write_plan(folder: pathlib.Path, ends: np.ndarray, seq_len: int, packed: bool) -> None:
    """Write the plan of documents that end at `ends`, counted from the begin of their split, into
    `folder`.
    """
    row_ends = ArrayWriter(folder, "ends", np.int64, shard_items=2**62)
    all_pieces = ArrayWriter(folder, "pieces", np.int64, shard_items=2**62)
    num_pieces = 0
    num_split = 0
    for chunk in plan_chunks(ends, seq_len, packed):
        row_ends.append(np.cumsum(chunk.counts) + num_pieces)
        all_pieces.append(chunk.pieces.ravel())
        num_pieces += len(chunk.pieces)
        num_split += chunk.num_split
    row_ends.close()
    all_pieces.close()
    # Last, for a plan without it is not whole.
    sizes = [row_ends.total, num_pieces, num_split]
    (folder / PLAN).write_text(json.dumps(sizes), encoding="utf-8")


def load_plan(folder: pathlib.Path) -> DocumentPlan | None:
    """Open a written plan, memory-mapped; None where it isn't there, or not whole."""
    try:
        num_rows, num_pieces, num_split = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        ends = ArrayFile(folder, Shard("ends-00000.bin", num_rows), np.int64)
        pieces = ArrayFile(folder, Shard("pieces-00000.bin", 2 * num_pieces), np.int64)
    except (OSError, ValueError):
        return None
    return DocumentPlan(ends.mapped(), pieces.mapped().reshape(-1, 2), num_split, (ends, pieces))
