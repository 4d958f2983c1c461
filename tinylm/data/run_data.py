"""What a run reads: the rows that it trains on, those that it is scored on, and their stores."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from tinylm.data.manifest import Split
from tinylm.data.rows import Rows
from tinylm.data.store import Store
from tinylm.data.tokenizers import Tokenizer


class Targets(NamedTuple):
    """The tokens of a split that carry loss, and the bytes of text that they stand for."""

    tokens: int
    bytes: int


@dataclasses.dataclass
class Validation:
    """What a model is scored on.

    Attributes:
      tokenizer: what made the ids.
      valid: the rows in order; None where there are none.
      valid_stores: the stores that they come from, in that order.
      valid_rows: how many rows each of these stores has.
      loss_on: what carries loss, as data.loss_on.
    """

    tokenizer: Tokenizer
    valid: Rows | None
    valid_stores: list[Store]
    valid_rows: list[int]
    loss_on: str

    @property
    def _stores_and_splits(self) -> list[tuple[Store, Split]]:
        return [(store, store.manifest.splits["valid"]) for store in self.valid_stores]

    @property
    def valid_splits(self) -> list[Split]:
        """The validation split of each store."""
        return [split for _, split in self._stores_and_splits]

    def _pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for store, split in self._stores_and_splits:
            yield from store.pairs(split)

    def answers(self, limit: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (prompt ids, completion ids) of the validation pairs, the first `limit` of them
        where that is set.
        """
        return list(itertools.islice(self._pairs(), limit or None))

    def valid_texts(self, most: int, most_tokens: int = 4096) -> Iterator[str]:
        """Yield the texts of documents that lie evenly over the validation split.

        Args:
          most: how many documents of each store, at most.
          most_tokens: of a longer document, only the beginning is given.
        """
        for store, split in self._stores_and_splits:
            first, end = split.documents
            num_texts = min(most, end - first)
            evenly = np.linspace(first, end - 1, num_texts)
            documents = np.unique(evenly.astype(np.int64))
            for begin_token, end_token in store.spans(split, documents.tolist()):
                end_token = min(end_token, begin_token + most_tokens)
                ids = store.tokens.between(begin_token, end_token)
                yield self.tokenizer.decode(ids.tolist())

    @functools.cached_property
    def _targets(self) -> list[Targets]:
        """The targets of each validation split; prompts are none with loss on answers alone."""
        found: list[Targets] = []
        for store, split in self._stores_and_splits:
            num_tokens = split.num_tokens
            num_bytes = split.bytes
            if self.loss_on == "answer":
                for prompt, _ in store.pairs(split):
                    num_tokens -= len(prompt)
                    num_bytes -= self.tokenizer.count_bytes(prompt)
            found.append(Targets(num_tokens, num_bytes))
        return found

    @property
    def valid_tokens(self) -> int:
        """Target tokens of the validation split."""
        return sum(targets.tokens for targets in self._targets)

    def valid_bytes_per_token(self, num_rows: int = 0) -> float:
        """Return the bytes of text a target token, which turns loss into bits per byte.

        Args:
          num_rows: how many of the first rows are scored; 0 for all. A source counts by its share
            of them, since the tokens of another source may have another length.
        """
        num_tokens = 0.0
        num_bytes = 0.0
        rows_left = num_rows or sum(self.valid_rows)
        for targets, rows_here in zip(self._targets, self.valid_rows, strict=True):
            scored_rows = min(rows_left, rows_here)
            share = scored_rows / rows_here
            num_tokens += share * targets.tokens
            num_bytes += share * targets.bytes
            rows_left -= scored_rows
        return num_bytes / max(num_tokens, 1)

    @property
    def floor_nats_per_token(self) -> float | None:
        """The exact -log p of the validation text over its target tokens; None where it isn't
        known.
        """
        log_probs: list[float] = []
        for split in self.valid_splits:
            if split.log_prob is None:
                return None
            log_probs.append(split.log_prob)
        if not log_probs:
            return None
        return -sum(log_probs) / self.valid_tokens


@dataclasses.dataclass
class Data(Validation):
    """What a run trains on and is scored on.

    Attributes:
      train: the rows to train on.
      stores: the stores that they come from.
      split_documents: how many documents are longer than a row, and so lie in several.
    """

    train: Rows
    stores: list[Store]
    split_documents: int

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer, end of text among them."""
        return self.tokenizer.vocab_size

    @property
    def every_store(self) -> list[Store]:
        """All stores, each once."""
        return list({store.folder: store for store in self.stores + self.valid_stores}.values())
