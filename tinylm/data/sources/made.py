"""Sources that read no file: `tales`, the corpus of `tinylm.data.sources.tales`, and `addition`,
all sums of two numbers.

Both have a validation split of their own, by a hash of each text, so a document never lies in both
splits whatever the size of the corpus.
"""

import functools
import itertools
import pathlib
from collections.abc import Iterator

from tinylm.data.sources import tales
from tinylm.data.sources.base import Document, Source, hash_bytes

DEFAULT_TALES = 20_000
VALID_TALES = 1_000
DEFAULT_BELOW = 100
_HELD_TALES = 100_000
_HELD_OUT = 10  # one sum in so many is for validation


class TalesSource(Source):
    """The embedded corpus; a validation tale is never in training."""

    own_splits = True

    def identity(self) -> list:
        grammar = hash_bytes(pathlib.Path(tales.__file__).read_bytes())
        return [super().identity(), self._count("train"), VALID_TALES, grammar]

    def read_split(self, split: str) -> Iterator[Document]:
        if self._count("train") <= _HELD_TALES:
            return iter(self._held[split])
        return (
            Document(text, log_prob=log_prob)
            for text, log_prob in tales.tales(split, self._count(split))
        )

    @functools.cached_property
    def _held(self) -> dict[str, list[Document]]:
        """Both splits of a small corpus in one pass, kept because a tokenizer that learns from it
        reads it too.
        """
        num_missing = {"train": self._count("train"), "valid": self._count("valid")}
        held: dict[str, list[Document]] = {"train": [], "valid": []}
        tale_numbers = itertools.count()
        while any(num_missing.values()):
            text, log_prob = tales.tale(next(tale_numbers))
            split = "valid" if tales.is_valid(text) else "train"
            if num_missing[split]:
                num_missing[split] -= 1
                held[split].append(Document(text, log_prob=log_prob))
        return held

    def _count(self, split: str) -> int:
        if split == "valid":
            return VALID_TALES
        return int(self.argument or DEFAULT_TALES)


class AdditionSource(Source):
    """All sums a+b of two numbers below N: prompt `a+b=`, completion `c`; one sum in ten is held
    out.
    """

    own_splits = True

    def _below(self) -> int:
        return int(self.argument or DEFAULT_BELOW)

    def identity(self) -> list:
        return [super().identity(), self._below(), _HELD_OUT]

    def read_split(self, split: str) -> Iterator[Document]:
        for a in range(self._below()):
            for b in range(self._below()):
                prompt = f"{a}+{b}="
                is_held_out = int(hash_bytes(prompt.encode()), 16) % _HELD_OUT == 0
                if is_held_out == (split == "valid"):
                    yield Document(str(a + b), prompt=prompt)
