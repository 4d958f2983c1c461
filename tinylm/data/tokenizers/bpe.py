"""Byte-pair encoding learned from a text: Sennrich et al. 2016 (arXiv:1508.07909), on bytes.

The `tokenizers` library learns the merges and encodes; its file is a tokenizer.json of GPT-2's
kind. What is added here is speed on ASCII text, of which the same few words make up most: each word
is encoded once and looked up from then on, on one core several times as fast as the library.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tinylm.data.tokenizers.base import END
from tinylm.data.tokenizers.portions import encode_in_pieces, split_text
from tinylm.data.tokenizers.tokenizer_json import JsonTokenizer, encode_by_library

# GPT-2's pattern on ASCII, where letters, digits and spaces are these; Python's own classes are
# wider.
_ASCII_WORDS = re.compile(
    r"'(?:[stmd]|re|ve|ll)"
    r"| ?[A-Za-z]+"
    r"| ?[0-9]+"
    r"| ?[^\t-\r A-Za-z0-9]+"
    r"|[\t-\r ]+(?![^\t-\r ])"
    r"|[\t-\r ]+"
)
# A run of letters and signs, or of spaces, in which GPT-2's pattern may find a word as long. Each
# is tried at its first character alone, so a search takes linear time.
LONGEST_WORD = 1000
_LONG_RUNS = re.compile(rf"(?<!\S)\S{{{LONGEST_WORD + 1},}}|(?<!\s)\s{{{LONGEST_WORD + 1},}}")

# The words whose ids are kept. A text with more of them begins a new table, which bounds memory.
_MOST_KNOWN_WORDS = 1 << 18


class BpeTokenizer(JsonTokenizer):
    """Byte-level byte-pair encoding learned from a text."""

    def __init__(self, name: str, tokenizer_json: bytes):
        super().__init__(tokenizer_json, name=name)
        self._known: dict[str, bytes] = {}  # the ids of each word, as int32

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BpeTokenizer":
        """Learn the merges of `texts`; a small text may give fewer ids than `vocab_size`."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(_portions_to_learn(texts), trainer)
        return cls(f"bpe:{vocab_size}", inner.to_str().encode())

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return encode_in_pieces(texts, self.encode_whole)

    def encode_whole(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, none of which is cut in pieces."""
        # One character such as a curly quote must not send a million others to the library, so
        # each text goes its own way.
        in_ascii = iter(self.encode_by_words([text for text in texts if text.isascii()]))
        others = iter(encode_by_library(self.inner, [text for text in texts if not text.isascii()]))
        return [next(in_ascii) if text.isascii() else next(others) for text in texts]

    def encode_by_words(self, texts: list[str]) -> list[np.ndarray]:
        """Return the ids of each text, which is ASCII, by a table of the words met so far."""
        words_of_texts: list[list[str]] = [_ASCII_WORDS.findall(text) for text in texts]
        words: set[str] = set().union(*words_of_texts)
        new = list(words.difference(self._known))
        if len(self._known) + len(new) > _MOST_KNOWN_WORDS:
            self._known = {}
            new = list(words)
        for word, ids in zip(new, encode_by_library(self.inner, new), strict=True):
            self._known[word] = ids.tobytes()

        # Joined as bytes, ids never become numbers of Python, which would take most of the time.
        ids_of_texts: list[np.ndarray] = []
        for words_of_text in words_of_texts:
            content = b"".join(map(self._known.__getitem__, words_of_text))
            ids_of_texts.append(np.frombuffer(content, np.int32))
        return ids_of_texts


def _portions_to_learn(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts in portions that the library's trainer takes quickly."""
    for text in texts:
        for piece in split_text(text):
            yield from bound_words(piece)


def bound_words(text: str) -> Iterator[str]:
    """Cut words that are longer than those of any language.

    The library's trainer takes quadratic time for a long word; SentencePiece's trainer bounds a
    sentence for the same reason. Only what is learned from is cut: texts are encoded whole, which
    takes time in proportion to n log n.
    """
    start = 0
    for run in _LONG_RUNS.finditer(text):
        for cut in range(run.start() + LONGEST_WORD, run.end(), LONGEST_WORD):
            yield text[start:cut]
            start = cut
    yield text[start:]
