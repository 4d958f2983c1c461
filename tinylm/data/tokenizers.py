"""Text to ids and back: by bytes or characters here, by `bpe` learned from a text, by the files of
`vocabularies`.

A tokenizer is a small header and the files it came from, so a folder holds all of it and its
fingerprint is a hash of that. Ids in a text are never the end of text, whatever the text spells:
only `eot_id`, put there by the store, is. `encode_batch` holds this for every tokenizer, whatever
its library does with the name of the end in a text. Decoding is exact: `decode_bytes(encode(text))
== text.encode()` for all but what a vocabulary can't spell.
"""

import functools
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tinylm.core.errors import StorageError, UserError
from tinylm.core.log import say
from tinylm.data.config import split_spec

HEADER_FILE = "tinylm_tokenizer.json"
END = "<|endoftext|>"


class Tokenizer:
    """Base of all tokenizers: what follows from `encode_batch`, `decode_bytes` and the files."""

    name: str
    vocab_size: int
    eot_id: int
    light = False  # encodes in less time than it takes to hand text to another process
    files: dict[str, bytes] = {}  # noqa: RUF012  the files that make this tokenizer, by name,
    header: dict[str, Any] = {}  # noqa: RUF012  and what makes it beside them
    eot_name = ""  # how its files write the end of text, where they have a token for it
    unknown_ids: tuple[int, ...] = ()  # stand for what the vocabulary can't spell

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, without end of text, also where a text spells that."""
        return [self._without_end(ids) for ids in self._encode_texts(texts)]

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids that a tokenizer's own library or table gives to each text."""
        raise NotImplementedError

    def _without_end(self, ids: np.ndarray) -> np.ndarray:
        """Return ids in which each end of text, which the text must have spelled, is spelled by
        other ids.
        """
        places = np.flatnonzero(ids == self.eot_id)
        if not len(places):
            return ids
        parts = np.split(ids, places)
        # Each part but the first begins with an end of text.
        spelled = [
            parts[0],
            *(piece for part in parts[1:] for piece in (self._spelled_end, part[1:])),
        ]
        return np.concatenate(spelled).astype(ids.dtype)

    @functools.cached_property
    def _spelled_end(self) -> np.ndarray:
        """The ids that spell the name of the end of text; UserError where there are no such ids."""
        ids = self._spell_end()
        if self.eot_id not in ids and self.decode(ids.tolist()) == self.eot_name:
            return ids
        if not self.unknown_ids:
            raise UserError(
                f"a text holds {self.eot_name!r}, for which data.tokenizer={self.name} has "
                "no ids but the end of "
                "text; take it out of the text, or set data.eot_token to another token."
            )
        return np.array(self.unknown_ids[:1], np.int32)

    def _spell_end(self) -> np.ndarray:
        """Return ids for the name of the end of text, where possible others than the end itself."""
        characters = self._encode_texts(list(self.eot_name))
        return np.concatenate([np.zeros(0, np.int32), *characters])

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes that ids stand for; end of text is nothing."""
        raise NotImplementedError

    def count_bytes(self, ids: np.ndarray) -> int:
        """Return how many bytes of text ids stand for, document by document: a space added before
        each is none.
        """
        documents = np.split(ids, np.flatnonzero(ids == self.eot_id))
        return sum(len(self.decode_bytes(document.tolist())) for document in documents)

    def describe_end(self) -> str:
        """Say which id ends a text."""
        return (
            f"{self.eot_name} (id {self.eot_id})"
            if self.eot_name
            else f"id {self.eot_id}, which no text gives"
        )

    def count_unknown(self, ids: np.ndarray) -> int:
        """Return how many ids stand for what the vocabulary can't spell."""
        return sum(int((ids == unknown).sum()) for unknown in self.unknown_ids)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without end of text."""
        return self.encode_batch([text])[0].tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become replacement characters."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text of ids that follow `before`; decoded alone, they may lose the space they
        begin with.
        """
        return self.decode([*before, *ids])[len(self.decode(before)) :]

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides what ids mean."""
        digest = hashlib.sha256(json.dumps([self.name, self.header], sort_keys=True).encode())
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()[:32]

    def save(self, folder: Any) -> None:
        """Write this tokenizer into `folder`, which may also be in a bucket."""
        folder = _path(folder)
        header = {"name": self.name, "fingerprint": self.fingerprint, **self.header}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in self.files.items():
                (folder / name).write_bytes(content)
            (folder / HEADER_FILE).write_text(json.dumps(header, indent=1), encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"the tokenizer can't be written into {folder}: {error.strerror or error}."
            ) from error


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes; end of text is 256."""

    name, vocab_size, eot_id, light = "byte", 257, 256, True

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in ids if i != self.eot_id)


class CharTokenizer(Tokenizer):
    """The characters of one text, sorted; end of text is the id after them."""

    name, light = "char", True

    def __init__(self, chars: str):
        self.chars, self.header = chars, {"chars": chars}
        self.vocab_size, self.eot_id = len(chars) + 1, len(chars)
        codes = np.array([ord(char) for char in chars], np.int64)
        self._id_of_code = np.full(codes.max(initial=0) + 2, -1, np.int32)
        self._id_of_code[codes] = np.arange(len(codes))

    @classmethod
    def of(cls, texts: Iterable[str]) -> "CharTokenizer":
        """Return the tokenizer of the characters in `texts`."""
        seen = np.zeros(sys.maxunicode + 1, bool)
        for text in texts:
            seen[_codes(text)] = True
        return cls("".join(map(chr, np.flatnonzero(seen).tolist())))

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        ids = self._id_of_code.take(_codes(text), mode="clip")
        if ids.min(initial=0) < 0:
            strange = "".join(sorted(set(text) - set(self.chars)))
            raise UserError(
                f"the tokenizer char has no id for {strange[:20]!r}, which the text that "
                "it was made from doesn't "
                "have; leave that out, or train on a text that has it (or with "
                "data.tokenizer=byte)."
            )
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(self.chars[i] for i in ids if i != self.eot_id).encode()


def _codes(text: str) -> np.ndarray:
    """Return the code point of each character."""
    if text.isascii():
        return np.frombuffer(text.encode(), np.uint8)
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)


class TableTokenizer(Tokenizer):
    """A tokenizer whose every id stands for fixed bytes, listed in `_bytes_of_id`; end of text
    stands for none.
    """

    _bytes_of_id: list[bytes]

    def count_bytes(self, ids: np.ndarray) -> int:
        return int(self._num_bytes[ids].sum())

    @functools.cached_property
    def _num_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int64)
        sizes[: len(self._bytes_of_id)] = [len(content) for content in self._bytes_of_id]
        sizes[self.eot_id] = 0
        return sizes

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes_of_id[i] for i in ids if i != self.eot_id)

    @functools.cached_property
    def byte_ids(self) -> np.ndarray | None:
        """The id of each single byte, where there is one for all 256 of them."""
        id_of_bytes = {
            content: i
            for i, content in reversed(list(enumerate(self._bytes_of_id)))
            if i != self.eot_id
        }
        ids = [id_of_bytes.get(bytes([byte]), -1) for byte in range(256)]
        return np.array(ids, np.int32) if min(ids) >= 0 else None


def utf8(text: str) -> bytes:
    """Return the UTF-8 bytes of `text`; raise UserError for half of a surrogate pair, which has
    none.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is no Unicode at character {error.start}: {text[error.start]!r}."
        ) from error


def build_tokenizer(
    spec: str,
    vocab_top_k: int,
    texts: Callable[[], Iterable[str]],
    eot_token: str = "",
    all_texts: Callable[[], Iterable[str]] | None = None,
) -> Tokenizer:
    """Return the tokenizer of a config.

    Args:
        spec: `data.tokenizer`.
        vocab_top_k: How many of its ids to keep (0: all).
        texts: Gives the texts of the training split, which bpe and a cut learn from.
        eot_token: The token that ends a text, where a file has it under an unusual name.
        all_texts: Gives the texts of all splits, where these are more; `char` has their characters.
    """
    from tinylm.data import bpe, cut, vocabularies

    kind, argument = split_spec(spec)
    if kind == "char":
        tokenizer: Tokenizer = CharTokenizer.of((all_texts or texts)())
    elif kind == "bpe":
        tokenizer = bpe.BpeTokenizer.train(texts(), int(argument))
    else:
        tokenizer = (
            ByteTokenizer()
            if kind == "byte"
            else vocabularies.read_vocabulary(spec, eot_token or None)
        )
    if kind in ("hf", "sentencepiece"):
        vocabularies.tell(spec, tokenizer)
    if 0 < vocab_top_k < tokenizer.vocab_size:
        tokenizer = cut.CutTokenizer.of(tokenizer, texts(), vocab_top_k)
        say(tokenizer.describe())
    return tokenizer


def load_tokenizer(folder: Any) -> Tokenizer:
    """Return the tokenizer saved in `folder`; raise UserError where there is none or it was
    altered.
    """
    folder = _path(folder)
    try:
        header = json.loads((folder / HEADER_FILE).read_text(encoding="utf-8"))
        tokenizer = _restore(header, folder)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(
            f"{folder} holds no whole tokenizer of tinylm ({type(error).__name__}: {error})."
        ) from error
    if tokenizer.fingerprint != header.get("fingerprint"):
        raise UserError(
            f"the tokenizer in {folder} was altered: its fingerprint is not "
            f"{header.get('fingerprint')}."
        )
    return tokenizer


def _restore(header: dict[str, Any], folder: Any) -> Tokenizer:
    from tinylm.data import bpe, cut, vocabularies

    kind = split_spec(header["name"])[0]
    if kind == "char":
        tokenizer: Tokenizer = CharTokenizer(header["chars"])
    elif kind == "bpe":
        tokenizer = bpe.BpeTokenizer(header["name"], (folder / "tokenizer.json").read_bytes())
    else:
        tokenizer = (
            ByteTokenizer()
            if kind == "byte"
            else vocabularies.restore(kind, folder, header.get("eot_id"))
        )
    if "cut" in header:
        counts = dict(header["cut"])
        tokenizer = cut.CutTokenizer(tokenizer, counts.pop("kept"), counts)
    return tokenizer


def _path(folder: Any) -> Any:
    """Return a path object: epath's for a bucket, pathlib's else."""
    if "://" not in os.fspath(folder):
        return pathlib.Path(folder)
    from etils import epath

    return epath.Path(folder)
