"""Which documents are for training and which for validation, where a source has no splits of its
own.

`data.valid_split=tail` holds out the end of a source. The cut falls between two documents where
that comes near to `data.valid_fraction`, and inside one where documents are too large for it: a
single text is cut as nanoGPT cuts it. `random` holds out each document by a hash of its own text,
so a sorted source has the same mixture on both sides, equal documents are on one side, and a
document stays on its side when others are added.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from tinylm.core.errors import UserError
from tinylm.data.sources import Document, Source, hash_bytes

# A cut between two documents is good where the share held out is within this factor of the one
# asked for.
_NEAR_FACTOR = 2
# Pairs can't be cut inside, so their share may be further off, but not by this factor, nor beyond
# half of the text.
_FAR_FACTOR = 4
_FAR_SHARE = 0.5


class Cut(NamedTuple):
    """Where the tail that is held out begins: in which document, and after which share of its
    characters.
    """

    document: int
    inside: float = 0.0


def choose_cut(ends: np.ndarray, source: Source, can_cut_inside: bool) -> Cut:
    """Return where to cut documents whose sizes add up to `ends`, so that about the asked share is
    held out.

    Raises UserError where every cut between two documents is far from it, and none can be made
    inside.
    """
    fraction = source.config.valid_fraction
    total = int(ends[-1])
    target = total * (1 - fraction)
    document = nearest_boundary(ends, target)
    held_out = (total - int(ends[document - 1])) / total if document else 1.0
    if 0 < document < len(ends) and fraction / _NEAR_FACTOR <= held_out <= fraction * _NEAR_FACTOR:
        return Cut(document)
    if can_cut_inside:
        return cut_inside(ends, target)
    lowest = fraction / _FAR_FACTOR
    highest = max(fraction * _NEAR_FACTOR, _FAR_SHARE)
    if not (0 < document < len(ends) and lowest <= held_out <= highest):
        raise UserError(
            f"data.valid_fraction={fraction} of {source.setting} can't be held out: pairs "
            "are not cut inside, and "
            f"between two of its {len(ends):,} the nearest share is {held_out:.1%}; set "
            "data.valid_source, or "
            "data.valid_fraction=0."
        )
    return Cut(document)


def nearest_boundary(ends: np.ndarray, target: float) -> int:
    """Return after how many documents the size so far is nearest to `target`: at least one, and not
    all if possible.
    """
    after = min(int(np.searchsorted(ends, target)), len(ends) - 1)
    if after and target - int(ends[after - 1]) <= int(ends[after]) - target:
        after -= 1
    return min(after + 1, max(len(ends) - 1, 1))


def cut_inside(ends: np.ndarray, target: float) -> Cut:
    """Return the document in which the size so far reaches `target`, and the share of it that lies
    before.
    """
    document = min(int(np.searchsorted(ends, target, side="right")), len(ends) - 1)
    begin = int(ends[document - 1]) if document else 0
    return Cut(document, (target - begin) / (int(ends[document]) - begin))


def is_held_out(document: Document, fraction: float) -> bool:
    """Return whether a document is for validation, by a hash of its text alone."""
    digest = hash_bytes(f"{document.prompt}\0{document.text}".encode())
    return int(digest[:16], 16) < fraction * 2**64


def parts(document: Document, cut: Cut) -> tuple[Document, Document]:
    """Return the part of a document before a cut inside it, and the part behind."""
    first = int(len(document.text) * cut.inside)
    return Document(document.text[:first]), Document(document.text[first:])


def side_of(documents: Iterable[Document], side: str, fraction: float) -> Iterator[Document]:
    """Yield those documents that a random split puts on a side, "train" or "valid"."""
    for document in documents:
        if is_held_out(document, fraction) == (side == "valid"):
            yield document


def before(documents: Iterable[Document], cut: Cut) -> Iterator[Document]:
    """Yield the documents before a cut, and the first part of the one that is cut."""
    whole = iter(documents)
    yield from itertools.islice(whole, cut.document)
    if cut.inside:
        yield parts(next(whole), cut)[0]


def tail_cut(documents: Iterable[Document], source: Source) -> Cut | None:
    """Return where the tail of all `documents` begins, which reads them once; None where there are
    none.
    """
    sizes = []
    has_prompts = False
    for document in documents:
        sizes.append(len(document.prompt.encode()) + len(document.text.encode()))
        has_prompts = has_prompts or bool(document.prompt)
    return choose_cut(np.cumsum(sizes), source, can_cut_inside=not has_prompts) if sizes else None
