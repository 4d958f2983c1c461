"""What all sources of text share: each gives documents one by one, and says what content it stands
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
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

from tinylm.core.errors import UserError
from tinylm.core.storage import in_bucket
from tinylm.data import mirror
from tinylm.data.config import DataConfig, split_spec
from tinylm.data.sources import files

BYTE_ORDER_MARK = "\ufeff"


class Document(NamedTuple):
    """A text, or what is wrong with it.

    Attributes:
      text: what is learned from; it carries loss.
      prompt: what stands before it and carries no loss.
      log_prob: the log probability of the text in nats, where it is known.
      problem: why the text could not be read; empty for a good document.
      remedy: what to do about a problem of the config, such as a wrong name of a field, where
        skipping the document is the wrong answer.
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
        """Yield the documents of a split, in the letters and line ends that the config asks for.

        Args:
          split: "train" or "valid"; "all" where the source has no splits of its own.
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
        if not self._has_windows_line_ends:
            return []
        return [
            r"it has Windows' line ends (\r\n), which are kept; data.line_ends=unix makes them \n"
        ]

    def total_bytes(self) -> int | None:
        """Return about how many bytes of text there are, where that is known beforehand."""
        return None


class FileSource(Source):
    """What `text:`, `jsonl:`, `parquet:` and `tokens:` share: files of a glob, read in the order of
    their names.
    """

    endings: ClassVar[tuple[str, ...]] = ()

    @functools.cached_property
    def files(self) -> list[str]:
        """The files of a glob or folder, sorted: paths, or URLs of objects in a bucket.

        Raises:
          UserError: there are none, or one can't be read.
        """
        if in_bucket(self.argument):
            paths = mirror.find(self.argument, self.endings, self.config.outage_secs)
        else:
            paths = files.find(self.argument, self.endings)
        if not paths:
            raise UserError(
                f"{self.setting} matches no file; set {self.key} to a file, folder or glob that "
                "exists."
            )
        if in_bucket(self.argument):
            return paths
        for path in paths:
            if not os.access(path, os.R_OK):
                raise UserError(
                    f"{path} can't be read by this user; change its permissions, or correct the "
                    "link."
                )
        return [files.rereadable(path) for path in paths]

    @property
    def local_files(self) -> list[str]:
        """The files on this disk; objects of a bucket are copied first."""
        return [self._local(path) for path in self.files]

    @property
    def content_files(self) -> list[str]:
        return self.files

    def total_bytes(self) -> int | None:
        paths = self.local_files
        if any(path.endswith(".parquet") or files.compression(path) for path in paths):
            return None
        return sum(os.path.getsize(path) for path in paths)

    def read_split(self, split: str) -> Iterator[Document]:
        for path in self.files:
            yield from self.read(self._local(path))

    def _local(self, path: str) -> str:
        """Return the path on this disk of one of the files."""
        return mirror.local(path, self.config.outage_secs)

    def read(self, path: str) -> Iterator[Document]:
        """Yield the documents of one file."""
        raise NotImplementedError


def good_documents(
    documents: Iterable[Document], policy: str, note: Callable[[Document], None] | None = None
) -> Iterator[Document]:
    """Yield the good documents, and treat the bad ones as the policy says.

    Args:
      documents: good ones and such with a problem.
      policy: "error" or "skip", as data.on_bad_text.
      note: called with each document that is skipped.

    Raises:
      UserError: a document is bad and the policy is "error".
    """
    for document in documents:
        if not document.problem:
            yield document
        elif policy == "error":
            remedy = document.remedy or "correct it, or set data.on_bad_text=skip"
            raise UserError(f"{document.problem}; {remedy}.")
        elif note is not None:
            note(document)


def hash_bytes(content: bytes) -> str:
    """Return a short hash of `content`."""
    return hashlib.sha256(content).hexdigest()[:32]
