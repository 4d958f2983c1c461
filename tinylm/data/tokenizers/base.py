"""What all tokenizers share: text to ids and back, saving, and a fingerprint.

A tokenizer is a small header and the files it came from, so a folder holds all of it and its
fingerprint is a hash of that. Two properties hold for every tokenizer:

- The ids of a text never include the end of text (`eot_id`), whatever the text spells and whatever
  a library does with the name of the end. The token store alone writes that id.
- Decoding is exact: `decode_bytes(encode(text)) == text.encode()`, for all but what a vocabulary
  can't spell.
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from tinylm.core.errors import StorageError, UserError
from tinylm.core.files import make_folder

HEADER_FILE = "tinylm_tokenizer.json"
END = "<|endoftext|>"


class Tokenizer:
    """Base of all tokenizers: what follows from `_encode_texts`, `decode_bytes` and the files.

    Attributes:
      name: the kind, or the kind with its argument: `byte`, `bpe:512`.
      vocab_size: how many ids there are, including the end of text.
      eot_id: the id that ends a text.
      eot_name: how the files write the end of text; empty where they have no token for it.
      can_spell_end: whether what `_encode_texts` returns may hold the end of text. If not, it isn't
        looked for, which takes longer than encoding bytes does.
      unknown_ids: the ids that stand for what the vocabulary can't spell.
      files: the files that make this tokenizer, by name.
      header: what makes this tokenizer in addition to its files.
    """

    name: str
    vocab_size: int
    eot_id: int
    eot_name: str = ""
    can_spell_end: bool = True
    unknown_ids: tuple[int, ...] = ()
    files: Mapping[str, bytes] = MappingProxyType({})
    header: Mapping[str, Any] = MappingProxyType({})

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, without the end of text, even where a text spells it."""
        ids_of_texts = self._encode_texts(texts)
        if not self.can_spell_end:
            return ids_of_texts
        return [self._without_end(ids) for ids in ids_of_texts]

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without the end of text."""
        return self.encode_batch([text])[0].tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes that ids stand for; the end of text stands for none."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that aren't UTF-8 become replacement characters."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text of ids that follow `before`.

        Decoded alone, they may lose the space that they begin with.
        """
        return self.decode([*before, *ids])[len(self.decode(before)) :]

    def count_bytes(self, ids: np.ndarray) -> int:
        """Return how many bytes of text ids stand for.

        Each document counts by itself, so a space that the tokenizer adds before a text is left
        out.
        """
        documents = np.split(ids, np.flatnonzero(ids == self.eot_id))
        return sum(len(self.decode_bytes(document.tolist())) for document in documents)

    def count_unknown(self, ids: np.ndarray) -> int:
        """Return how many ids stand for what the vocabulary can't spell."""
        return sum(int((ids == unknown).sum()) for unknown in self.unknown_ids)

    def describe_end(self) -> str:
        """Return a phrase that names the id that ends a text."""
        if self.eot_name:
            return f"{self.eot_name} (id {self.eot_id})"
        return f"id {self.eot_id}, which no text gives"

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that decides what ids mean."""
        settings = [self.name, dict(self.header)]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()[:32]

    def save(self, folder: Any) -> None:
        """Write this tokenizer into a folder.

        Args:
          folder: a path, or the address of a folder in a bucket.

        Raises:
          StorageError: it can't be written.
        """
        folder = folder_path(folder)
        header = {"name": self.name, "fingerprint": self.fingerprint, **self.header}
        try:
            make_folder(folder)
            for name, content in self.files.items():
                (folder / name).write_bytes(content)
            (folder / HEADER_FILE).write_text(json.dumps(header, indent=1), encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"the tokenizer can't be written into {folder}: {error.strerror or error}."
            ) from error

    def _encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids that the tokenizer's library or table gives to each text."""
        raise NotImplementedError

    def _without_end(self, ids: np.ndarray) -> np.ndarray:
        """Replace each end of text, which the text itself must have spelled, by other ids."""
        places = np.flatnonzero(ids == self.eot_id)
        if not len(places):
            return ids
        first, *others = np.split(ids, places)
        kept = [first]
        for part in others:
            # Each part but the first begins with an end of text.
            kept.append(self._spelled_end)
            kept.append(part[1:])
        return np.concatenate(kept).astype(ids.dtype)

    @functools.cached_property
    def _spelled_end(self) -> np.ndarray:
        """The ids that spell the name of the end of text; UserError where there are none."""
        ids = self._spell_end()
        if self.eot_id not in ids and self.decode(ids.tolist()) == self.eot_name:
            return ids
        if not self.unknown_ids:
            raise UserError(
                f"a text holds {self.eot_name!r}, for which data.tokenizer={self.name} has no ids "
                "other than the end of text; take it out of the text, or set data.eot_token to "
                "another token."
            )
        return np.array(self.unknown_ids[:1], np.int32)

    def _spell_end(self) -> np.ndarray:
        """Return ids for the name of the end of text, where possible without the end itself."""
        ids_of_chars = self._encode_texts(list(self.eot_name))
        return np.concatenate([np.zeros(0, np.int32), *ids_of_chars])


class TableTokenizer(Tokenizer):
    """A tokenizer whose every id stands for fixed bytes.

    Attributes:
      bytes_of_id: the bytes of each id. What it has for the end of text is not used.
    """

    bytes_of_id: list[bytes]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self.bytes_of_id[i] for i in ids if i != self.eot_id)

    def count_bytes(self, ids: np.ndarray) -> int:
        return int(self._num_bytes[ids].sum())

    @functools.cached_property
    def byte_ids(self) -> np.ndarray | None:
        """The id of each single byte; None unless there is one for all 256 of them."""
        id_of_bytes: dict[bytes, int] = {}
        for i, content in enumerate(self.bytes_of_id):
            if i != self.eot_id:
                id_of_bytes.setdefault(content, i)
        ids = [id_of_bytes.get(bytes([byte])) for byte in range(256)]
        return None if None in ids else np.array(ids, np.int32)

    @functools.cached_property
    def _num_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.vocab_size, np.int64)
        sizes[: len(self.bytes_of_id)] = [len(content) for content in self.bytes_of_id]
        sizes[self.eot_id] = 0
        return sizes


def folder_path(folder: Any) -> Any:
    """Return a path object: epath's for a bucket, pathlib's for any other folder."""
    if "://" not in os.fspath(folder):
        return pathlib.Path(folder)
    from etils import epath

    return epath.Path(folder)


def utf8(text: str) -> bytes:
    """Return the UTF-8 bytes of `text`.

    Raises:
      UserError: the text has half of a surrogate pair, which UTF-8 can't encode.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not valid Unicode at character {error.start}: {text[error.start]!r}."
        ) from error
