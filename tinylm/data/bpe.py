"""Byte-level byte-pair encodings: a tokenizer.json, or merges learned from a text."""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tinylm.core.errors import UserError
from tinylm.core.settings import nearest
from tinylm.data.config import MAX_IDS
from tinylm.data.pieces import in_pieces, pieces
from tinylm.data.tokenizers import END, TableTokenizer, utf8

_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")
# GPT-2's pattern on ASCII, where letters, digits and spaces are these; Python's own classes are
# wider.
_ASCII_WORDS = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+|[\t-\r ]+(?![^\t-\r "
    r"])|[\t-\r ]+"
)
# A run of letters and signs, or of spaces, in which GPT-2's pattern may find a word as long. Each
# is tried at its first character alone, so a search takes linear time.
_LONGEST_WORD = 1000
_LONG_RUNS = re.compile(rf"(?<!\S)\S{{{_LONGEST_WORD + 1},}}|(?<!\s)\s{{{_LONGEST_WORD + 1},}}")


class BpeTokenizer(TableTokenizer):
    """Byte-level byte-pair encoding of a tokenizer.json (Sennrich et al. 2016, arXiv:1508.07909;
    GPT-2's bytes).
    """

    def __init__(
        self, name: str, tokenizer_json: bytes, eot: int | str | None = None, eot_hint: str = ""
    ):
        """Take the file's content, and the id or name of the end of text where it isn't the first
        of the usual names.

        Where the vocabulary has none of these, the end is `eot_hint` if that is a token, or a new
        id.
        """
        import tokenizers

        self.name, self.files = name, {"tokenizer.json": tokenizer_json}
        self._by_words = name.startswith("bpe:")
        self._known: dict[str, list[int]] = {}
        try:
            self._inner = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
            vocab = self._inner.get_vocab(with_added_tokens=True)
            last_id = max(vocab.values())
            usual = next((vocab[end] for end in _ENDS if end in vocab), last_id + 1)
            if eot is None:
                eot = vocab.get(eot_hint) if usual > last_id else usual
            if isinstance(eot, str):
                eot = _id_of_token(eot, vocab)
            self.eot_id = usual if eot is None else int(eot)
            self.vocab_size = max(self.eot_id, last_id) + 1
            if self.vocab_size > MAX_IDS or self.eot_id < 0:
                raise ValueError(
                    f"its ids reach {self.vocab_size - 1}, and its end of text is {self.eot_id}"
                )
            content = json.loads(tokenizer_json)
            added = {entry["id"]: entry for entry in content.get("added_tokens") or []}
            if not added.get(self.eot_id, {"special": True})["special"]:
                # The library takes the name of an added token in a text for the token, unless it is
                # a special one.
                added[self.eot_id]["special"] = True
                self._inner = tokenizers.Tokenizer.from_str(json.dumps(content))
        except UserError:
            raise
        except Exception as error:  # the library raises a bare Exception
            raise UserError(
                f"the file of data.tokenizer={name} is no tokenizer.json: {error}."
            ) from error
        self._inner.encode_special_tokens = True
        if self.eot_id != usual:
            self.header = {"eot_id": self.eot_id}
        self.eot_name = self._inner.id_to_token(self.eot_id) or ""
        byte_of_char = {char: byte for byte, char in byte_chars().items()}
        self._bytes_of_id = [b""] * self.vocab_size
        for token, i in vocab.items():
            # An added token is text as it stands, also where its letters (as in člověk) are among
            # those that the vocabulary writes for bytes.
            stands_for_bytes = i not in added and all(char in byte_of_char for char in token)
            self._bytes_of_id[i] = (
                bytes(byte_of_char[char] for char in token) if stands_for_bytes else token.encode()
            )
        self._added = [entry["content"] for entry in added.values()]
        self.unknown_ids = self._find_unknown(content["model"])

    def _find_unknown(self, model: dict[str, Any]) -> tuple[int, ...]:
        """Return the id that the model gives to what it can't spell, where there is such a
        thing.
        """
        if self.byte_ids is not None:
            return ()
        unknown = model.get("unk_id")
        if model.get("unk_token") is not None:
            unknown = self._inner.token_to_id(model["unk_token"])
        if unknown is not None and unknown == self.eot_id:
            raise UserError(
                f"data.tokenizer={self.name} has one token, {self.eot_name!r}, for the end "
                "of text and for what it "
                "can't spell; set data.eot_token to another of its tokens."
            )
        return () if unknown is None else (unknown,)

    def _spell_end(self) -> np.ndarray:
        if self.byte_ids is None:
            return super()._spell_end()
        return self.byte_ids[np.frombuffer(self.eot_name.encode(), np.uint8)]

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BpeTokenizer":
        """Learn the merges of `texts`; a small text may give fewer ids than `vocab_size`."""
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        words = (part for text in texts for piece in pieces(text) for part in bounded(piece))
        inner.train_from_iterator(words, trainer)
        return cls(f"bpe:{vocab_size}", inner.to_str().encode())

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return in_pieces(texts, self._encode_pieces)

    def _encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        if self._by_words and all(text.isascii() for text in texts):
            return self._encode_words(texts)
        return ids_by(self._inner, texts)

    def _encode_words(self, texts: list[str]) -> list[np.ndarray]:
        """Encode each word once: on one core several times as fast as the library."""
        words = [_ASCII_WORDS.findall(text) for text in texts]
        new = [word for word in set().union(*words) if word not in self._known]
        if len(self._known) + len(new) > 1 << 18:
            self._known, new = {}, list(set().union(*words))
        encodings = self._inner.encode_batch_fast(new, add_special_tokens=False)
        self._known.update(zip(new, (encoding.ids for encoding in encodings), strict=True))
        return [
            np.array([i for word in line for i in self._known[word]], np.int32) for line in words
        ]


def _id_of_token(token: str, vocab: dict[str, int]) -> int:
    """Return the id of the token that `data.eot_token` names."""
    if token not in vocab:
        raise UserError(
            f"data.eot_token={token} isn't a token of the tokenizer's file{nearest(token, vocab)}."
        )
    return vocab[token]


def bounded(text: str) -> Iterator[str]:
    """Cut words that are longer than any that a language has, for which the library's trainer takes
    quadratic time.

    SentencePiece's trainer bounds a sentence for the same reason. Only what is learned from is cut:
    texts are encoded whole, which takes time in proportion to n log n.
    """
    start = 0
    for run in _LONG_RUNS.finditer(text):
        for cut in range(run.start() + _LONGEST_WORD, run.end(), _LONGEST_WORD):
            yield text[start:cut]
            start = cut
    yield text[start:]


def ids_by(inner: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the ids that a tokenizer of the `tokenizers` library gives to each text."""
    texts = [utf8(text).decode() for text in texts]
    try:
        encodings = inner.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"the file of data.tokenizer can't spell a text: {error}.") from error
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


@functools.cache
def byte_chars() -> dict[int, str]:
    """Return the printable character that GPT-2's vocabulary files write for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }
