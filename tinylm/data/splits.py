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
from tinylm.data.sources.base import Document, Source, good_documents, hash_bytes

# A cut between two documents is good where the share held out is within this factor of the one
# asked for.
_NEAR_FACTOR = 2
# Pairs can't be cut inside, so their share may be further off, but not by this factor, nor beyond
# half of the text.
_FAR_FACTOR = 4
_FAR_SHARE = 0.5


class Cut(NamedTuple):
    """Where the tail that is held out begins.

    Attributes:
      document: the document that it begins with, or in.
      inside: the share of that document's characters that lies before; 0 for a cut between two.
    """

    document: int
    inside: float = 0.0


def choose_cut(ends: np.ndarray, source: Source, can_cut_inside: bool) -> Cut:
    """Return where to cut documents so that about the asked share is held out.

    Args:
      ends: the size of all documents up to the end of each, in any unit: [documents].
      source: what they are of, for its config and messages.
      can_cut_inside: whether a document may be cut.

    Raises:
      UserError: every cut between two documents is far from that share, and none may be cut.
    """
    fraction = source.config.valid_fraction
    total = int(ends[-1])
    target = total * (1 - fraction)
    document = nearest_boundary(ends, target)
    before = int(ends[document - 1]) if document else 0
    held_out = (total - before) / total
    is_between_two = 0 < document < len(ends)
    if is_between_two and fraction / _NEAR_FACTOR <= held_out <= fraction * _NEAR_FACTOR:
        return Cut(document)
    if can_cut_inside:
        return cut_inside(ends, target)
    lowest = fraction / _FAR_FACTOR
    highest = max(fraction * _NEAR_FACTOR, _FAR_SHARE)
    if is_between_two and lowest <= held_out <= highest:
        return Cut(document)
    raise UserError(
        f"data.valid_fraction={fraction} of {source.setting} can't be held out: pairs are not cut "
        f"inside, and between two of its {len(ends):,} the nearest share is {held_out:.1%}; set "
        "data.valid_source, or data.valid_fraction=0."
    )


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
        first_part, _ = parts(next(whole), cut)
        yield first_part


def tail_cut(documents: Iterable[Document], source: Source) -> Cut | None:
    """Return where the tail of all `documents` begins, which reads them once; None where there are
    none.
    """
    sizes = []
    has_prompts = False
    for document in documents:
        sizes.append(num_bytes(document))
        has_prompts = has_prompts or bool(document.prompt)
    if not sizes:
        return None
    return choose_cut(np.cumsum(sizes), source, can_cut_inside=not has_prompts)


def num_bytes(document: Document) -> int:
    """Return the size of a document, prompt included, in UTF-8."""
    return len(document.prompt.encode()) + len(document.text.encode())


def training_documents(source: Source, holds_out: bool) -> Iterator[Document]:
    """Yield the good documents for training, as a store has them.

    Args:
      source: what they are of.
      holds_out: whether a part of a source without splits of its own is for validation.
    """
    c = source.config

    def good(split: str) -> Iterator[Document]:
        return good_documents(source.documents(split), c.on_bad_text)

    if source.own_splits:
        yield from good("train")
    elif not holds_out or not c.valid_fraction:
        yield from good("all")
    elif c.valid_split == "random":
        yield from side_of(good("all"), "train", c.valid_fraction)
    else:
        cut = tail_cut(good("all"), source)
        if cut:
            yield from before(good("all"), cut)
