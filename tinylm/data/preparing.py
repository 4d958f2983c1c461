"""Preparing: documents are encoded once, into a token store that appears whole or not at all.

Work happens in a folder of its own beside the final one, which is renamed when its manifest is on the disk: a kill at
any point leaves at most such a folder, which the next run on the host removes. One process of a host works at a time
(a file lock, freed by the system when its holder dies); hosts that race for the same store are settled by the rename.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import pathlib
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import numpy as np

from tinylm.core.errors import StorageError, UserError
from tinylm.core.log import say
from tinylm.data.config import DataConfig, split_spec
from tinylm.data.encoding import Encoded, encode
from tinylm.data.sources import Document, Source, hash_bytes
from tinylm.data.store import FORMAT, MANIFEST, StoreWriter, smallest_dtype
from tinylm.data.tokenizers import Tokenizer

_TOLD_PROBLEMS = 10


def store_folder(config: DataConfig) -> pathlib.Path:
    """Return the folder of all stores: as configured, in the user's cache, or private in the temporary folder."""
    if config.store_dir:
        candidates = [pathlib.Path(config.store_dir).expanduser()]
    else:
        home = os.environ.get("HOME", "")
        cache = os.environ.get("XDG_CACHE_HOME") or (os.path.join(home, ".cache") if home else "")
        candidates = [pathlib.Path(cache, "tinylm", "stores")] if cache else []
        candidates.append(pathlib.Path(tempfile.gettempdir(), f"tinylm-{os.getuid()}", "stores"))
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(exist_ok=True, mode=0o700)
            if config.store_dir or all(os.lstat(path).st_uid == os.getuid() for path in (folder.parent, folder)):
                return folder
    raise StorageError(f"{candidates[-1]} can't be made; set data.store_dir to a folder that can be written.")


def text_key(source: Source, splits: tuple[str, ...], checksums: list[str]) -> list[Any]:
    """Return what decides the text of some splits of a source, with the checksums of its files; not where it lies."""
    c = source.config
    kind = split_spec(source.spec)[0]
    # How a file is read depends on the end of its name (.gz), so a content under another end is another text.
    files = [[pathlib.Path(path).suffix, sha256] for path, sha256 in zip(source.content_files, checksums, strict=True)]
    return [kind, source.identity(), files, splits, c.valid_fraction, c.on_bad_text]


def store_key(text: list[Any], tokenizer: Any) -> str:
    """Return the name of the store of a text (its `text_key`) under a tokenizer."""
    return hash_bytes(json.dumps([FORMAT, text, tokenizer]).encode())


def make(folder: pathlib.Path, is_whole: Callable[[pathlib.Path], bool], fill: Callable[[pathlib.Path], None]) -> None:
    """Let `fill` make the content of `folder`, which appears at once and whole, unless it is there by then.

    Raises StorageError where that can't be written. Another host's folder that came first is left as it is.
    """
    temporary = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with _locked(folder):
            if folder.exists():
                if is_whole(folder):
                    return
                shutil.rmtree(folder)
            temporary.mkdir(parents=True)
            fill(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                _sync(path)
            try:
                os.rename(temporary, folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            _sync(folder.parent)
    except OSError as error:
        where = error.filename or folder.parent
        raise StorageError(f"{where}: {error.strerror or error}; free space there, or set data.store_dir.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock of one folder on this host, after removing what dead holders left.

    On a file system without locks the rename alone settles races, and leftovers stay: they may be another's work.
    """
    with folder.with_name(f"{folder.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        else:
            for left in folder.parent.glob(f"{folder.name}.{socket.gethostname()}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def _sync(path: pathlib.Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def wait_for(folder: pathlib.Path, wait_secs: float) -> None:
    """Wait until another process has prepared `folder`; raise UserError after `wait_secs`."""
    end = time.monotonic() + wait_secs
    while not (folder / MANIFEST).exists():
        if time.monotonic() > end:
            raise UserError(
                f"process 0 has not prepared {folder} within {wait_secs:.0f} s; all processes must see the same "
                "data.store_dir and the same files. Prepare first with tinylm.prepare for large data."
            )
        time.sleep(0.2)


def checked(documents: Iterable[Document], policy: str, problems: list[str] | None = None) -> Iterator[Document]:
    """Yield the good documents; raise for bad ones, or note what is wrong with them, as the policy says."""
    for document in documents:
        if not document.problem:
            yield document
        elif policy == "error":
            raise UserError(f"{document.problem}; mend it, or set data.on_bad_text=skip.")
        elif problems is not None:
            problems.append(document.problem if len(problems) < _TOLD_PROBLEMS else "")


class Preparer:
    """Fills one store from one source; `folder` already holds the tokenizer."""

    def __init__(self, source: Source, tokenizer: Tokenizer, folder: pathlib.Path, progress: bool):
        self.source, self.tokenizer, self.folder, self.progress = source, tokenizer, folder, progress
        self.writer = StoreWriter(folder, smallest_dtype(tokenizer.vocab_size), tokenizer.unknown_ids)
        self.problems: list[str] = []
        self.splits: dict[str, Any] = {}
        self.num_documents = 0

    def run(self, splits: tuple[str, ...]) -> None:
        """Write the store of `splits`; raise UserError for bad text, StorageError for a disk that is full."""
        started = time.monotonic()
        with progress_bar(self.source.total_bytes(), self.progress) as self._bar:
            if self.source.own_splits:
                for name in splits:
                    self._add_split(name, name)
            elif len(splits) == 1:
                self._add_split(splits[0], "all")
            else:
                self._add_and_cut()
        skips = f"skipped {len(self.problems)}, first: {self.problems[0]}" if self.problems else ""
        if not self.num_documents:
            raise UserError(f"{self.source.setting} holds no text{skips and f' ({skips})'}.")
        manifest = {"source": self.source.spec, "tokenizer": describe_tokenizer(self.tokenizer), "splits": self.splits}
        skipped = {"count": len(self.problems), "examples": self.problems[:_TOLD_PROBLEMS]}
        self.writer.finish({**manifest, "documents": self.num_documents, "skipped": skipped})
        if self.progress:
            w, secs = self.writer, time.monotonic() - started
            say(
                f"prepared {self.source.spec}: {w.tokens.total:,} tokens of {self.num_documents:,} documents "
                f"in {secs:.1f} s ({w.num_bytes / 1e6 / max(secs, 1e-9):.1f} MB/s){skips and f'; {skips}'}"
            )

    def _good(self, split: str) -> Iterator[Document]:
        for document in checked(self.source.documents(split), self.source.config.on_bad_text, self.problems):
            self.num_documents += 1
            yield document

    def _add(self, documents: Iterable[Document], *, closed: bool = True) -> float | None:
        """Write documents on a thread of its own; return the sum of their log p, None where one has none."""
        total: float | None = 0.0
        with futures.ThreadPoolExecutor(1) as thread:
            writing: futures.Future | None = None
            for batch, encoded in encode(documents, self.tokenizer, self.folder / "tokenizer"):
                for document in batch:
                    total = None if total is None or document.log_prob is None else total + document.log_prob
                if writing:
                    writing.result()
                writing = thread.submit(self._write, batch, encoded, closed)
            if writing:
                writing.result()
        return total

    def _write(self, batch: list[Document], encoded: Encoded, closed: bool) -> None:
        ids, counts = encoded
        prompts = counts[::2]
        lengths = prompts + counts[1::2]
        if closed:
            ids, lengths = np.insert(ids, np.cumsum(lengths), self.tokenizer.eot_id), lengths + 1
        sizes = np.array([len(document.prompt.encode()) + len(document.text.encode()) for document in batch])
        self.writer.add(ids, lengths, sizes, prompts)
        self._bar.update(int(sizes.sum()))

    def _add_split(self, name: str, source_split: str) -> None:
        """Write a split, which the source may call otherwise."""
        first = self.writer.num_documents
        log_prob = self._add(self._good(source_split))
        self._note_split(name, first, self.writer.num_documents, log_prob)

    def _note_split(self, name: str, first: int, last: int, log_prob: float | None = None) -> None:
        if first == last:
            return
        ends = self.writer.document_ends()
        begin, end = (ends[number - 1].tolist() if number else [0, 0] for number in (first, last))
        split = {"documents": [first, last], "tokens": [begin[0], end[0]], "bytes": end[1] - begin[1]}
        self.splits[name] = split | ({"log_prob": log_prob} if log_prob is not None else {})

    def _add_and_cut(self) -> None:
        """Cut a single text inside, as nanoGPT does, where it has no end to learn; several between two of them."""
        fraction = self.source.config.valid_fraction
        documents = self._good("all")
        first_two = list(itertools.islice(documents, 2))
        if len(first_two) == 1 and fraction and not first_two[0].prompt:
            text = first_two[0].text
            cut = int(len(text) * (1 - fraction))
            self._add([Document(text[:cut])] if cut else [], closed=False)
            middle = self.writer.num_documents
            self._add([Document(text[cut:])], closed=False)
        else:
            self._add(itertools.chain(first_two, documents))
            middle = self.writer.num_documents
            if fraction and middle > 1:
                middle = cut_documents(self.writer.document_ends()[:, 1], fraction)
        self._note_split("train", 0, middle)
        self._note_split("valid", middle, self.writer.num_documents)


def progress_bar(total: int | None, shown: bool, what: str = "preparing") -> Any:
    """Return a bar of bytes that goes on a terminal alone, and is gone at the end."""
    from tqdm import tqdm

    disable = None if shown else True
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, leave=False, disable=disable)


def cut_documents(ends: np.ndarray, fraction: float) -> int:
    """Return how many documents, whose sizes add up to `ends`, are for training; at least one, and not all."""
    cut = int(np.searchsorted(ends, int(ends[-1] * (1 - fraction)), side="right"))
    return min(max(cut, 1), len(ends) - 1)


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a manifest says about the tokenizer."""
    t = tokenizer
    return {"name": t.name, "fingerprint": t.fingerprint, "vocab_size": t.vocab_size, "eot_id": t.eot_id}
