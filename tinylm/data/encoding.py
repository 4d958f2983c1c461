"""Documents to ids: batches of a million characters go to the tokenizer, whose library encodes the
texts of a batch on all cores.

The libraries' own threads do here what processes of ours did: on two cores they encode 100 MB at
least as fast, and there is no process to start, to feed or to lose. On many cores Python's part of
the work, which one core does, bounds the speed (docs/speed.md has figures).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from tinylm.data.sources.base import Document
from tinylm.data.tokenizers import Tokenizer
from tinylm.data.tokenizers.portions import batch_by_chars


class Encoded(NamedTuple):
    """The ids of all texts of a batch in a row, and how many each text has."""

    ids: np.ndarray
    counts: np.ndarray


def encode(
    documents: Iterable[Document], tokenizer: Tokenizer
) -> Iterator[tuple[list[Document], Encoded]]:
    """Yield documents in batches, each with the ids of the prompt and then of the text of each."""
    for batch in batch_by_chars(documents, _count_chars):
        texts: list[str] = []
        for document in batch:
            texts += (document.prompt, document.text)
        yield batch, encode_texts(tokenizer, texts)


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> Encoded:
    """Return the ids of texts; an empty text has none."""
    # A tokenizer that adds a space before a text would give ids to an empty one too.
    ids_of_texts = tokenizer.encode_batch([text for text in texts if text])
    places = [i for i, text in enumerate(texts) if text]
    counts = np.zeros(len(texts), np.int64)
    counts[places] = [len(ids) for ids in ids_of_texts]
    return Encoded(np.concatenate([np.zeros(0, np.int32), *ids_of_texts]), counts)


def _count_chars(document: Document) -> int:
    return len(document.prompt) + len(document.text)
