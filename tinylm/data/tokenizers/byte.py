"""The tokenizer of UTF-8 bytes: no file, no learning, any text; its sequences are the longest.

Numpy reads the bytes of a text where they are, so this tokenizer costs next to nothing.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from tinylm.data.tokenizers.base import Tokenizer, utf8


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes; the end of text is 256."""

    name = "byte"
    vocab_size = 257
    eot_id = 256
    can_spell_end = False

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in ids if i != self.eot_id)
