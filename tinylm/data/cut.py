"""The cut of a vocabulary to its most common ids, as the TinyStories paper did with GPT-Neo's.

A small model spends most of its parameters on a large vocabulary (Eldan and Li, 2023,
arXiv:2305.07759). A token that is dropped is spelled in bytes where the vocabulary has all 256, so
that every text still comes back exactly; else it becomes one unknown id. The map of ids is saved
with the tokenizer, and what was dropped is counted.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from tinylm.data.encoding import batches, encode_texts
from tinylm.data.sources.base import Document
from tinylm.data.tokenizers import TableTokenizer, Tokenizer

UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()


class CutTokenizer(Tokenizer):
    """Another tokenizer with only some of its ids, renumbered in their order.

    `kept` are ids of `base`, with its end of text. Where they include a token for each byte, a
    dropped token is spelled in those, and every text still decodes exactly; else it becomes one
    more id, which decodes to U+FFFD.
    """

    def __init__(self, base: Tokenizer, kept: Sequence[int], counts: dict[str, int]):
        self.base, self.name, self.counts = base, base.name, counts
        self._kept = np.array(kept, np.int32)
        self.files, self.header = (
            base.files,
            {**base.header, "cut": {"kept": self._kept.tolist(), **counts}},
        )
        self._new = np.full(base.vocab_size, -1, np.int32)
        self._new[self._kept] = np.arange(len(kept))
        self.eot_id = int(self._new[base.eot_id])
        byte_ids = byte_tokens(base)
        self.spells = byte_ids is not None and bool((self._new[byte_ids] >= 0).all())
        self._byte_ids = (
            self._new[byte_ids] if byte_ids is not None and self.spells else np.zeros(0, np.int32)
        )
        self.vocab_size = len(kept) + (not self.spells)
        self.eot_name = base.eot_name
        unknown = [int(self._new[i]) for i in base.unknown_ids if self._new[i] >= 0]
        self.unknown_ids = tuple(unknown if self.spells else [*unknown, self.vocab_size - 1])

    @classmethod
    def of(cls, base: Tokenizer, texts: Iterable[str], size: int) -> "CutTokenizer":
        """Count the ids of `texts` and keep the most common, `size` ids in all."""
        counts = count_ids(base, texts)
        byte_ids = byte_tokens(base)
        always = {
            base.eot_id,
            *(byte_ids if byte_ids is not None and size > len(byte_ids) + 1 else []),
        }
        room = size - len(always) - (len(always) == 1)
        order = np.argsort(-counts, kind="stable")
        chosen = [int(i) for i in order if counts[i] and i not in always][: max(room, 0)]
        kept = sorted({*always, *chosen})
        total, held = int(counts.sum()), int(counts[kept].sum())
        return cls(base, kept, {"counted_tokens": total, "dropped_tokens": total - held})

    def describe(self) -> str:
        """Say in one line what was cut and what becomes of it."""
        dropped, total = self.counts["dropped_tokens"], self.counts["counted_tokens"]
        fate = "spelled in bytes" if self.spells else "one unknown id"
        return (
            f"vocabulary cut to {self.vocab_size:,} of {self.base.vocab_size:,} ids; "
            f"{dropped:,} of {total:,} tokens ({dropped / max(total, 1):.2%}) were "
            f"dropped, each {fate}"
        )

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._cut(ids) for ids in self.base.encode_batch(texts)]

    def _cut(self, ids: np.ndarray) -> np.ndarray:
        new = self._new[ids]
        dropped = np.flatnonzero(new < 0)
        if not self.spells or not len(dropped):
            return np.where(new < 0, self.vocab_size - 1, new).astype(np.int32)
        parts = np.split(new, np.stack([dropped, dropped + 1], axis=1).ravel())
        for place, i in zip(range(1, len(parts), 2), ids[dropped].tolist(), strict=True):
            parts[place] = self._byte_ids[np.frombuffer(self.base._bytes_of_id[i], np.uint8)]  # type: ignore[attr-defined]
        return np.concatenate(parts)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        runs: list[list[int]] = [[]]
        for i in ids:
            if i < len(self._kept):
                runs[-1].append(int(self._kept[i]))
            else:
                runs.append([])
        out = self.base.decode_bytes(runs[0])
        for before, run in itertools.pairwise(runs):
            before = (
                before or run[:1]
            )  # what follows an unknown id doesn't begin the text: it keeps its space
            out += (
                UNKNOWN
                + self.base.decode_bytes([*before, *run])[len(self.base.decode_bytes(before)) :]
            )
        return out


def byte_tokens(tokenizer: Tokenizer) -> np.ndarray | None:
    """Return the id of each single byte where a tokenizer's ids stand for fixed bytes and it has
    them all.
    """
    return tokenizer.byte_ids if isinstance(tokenizer, TableTokenizer) else None


def count_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Return how often each id occurs in `texts`."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for batch in batches(map(Document, texts)):
        counts += np.bincount(
            encode_texts(tokenizer, [document.text for document in batch])[0], minlength=len(counts)
        )
    return counts
