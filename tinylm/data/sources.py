"""Where text comes from: each source gives documents one by one, and says what content it stands for.

A source is read as a stream, so it may be larger than memory. What it can't read as text it gives as a document with
a `problem` that names file and offset; the policy `data.on_bad_text` decides what becomes of it. The token store is
keyed by `identity` and by the content of `content_files`, wherever these lie.
"""

import dataclasses
import functools
import glob
import gzip
import hashlib
import itertools
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from tinylm.core.errors import UserError
from tinylm.core.optional import optional_module
from tinylm.data import tales
from tinylm.data.config import DataConfig, split_spec

_CHUNK_BYTES = 1 << 20
DEFAULT_TALES, VALID_TALES = 20_000, 1_000
_HELD_TALES = 100_000


class Document(NamedTuple):
    """A text, with the part before it that carries no loss, its log p in nats where known, or what is wrong with it."""

    text: str
    prompt: str = ""
    log_prob: float | None = None
    problem: str = ""


@dataclasses.dataclass
class Source:
    """One source of documents, named by the spec of a key of the config."""

    spec: str
    config: DataConfig
    key: str = "data.source"

    @property
    def setting(self) -> str:
        """Return the key and its value, as messages name them."""
        return f"{self.key}={self.spec}"

    @functools.cached_property
    def argument(self) -> str:
        """Return what follows the kind."""
        return split_spec(self.spec)[1]

    @functools.cached_property
    def own_splits(self) -> bool:
        """Whether there is a validation split of its own."""
        return False

    def identity(self) -> Any:
        """Return plain values that, with the content of the files, decide the documents."""
        return None

    @property
    def content_files(self) -> list[str]:
        """The files that the documents come from, in their order, where a source has such files."""
        return []

    def documents(self, split: str) -> Iterator[Document]:
        """Yield the documents of "train" or "valid", or of "all" where there are no own splits."""
        raise NotImplementedError

    def total_bytes(self) -> int | None:
        """Return about how many bytes of text there are, where that is known beforehand."""
        return None


class TalesSource(Source):
    """The embedded corpus; a validation tale is never in training."""

    own_splits = True

    def identity(self) -> Any:
        return [self._count("train"), VALID_TALES, hash_bytes(pathlib.Path(tales.__file__).read_bytes())]

    def documents(self, split: str) -> Iterator[Document]:
        if self._count("train") <= _HELD_TALES:
            return iter(self._held[split])
        return (Document(text, log_prob=p) for text, p in tales.tales(split, self._count(split)))

    @functools.cached_property
    def _held(self) -> dict[str, list[Document]]:
        """Both splits of a small corpus in one pass, kept because a tokenizer that learns from it reads it too."""
        held: dict[str, list[Document]] = {"train": [], "valid": []}
        for index in itertools.count():
            text, log_prob = tales.tale(index)
            split = "valid" if tales.is_valid(text) else "train"
            if len(held[split]) < self._count(split):
                held[split].append(Document(text, log_prob=log_prob))
            elif all(len(held[name]) == self._count(name) for name in held):
                return held
        raise AssertionError("there is always another tale")

    def _count(self, split: str) -> int:
        return VALID_TALES if split == "valid" else int(self.argument or DEFAULT_TALES)


class FileSource(Source):
    """What `text:`, `jsonl:`, `parquet:` and `tokens:` share: files of a glob, read in the order of their names."""

    @functools.cached_property
    def files(self) -> list[str]:
        """The files of the glob, sorted; raise UserError where there are none or one can't be read."""
        pattern = os.path.expanduser(self.argument)
        found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)  # a name may hold [ ]
        paths = sorted(path for path in found if not os.path.isdir(path))
        if not paths:
            raise UserError(f"{self.setting} matches no file; set {self.key} to a file or glob that exists.")
        for path in paths:
            if not os.access(path, os.R_OK):
                raise UserError(f"{path} can't be read by this user; change its permissions, or mend the link.")
        return [os.path.abspath(path) for path in paths]

    @property
    def content_files(self) -> list[str]:
        return self.files

    def total_bytes(self) -> int | None:
        compressed = any(path.endswith((".gz", ".zst", ".parquet")) for path in self.files)
        return None if compressed else sum(os.path.getsize(path) for path in self.files)

    def documents(self, split: str) -> Iterator[Document]:
        for path in self.files:
            yield from self.read(path)

    def read(self, path: str) -> Iterator[Document]:
        """Yield the documents of one file."""
        raise NotImplementedError


class TextSource(FileSource):
    """Plain text, cut at `data.separator` where a file has it; what follows the last one may be blank.

    A document is held in memory whole: so is a file in which there is no separator.
    """

    def identity(self) -> Any:
        return [self.config.separator, super().identity()]

    def read(self, path: str) -> Iterator[Document]:
        blocks = split_stream(path, self.config.separator.encode())
        offset, block = next(blocks)
        for next_offset, next_block in blocks:
            yield decode(block, f"{path} at byte {offset}", offset)
            offset, block = next_offset, next_block
        if offset == 0 or block.strip():
            yield decode(block, f"{path} at byte {offset}", offset)


def hash_bytes(content: bytes) -> str:
    """Return a short hash of `content`."""
    return hashlib.sha256(content).hexdigest()[:32]


def read_chunks(path: str) -> Iterator[bytes]:
    """Yield the content of a file, plain, .gz or .zst, in chunks; raise UserError where its compression is broken."""
    read = 0
    try:
        for chunk in _zst_chunks(path) if path.endswith(".zst") else _plain_chunks(path):
            read += len(chunk)
            yield chunk
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} can't be read after byte {read} of its content: {error}.") from error


def _plain_chunks(path: str) -> Iterator[bytes]:
    with gzip.open(path, "rb") if path.endswith(".gz") else pathlib.Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _zst_chunks(path: str) -> Iterator[bytes]:
    """Yield what one or more frames hold; a frame that is cut short is an EOFError, which the library's files miss."""
    zstandard = optional_module("zstandard", "files")

    decoder: Any = None
    left = b""
    with pathlib.Path(path).open("rb") as file:
        while raw := left or file.read(_CHUNK_BYTES):
            decoder, left = decoder or zstandard.ZstdDecompressor().decompressobj(), b""
            try:
                yield decoder.decompress(raw)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            if decoder.eof:
                decoder, left = None, decoder.unused_data
    if decoder is not None:
        raise EOFError("it ends in the middle of a frame")


def split_stream(path: str, separator: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, block) of the stretches between separators; always at least one."""
    held, offset = bytearray(), 0
    for chunk in read_chunks(path):
        search_from = max(0, len(held) - len(separator) + 1)
        held += chunk
        start = 0
        while separator and (end := held.find(separator, search_from)) >= 0:
            yield offset, bytes(held[start:end])
            offset += end + len(separator) - start
            start = search_from = end + len(separator)
        del held[:start]
    yield offset, bytes(held)


def decode(block: bytes, where: str, offset: int = 0) -> Document:
    """Return a document, or what is wrong with it: no UTF-8, binary, nothing in it."""
    try:
        text = block.decode()
    except UnicodeDecodeError as error:
        return Document("", problem=f"{where} is not UTF-8 (byte {offset + error.start})")
    if "\0" in text:
        return Document("", problem=f"{where} holds a zero byte (byte {offset + block.index(0)}): it is no text")
    return Document(text) if text.strip() else Document("", problem=f"{where} is an empty document")


def make_source(spec: str, config: DataConfig, key: str = "data.source") -> Source:
    """Return the source of documents that a spec of `key` names."""
    from tinylm.data import ready, records

    classes: dict[str, type[Source]] = {
        "tales": TalesSource,
        "text": TextSource,
        "addition": records.AdditionSource,
        "jsonl": records.JsonlSource,
        "parquet": records.ParquetSource,
        "tfds": records.TfdsSource,
        "hf": records.HubSource,
        "tokens": ready.TokenSource,
    }
    return classes[split_spec(spec)[0]](spec, config, key)
