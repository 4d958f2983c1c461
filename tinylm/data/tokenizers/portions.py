"""Portions of text that suit an encoder: long texts in pieces, many texts in batches.

A library shares the texts of a call among its threads, so one long text would keep one core busy
alone. It is cut where the pattern of GPT-2 and its like ends a word whatever follows, so the ids of
the pieces are those of the whole.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

PIECE_CHARS = 1 << 16
BATCH_CHARS = 1 << 20

# A newline after a word and before another one.
_CUT = re.compile(r"(?<=[^\s]\n)(?=[^\s])")

Item = TypeVar("Item")


def split_text(text: str) -> Iterator[str]:
    """Yield pieces of a long text, which join to the text.

    A piece ends at a newline between two words, where no token of GPT-2's kind reaches across, so
    it is as long as it takes to find one.
    """
    start = 0
    while len(text) - start > 2 * PIECE_CHARS:
        cut = _CUT.search(text, start + PIECE_CHARS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def encode_in_pieces(
    texts: Sequence[str], encode: Callable[[list[str]], list[np.ndarray]]
) -> list[np.ndarray]:
    """Encode texts, long ones in pieces.

    Args:
      texts: the texts.
      encode: returns the ids of each of the pieces that it is given.

    Returns:
      The ids of each text.
    """
    pieces: list[str] = []
    num_pieces: list[int] = []
    for text in texts:
        before = len(pieces)
        pieces.extend(split_text(text))
        num_pieces.append(len(pieces) - before)

    ids_of_pieces = encode(pieces)
    ids_of_texts: list[np.ndarray] = []
    start = 0
    for count in num_pieces:
        if count == 1:
            ids_of_texts.append(ids_of_pieces[start])
        else:
            ids_of_texts.append(np.concatenate(ids_of_pieces[start : start + count]))
        start += count
    return ids_of_texts


def batch_by_chars(
    items: Iterable[Item], count_chars: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Yield items in batches of about a million characters."""
    batch: list[Item] = []
    chars = 0
    for item in items:
        batch.append(item)
        chars += count_chars(item)
        if chars >= BATCH_CHARS:
            yield batch
            batch = []
            chars = 0
    if batch:
        yield batch
