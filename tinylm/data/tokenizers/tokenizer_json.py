"""A tokenizer.json, the format of most open models, as the `tokenizers` library reads it.

The library encodes. Where the file is of GPT-2's kind, each id stands for fixed bytes that its
vocabulary writes as printable characters, and a table of our own decodes exactly; for all other
files the library decodes too, as well as it can (`altered_words` finds where it can't). Which token
ends a text isn't part of the format: it is given, or has one of the usual names, or is declared by
a file next to it, or is one more id.
"""

import contextlib
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tinylm.core.errors import UserError
from tinylm.core.settings import nearest
from tinylm.data.config import MAX_IDS
from tinylm.data.tokenizers.base import END, HEADER_FILE, TableTokenizer, Tokenizer, utf8

if TYPE_CHECKING:
    import tokenizers

USUAL_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "[EOS]")


class JsonTokenizer(TableTokenizer):
    """Any tokenizer.json.

    Attributes:
      inner: the library's tokenizer.
      added_words: the words that the file adds to the vocabulary of its model.
      is_byte_level: the vocabulary writes bytes as GPT-2's does, so `bytes_of_id` holds.
    """

    inner: "tokenizers.Tokenizer"

    def __init__(
        self,
        tokenizer_json: bytes,
        eot: int | str | None = None,
        eot_hint: str = "",
        name: str = "hf",
    ):
        """Read a file's content.

        Args:
          tokenizer_json: the content.
          eot: the id or the token that ends a text. None for the first token with a usual name.
          eot_hint: the token that ends a text where none has a usual name. Where this isn't a
            token either, the end is a new id.
          name: the name of the tokenizer.

        Raises:
          UserError: the content can't be read, or has no such end of text.
        """
        import tokenizers

        self.name = name
        self.files = {"tokenizer.json": tokenizer_json}
        try:
            inner = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
            content = json.loads(tokenizer_json)
            vocab = inner.get_vocab(with_added_tokens=True)
            last_id = max(vocab.values())
            usual_end = _usual_end(vocab)
            self.eot_id = _choose_end(vocab, usual_end, eot, eot_hint)
            self.vocab_size = max(self.eot_id, last_id) + 1
            if self.vocab_size > MAX_IDS or self.eot_id < 0:
                raise ValueError(
                    f"its ids reach {self.vocab_size - 1}, and its end of text is {self.eot_id}"
                )
            added = {entry["id"]: entry for entry in content.get("added_tokens") or []}
            if self.eot_id in added and not added[self.eot_id]["special"]:
                # The library takes the name of an added token in a text for the token, unless it is
                # a special one.
                added[self.eot_id]["special"] = True
                inner = tokenizers.Tokenizer.from_str(json.dumps(content))
        except UserError:
            raise
        except Exception as error:  # the library raises a bare Exception
            raise UserError(
                f"the file of data.tokenizer={name} is not a tokenizer.json: {error}."
            ) from error

        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        if self.eot_id != usual_end:
            self.header = {"eot_id": self.eot_id}
        self.eot_name = inner.id_to_token(self.eot_id) or ""
        self.added_words = [entry["content"] for entry in added.values()]
        self.is_byte_level = '"ByteLevel"' in json.dumps(content.get("decoder") or {})
        self.bytes_of_id = _list_bytes(vocab, self.vocab_size, added)
        self.unknown_ids = self._find_unknown(content["model"])

    @functools.cached_property
    def byte_ids(self) -> np.ndarray | None:
        return super().byte_ids if self.is_byte_level else None

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        if self.is_byte_level:
            return super().decode_bytes(ids)
        without_ends = [i for i in ids if i != self.eot_id]
        return self.inner.decode(without_ends, skip_special_tokens=False).encode()

    def count_bytes(self, ids: np.ndarray) -> int:
        if self.is_byte_level:
            return super().count_bytes(ids)
        return Tokenizer.count_bytes(self, ids)

    def altered_words(self) -> list[tuple[str, str]]:
        """Return the added words that don't come back as they were, each with what comes back."""
        texts: list[str] = []
        for word in self.added_words:
            texts.append(word)
            texts.append(f"a {word} b")
        found = [self.decode(ids.tolist()) for ids in self.encode_batch(texts)]
        return [(text, back) for text, back in zip(texts, found, strict=True) if text != back]

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return encode_by_library(self.inner, texts)

    def _spell_end(self) -> np.ndarray:
        if self.byte_ids is None:
            return super()._spell_end()
        return self.byte_ids[np.frombuffer(self.eot_name.encode(), np.uint8)]

    def _find_unknown(self, model: dict[str, Any]) -> tuple[int, ...]:
        """Return the id that the model gives to what it can't spell, where there is one."""
        if self.byte_ids is not None:
            return ()
        unknown = model.get("unk_id")
        if model.get("unk_token") is not None:
            unknown = self.inner.token_to_id(model["unk_token"])
        if unknown is None:
            return ()
        if unknown == self.eot_id:
            raise UserError(
                f"data.tokenizer={self.name} has one token, {self.eot_name!r}, for the end of text "
                "and for what it can't spell; set data.eot_token to another of its tokens."
            )
        return (unknown,)


def encode_by_library(inner: "tokenizers.Tokenizer", texts: Sequence[str]) -> list[np.ndarray]:
    """Return the ids that a tokenizer of the `tokenizers` library gives to each text."""
    texts = [utf8(text).decode() for text in texts]
    try:
        encodings = inner.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"the file of data.tokenizer can't spell a text: {error}.") from error
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


@functools.cache
def byte_chars() -> dict[int, str]:
    """Return the printable character that GPT-2's vocabulary files write for each byte.

    A byte that isn't printable is written as one of the characters from U+0100 on: a space is "Ġ".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = {byte: chr(byte) for byte in printable}
    for number, byte in enumerate(others):
        chars[byte] = chr(256 + number)
    return chars


def saved_end_id(path: pathlib.Path) -> Any:
    """Return the end of text in our header next to a tokenizer.json, as in a run's folder.

    None where there is no header, or it can't be read, or it names no end of text.
    """
    return _read_key(path.with_name(HEADER_FILE), "eot_id")


def declared_end(path: pathlib.Path) -> str:
    """Return the end of text that a tokenizer_config.json next to a tokenizer.json declares.

    Empty where it declares none.
    """
    token = _read_key(path.with_name("tokenizer_config.json"), "eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def _read_key(path: pathlib.Path, key: str) -> Any:
    """Return one value of a JSON file, or None where the file or the key can't be read."""
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        return json.loads(path.expanduser().read_bytes()).get(key)
    return None


def _usual_end(vocab: dict[str, int]) -> int:
    """Return the id of the first usual name of the end of text, or a new id."""
    for end in USUAL_ENDS:
        if end in vocab:
            return vocab[end]
    return max(vocab.values()) + 1


def _choose_end(vocab: dict[str, int], usual_end: int, eot: int | str | None, hint: str) -> int:
    """Return the id of the end of text; the arguments are those of `JsonTokenizer`."""
    if isinstance(eot, str):
        if eot not in vocab:
            raise UserError(
                f"data.eot_token={eot} isn't a token of the tokenizer's file{nearest(eot, vocab)}."
            )
        return vocab[eot]
    if eot is not None:
        return int(eot)
    has_usual_name = usual_end <= max(vocab.values())
    return usual_end if has_usual_name else vocab.get(hint, usual_end)


def _list_bytes(
    vocab: dict[str, int], vocab_size: int, added: Mapping[int, dict[str, Any]]
) -> list[bytes]:
    """Return the bytes of each id of a byte-level vocabulary."""
    byte_of_char = {char: byte for byte, char in byte_chars().items()}
    bytes_of_id = [b""] * vocab_size
    for token, i in vocab.items():
        # An added token is text as it stands, also where its letters (as in člověk) are among
        # those that the vocabulary writes for bytes.
        writes_bytes = i not in added and all(char in byte_of_char for char in token)
        if writes_bytes:
            content = bytes(byte_of_char[char] for char in token)
        else:
            content = token.encode()
        bytes_of_id[i] = content
    return bytes_of_id
