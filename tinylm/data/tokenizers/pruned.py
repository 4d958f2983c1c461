"""A pruned vocabulary: the most common ids of another tokenizer, as TinyStories did with GPT-Neo's.

A small model spends most of its parameters on a large vocabulary (Eldan and Li, 2023,
arXiv:2305.07759). A token that is dropped is spelled in bytes where the vocabulary has all 256, so
every text still comes back exactly; where it doesn't, the token becomes one unknown id. The map of
ids is saved with the tokenizer, and what was dropped is counted.

    base        0 a | 1 b | 2 the | 3 cat | 4 end       kept: 0, 2, 4
    pruned      0 a | 1 the | 2 end | 3 unknown
"""

from collections.abc import Iterable, Sequence

import numpy as np

from tinylm.data.tokenizers.base import TableTokenizer, Tokenizer
from tinylm.data.tokenizers.portions import batch_by_chars

UNKNOWN = "\N{REPLACEMENT CHARACTER}".encode()


class PrunedTokenizer(Tokenizer):
    """Another tokenizer with only some of its ids, renumbered in their order.

    Attributes:
      base: the other tokenizer.
      kept: the ids of `base` that are kept, in the order of the new ones.
      spells: a dropped token is spelled in bytes. Where it isn't, it becomes one more id, which
        decodes to U+FFFD.
      counts: how many tokens were counted (`counted_tokens`) and dropped (`dropped_tokens`).
    """

    def __init__(self, base: Tokenizer, kept: Sequence[int], counts: dict[str, int]):
        """Keep the ids `kept` of `base`, with its end of text among them."""
        self.base = base
        self.name = base.name
        self.eot_name = base.eot_name
        self.files = base.files
        self.counts = counts
        self.kept = np.array(kept, np.int32)
        self.header = {**base.header, "cut": {"kept": self.kept.tolist(), **counts}}

        # The new id of each old one, or -1.
        self._new_id = np.full(base.vocab_size, -1, np.int32)
        self._new_id[self.kept] = np.arange(len(self.kept))
        self.eot_id = int(self._new_id[base.eot_id])

        byte_ids = find_byte_ids(base)
        if byte_ids is None:
            self._new_byte_ids = np.zeros(0, np.int32)
            self.spells = False
        else:
            self._new_byte_ids = self._new_id[byte_ids]
            self.spells = bool((self._new_byte_ids >= 0).all())

        new_ids_of_unknown = self._new_id[list(base.unknown_ids)].tolist()
        unknown_ids = [i for i in new_ids_of_unknown if i >= 0]
        self.vocab_size = len(self.kept)
        if not self.spells:
            # One more id is for each dropped token.
            unknown_ids.append(self.vocab_size)
            self.vocab_size += 1
        self.unknown_ids = tuple(unknown_ids)

    @classmethod
    def of(cls, base: Tokenizer, texts: Iterable[str], size: int) -> "PrunedTokenizer":
        """Count the ids of `texts` and keep the most common, `size` ids in all."""
        counts = count_ids(base, texts)
        byte_ids = find_byte_ids(base)
        kept = {base.eot_id}
        room_for_unknown = 1
        if byte_ids is not None and size > len(byte_ids) + 1:
            # With all bytes, nothing is unknown.
            kept.update(byte_ids.tolist())
            room_for_unknown = 0

        # The most common come first, and of equally common ones the lower id.
        for i in np.argsort(-counts, kind="stable").tolist():
            if counts[i] == 0 or len(kept) + room_for_unknown >= size:
                break
            kept.add(i)

        num_tokens = int(counts.sum())
        num_kept = int(counts[list(kept)].sum())
        num_dropped = num_tokens - num_kept
        found = {"counted_tokens": num_tokens, "dropped_tokens": num_dropped}
        return cls(base, sorted(kept), found)

    def describe(self) -> str:
        """Return one line on what was dropped and what becomes of it."""
        dropped = self.counts["dropped_tokens"]
        total = self.counts["counted_tokens"]
        fate = "spelled in bytes" if self.spells else "one unknown id"
        return (
            f"vocabulary cut to {self.vocab_size:,} of {self.base.vocab_size:,} ids; {dropped:,} "
            f"of {total:,} tokens ({dropped / max(total, 1):.2%}) were dropped, each {fate}"
        )

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._prune(ids) for ids in self.base.encode_batch(texts)]

    def _prune(self, ids: np.ndarray) -> np.ndarray:
        """Return the new ids for those of the base."""
        new_ids = self._new_id[ids]
        dropped = np.flatnonzero(new_ids < 0)
        if not len(dropped):
            return new_ids
        if not self.spells:
            new_ids[dropped] = self.vocab_size - 1
            return new_ids

        # Each dropped token is replaced by the ids of its bytes.
        assert isinstance(self.base, TableTokenizer), "only a table has an id for each byte"
        parts: list[np.ndarray] = []
        start = 0
        for place in dropped.tolist():
            content = self.base.bytes_of_id[ids[place]]
            parts.append(new_ids[start:place])
            parts.append(self._new_byte_ids[np.frombuffer(content, np.uint8)])
            start = place + 1
        parts.append(new_ids[start:])
        return np.concatenate(parts)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        # The ids of the base between unknown ids.
        runs: list[list[int]] = [[]]
        for i in ids:
            is_unknown = i >= len(self.kept)
            if is_unknown:
                runs.append([])
            else:
                runs[-1].append(int(self.kept[i]))

        content = self.base.decode_bytes(runs[0])
        last = runs[0]
        for run in runs[1:]:
            # What follows an unknown id doesn't begin the text: it is decoded after other ids, so
            # that it keeps its space.
            before = last or run[:1]
            num_before = len(self.base.decode_bytes(before))
            content += UNKNOWN
            content += self.base.decode_bytes(before + run)[num_before:]
            last = run
        return content


def find_byte_ids(tokenizer: Tokenizer) -> np.ndarray | None:
    """Return the id of each single byte; None where a tokenizer doesn't have them all."""
    return tokenizer.byte_ids if isinstance(tokenizer, TableTokenizer) else None


def count_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """Return how often each id occurs in `texts`."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for batch in batch_by_chars(texts, len):
        # An empty text has no ids, though a tokenizer that adds a space would give it one.
        ids_of_texts = tokenizer.encode_batch([text for text in batch if text])
        ids = np.concatenate([np.zeros(0, np.int32), *ids_of_texts])
        counts += np.bincount(ids, minlength=len(counts))
    return counts
