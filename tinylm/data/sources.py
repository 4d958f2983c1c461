"""Where text comes from: each source gives documents one by one, and says what content it stands
for.

A source is read as a stream, so it may be larger than memory. What it can't read as text it gives
as a document with a `problem` that names file and offset; the policy `data.on_bad_text` decides
what becomes of it. Whole files of another kind are an error under either policy. The token store is
keyed by `identity` and by the content of `content_files`, wherever these lie. `data.lowercase` and
`data.line_ends` hold for every source, and are applied here.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

from tinylm.core.errors import UserError
from tinylm.data import files, tales
from tinylm.data.config import DataConfig, split_spec

DEFAULT_TALES, VALID_TALES = 20_000, 1_000
_HELD_TALES = 100_000
ASCII_SPACE = " \t\n\v\f\r"
BYTE_ORDER_MARK = "\ufeff"


class Document(NamedTuple):
    """A text, with the part before it that carries no loss and its log p in nats where known; or
    what is wrong with it.

    A `problem` of the config, such as a wrong name of a field, has a `remedy` other than to skip
    the document.
    """

    text: str
    prompt: str = ""
    log_prob: float | None = None
    problem: str = ""
    remedy: str = ""


@dataclasses.dataclass
class Source:
    """One source of documents, named by the spec of a key of the config."""

    spec: str
    config: DataConfig
    key: str = "data.source"
    _has_windows_line_ends: bool = dataclasses.field(default=False, init=False)

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
        return [self.config.lowercase, self.config.line_ends]

    @property
    def content_files(self) -> list[str]:
        """The files that the documents come from, in their order, where a source has such files."""
        return []

    def documents(self, split: str) -> Iterator[Document]:
        """Yield the documents of "train" or "valid", or of "all" where there are no own splits,
        normalised.
        """
        for document in self.read_split(split):
            text = self._normalised(document.text)
            prompt = self._normalised(document.prompt)
            if text == document.text and prompt == document.prompt:
                yield document
            else:
                # The log p is that of the text as it was; another one may become the same text.
                yield Document(text, prompt=prompt)

    def _normalised(self, text: str) -> str:
        """Return `text` in the letters and line ends that the config asks for."""
        if "\r" in text:
            if self.config.line_ends == "unix":
                text = text.replace("\r\n", "\n").replace("\r", "\n")
            elif "\r\n" in text:
                self._has_windows_line_ends = True
        return text.lower() if self.config.lowercase else text

    def read_split(self, split: str) -> Iterator[Document]:
        """Yield the documents of a split as they are in the source."""
        raise NotImplementedError

    def remarks(self) -> list[str]:
        """Return what a user should know of the documents that were read so far."""
        if self._has_windows_line_ends:
            return [
                (
                    r"it has Windows' line ends (\r\n), which are kept; data.line_ends=unix "
                    r"makes them \n"
                )
            ]
        return []

    def total_bytes(self) -> int | None:
        """Return about how many bytes of text there are, where that is known beforehand."""
        return None


class TalesSource(Source):
    """The embedded corpus; a validation tale is never in training."""

    own_splits = True

    def identity(self) -> Any:
        grammar = hash_bytes(pathlib.Path(tales.__file__).read_bytes())
        return [super().identity(), self._count("train"), VALID_TALES, grammar]

    def read_split(self, split: str) -> Iterator[Document]:
        if self._count("train") <= _HELD_TALES:
            return iter(self._held[split])
        return (Document(text, log_prob=p) for text, p in tales.tales(split, self._count(split)))

    @functools.cached_property
    def _held(self) -> dict[str, list[Document]]:
        """Both splits of a small corpus in one pass, kept because a tokenizer that learns from it
        reads it too.
        """
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
    """What `text:`, `jsonl:`, `parquet:` and `tokens:` share: files of a glob, read in the order of
    their names.
    """

    endings: ClassVar[tuple[str, ...]] = ()

    @functools.cached_property
    def files(self) -> list[str]:
        """The files of a glob or folder, sorted; raise UserError where there are none or one can't
        be read.
        """
        paths = files.find(self.argument, self.endings)
        if not paths:
            raise UserError(
                f"{self.setting} matches no file; set {self.key} to a file, folder or glob "
                "that exists."
            )
        for path in paths:
            if not os.access(path, os.R_OK):
                raise UserError(
                    f"{path} can't be read by this user; change its permissions, or "
                    "correct the link."
                )
        return [files.rereadable(path) for path in paths]

    @property
    def content_files(self) -> list[str]:
        return self.files

    def total_bytes(self) -> int | None:
        if any(path.endswith(".parquet") or files.compression(path) for path in self.files):
            return None
        return sum(os.path.getsize(path) for path in self.files)

    def read_split(self, split: str) -> Iterator[Document]:
        for path in self.files:
            yield from self.read(path)

    def read(self, path: str) -> Iterator[Document]:
        """Yield the documents of one file."""
        raise NotImplementedError


@dataclasses.dataclass
class TextSource(FileSource):
    """Plain text, cut at `data.separator` where a file has it; what follows the last one may be
    blank.

    Whitespace around the separator belongs to it, unless `data.separator_space=keep`: TinyStories
    has a line break on either side. So does that at the ends of a file that is cut; and where the
    separator is itself whitespace (a blank line between paragraphs), any number of them is one. A
    document is held in memory whole: so is a file in which there is no separator.
    """

    endings = (".txt", ".text")
    _is_ever_cut: bool = dataclasses.field(default=False, init=False)

    @functools.cached_property
    def _separator(self) -> str:
        return self.config.separator_text

    def identity(self) -> Any:
        return [self._separator, self.config.separator_space, super().identity()]

    def read(self, path: str) -> Iterator[Document]:
        any_line_end = self.config.line_ends == "unix"
        blocks = files.split_stream(path, self._separator.encode(), any_line_end=any_line_end)
        offset, block = next(blocks)
        for next_offset, next_block in blocks:
            self._is_ever_cut = True
            yield from self._documents_of(block, path, offset, is_cut=True)
            offset, block = next_offset, next_block
        if offset == 0 or block.strip():
            yield from self._documents_of(block, path, offset, is_cut=offset > 0)

    def _documents_of(
        self, block: bytes, path: str, offset: int, is_cut: bool
    ) -> Iterator[Document]:
        """Yield the document of a stretch of a file; none for a stretch between two separators of
        whitespace.
        """
        strips = is_cut and self.config.separator_space == "drop"
        if strips and not self._separator.strip() and not block.strip():
            return
        yield decode(block, f"{path} at byte {offset}", offset, strips)

    def remarks(self) -> list[str]:
        remarks = super().remarks()
        if self._separator and not self._is_ever_cut:
            count = len(self.files)
            whole = (
                "its file is one document"
                if count == 1
                else f"each of its {count:,} files is one document"
            )
            hint = ""
            if "\n" in self._separator and self._has_windows_line_ends:
                hint = (
                    " (a separator with \\n matches Windows' line ends only with "
                    "data.line_ends=unix)"
                )
            remarks.insert(
                0, f"data.separator={self._separator!r} does not occur in it: {whole}{hint}"
            )
        return remarks


def hash_bytes(content: bytes) -> str:
    """Return a short hash of `content`."""
    return hashlib.sha256(content).hexdigest()[:32]


def decode(block: bytes, where: str, offset: int = 0, strips: bool = False) -> Document:
    """Return a document, or what is wrong with it: no UTF-8, binary, nothing in it.

    A byte order mark at its begin is no part of the text, nor is whitespace at its ends where
    `strips` says so. Only ASCII's whitespace is: a Chinese paragraph begins with wide spaces that
    are its own.
    """
    try:
        text = block.decode().removeprefix(BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        return Document("", problem=f"{where} is not UTF-8 (byte {offset + error.start})")
    if "\0" in text:
        return Document(
            "", problem=f"{where} holds a zero byte (byte {offset + block.index(0)}): it is no text"
        )
    if strips:
        text = text.strip(ASCII_SPACE)
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
