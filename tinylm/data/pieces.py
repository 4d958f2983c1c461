"""Long texts in pieces, so that encoding them is shared by all cores.

The cuts lie where the pattern of GPT-2 and its like ends a word whatever follows, so the ids are
those of the whole.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_PIECE_CHARS = 1 << 16
_CUT = re.compile(r"(?<=[^\s]\n)(?=[^\s])")


def pieces(text: str) -> Iterator[str]:
    """Cut a long text at newlines between two words, where no token of GPT-2's kind reaches
    across.
    """
    start = 0
    while len(text) - start > 2 * _PIECE_CHARS:
        cut = _CUT.search(text, start + _PIECE_CHARS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def in_pieces(texts: Sequence[str], encode: Any) -> list[np.ndarray]:
    """Encode texts through `encode`, long ones cut in pieces so that all cores share them."""
    cut = [list(pieces(text)) for text in texts]
    ids = iter(encode([piece for one in cut for piece in one]))
    return [next(ids) if len(one) == 1 else np.concatenate([next(ids) for _ in one]) for one in cut]
