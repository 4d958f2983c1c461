"""The tokenizer of characters: an id for each character that a text has.

It suits small models on small alphabets. A text with any other character is refused, so it takes
its alphabet from all splits of the data. Encoding is one look-up in a numpy table.
"""

import sys
from collections.abc import Iterable, Sequence

import numpy as np

from tinylm.core.errors import UserError
from tinylm.data.tokenizers.base import Tokenizer


class CharTokenizer(Tokenizer):
    """The characters of one text, sorted; the end of text is the id after them."""

    name = "char"
    can_spell_end = False

    def __init__(self, chars: str):
        self.chars = chars
        self.header = {"chars": chars}
        self.vocab_size = len(chars) + 1
        self.eot_id = len(chars)
        codes = np.array([ord(char) for char in chars], np.int64)
        # One entry more than the largest code: `take` clips all larger codes to that entry, -1.
        self._id_of_code = np.full(codes.max(initial=0) + 2, -1, np.int32)
        self._id_of_code[codes] = np.arange(len(codes))

    @classmethod
    def of(cls, texts: Iterable[str]) -> "CharTokenizer":
        """Return the tokenizer of the characters in `texts`."""
        seen = np.zeros(sys.maxunicode + 1, bool)
        for text in texts:
            seen[_code_points(text)] = True
        return cls("".join(map(chr, np.flatnonzero(seen).tolist())))

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode_text(text) for text in texts]

    def _encode_text(self, text: str) -> np.ndarray:
        ids = self._id_of_code.take(_code_points(text), mode="clip")
        if ids.min(initial=0) < 0:
            strange = "".join(sorted(set(text) - set(self.chars)))
            raise UserError(
                f"the tokenizer char has no id for {strange[:20]!r}, which the text that it was "
                "made from doesn't have; leave that out, or train on a text that has it (or with "
                "data.tokenizer=byte)."
            )
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.chars[i] for i in ids if i != self.eot_id).encode()


def _code_points(text: str) -> np.ndarray:
    """Return the code point of each character."""
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
