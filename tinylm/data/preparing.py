"""Preparing: documents are encoded once, into a token store that appears whole or not at all.

Work happens in a folder of its own beside the final one, which is renamed when its manifest is on the disk: a kill at
any point leaves at most such a folder, which the next run on the host removes. One process of a host works at a time
(a file lock, freed by the system when its holder dies); hosts that race for the same store are settled by the rename.
"""

import contextlib
import dataclasses
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
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tinylm.core.errors import StorageError, UserError
from tinylm.core.log import say
from tinylm.data.config import DataConfig
from tinylm.data.sources import Document, Source
from tinylm.data.store import FORMAT, MANIFEST, StoreWriter, smallest_dtype
from tinylm.data.tokenizers import Tokenizer

_BATCH_CHARS = 1 << 22


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
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.stat(folder).st_uid == os.getuid() or config.store_dir:
                return folder
    raise StorageError(f"{candidates[-1]} can't be made; set data.store_dir to a folder that can be written.")


def store_key(source: Source, splits: tuple[str, ...], tokenizer_key: Any) -> str:
    """Return the name of the store of some splits of a source's present content under a tokenizer."""
    from tinylm.data.sources import hash_bytes

    c = source.config
    identity = [FORMAT, source.spec, source.identity(), splits, tokenizer_key, c.valid_fraction, c.on_bad_text]
    return hash_bytes(json.dumps(identity).encode())


@contextlib.contextmanager
def locked(folder: pathlib.Path, name: str) -> Iterator[None]:
    """Hold the lock of one store on this host, after removing what dead holders left.

    On a file system without locks the rename alone settles races, and leftovers stay: they may be another's work.
    """
    path = folder / f"{name}.lock"
    try:
        file = path.open("a")
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror}; set data.store_dir elsewhere.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        else:
            for left in folder.glob(f"{name}.{socket.gethostname()}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        yield


@contextlib.contextmanager
def appearing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a new folder to fill, which becomes `folder` at the end; another that came first is left as it is."""
    temporary = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _rename(temporary, folder)
    except OSError as error:
        where = error.filename or folder.parent
        raise StorageError(f"{where}: {error.strerror or error}; free space there, or set data.store_dir.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: pathlib.Path, folder: pathlib.Path) -> None:
    """Rename a folder to its final name, for good; where another came first, leave that one."""
    try:
        os.rename(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    descriptor = os.open(folder.parent, os.O_RDONLY)
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


@dataclasses.dataclass
class Skipped:
    """How many documents were left out, and what was wrong with the first ten."""

    count: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def add(self, problem: str) -> None:
        """Count one more."""
        self.count += 1
        self.examples = [*self.examples, problem][:10]


def checked(documents: Iterable[Document], policy: str, skipped: Skipped | None = None) -> Iterator[Document]:
    """Yield the good documents; raise for bad ones, or count them in `skipped`, as the policy says."""
    for document in documents:
        if not document.problem:
            yield document
        elif policy == "error":
            raise UserError(f"{document.problem}; mend it, or set data.on_bad_text=skip.")
        elif skipped is not None:
            skipped.add(document.problem)


def encode(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Document, np.ndarray, int]]:
    """Yield each document with its ids and how many of them are its prompt's, a few MB of text at a time."""
    documents = iter(documents)
    while True:
        batch, chars = [], 0
        for document in documents:
            batch.append(document)
            chars += len(document.prompt) + len(document.text)
            if chars >= _BATCH_CHARS:
                break
        if not batch:
            return
        ids = iter(tokenizer.encode_batch([text for d in batch for text in (d.prompt, d.text) if text]))
        for document in batch:
            prompt = next(ids) if document.prompt else np.zeros(0, np.int32)
            text = next(ids) if document.text else np.zeros(0, np.int32)
            yield document, np.concatenate([prompt, text]), len(prompt)


class Preparer:
    """Fills one store from one source."""

    def __init__(self, source: Source, tokenizer: Tokenizer, folder: pathlib.Path, progress: bool):
        self.source, self.tokenizer, self.progress = source, tokenizer, progress
        self.writer = StoreWriter(folder, smallest_dtype(tokenizer.vocab_size))
        self.skipped = Skipped()
        self.num_documents = 0
        self.splits: dict[str, Any] = {}
        self._eot = np.array([tokenizer.eot_id], np.int32)
        self._bar: Any = None

    def run(self, splits: tuple[str, ...]) -> None:
        """Write the store of `splits`; raise UserError for bad text, StorageError for a disk that is full."""
        from tqdm import tqdm

        started = time.monotonic()
        self._bar = tqdm(
            total=self.source.total_bytes(), unit="B", unit_scale=True, desc="preparing", leave=False,
            disable=None if self.progress else True,
        )  # fmt: skip
        with self._bar:
            if self.source.own_splits:
                self._add_splits({name: name for name in splits})
            elif len(splits) == 1:
                self._add_splits({splits[0]: "all"})
            else:
                self._add_and_cut()
        if not self.num_documents:
            raise UserError(f"data.source={self.source.spec} holds no text.")
        self.writer.finish(self._manifest())
        secs = time.monotonic() - started
        if self.progress:
            self._report(secs)

    def _report(self, secs: float) -> None:
        w, count = self.writer, self.skipped.count
        rate = w.num_bytes / 1e6 / max(secs, 1e-9)
        skips = f"; skipped {count}, first: {self.skipped.examples[0]}" if count else ""
        say(
            f"prepared {self.source.spec}: {w.num_tokens:,} tokens of {self.num_documents:,} documents "
            f"in {secs:.1f} s ({rate:.1f} MB/s){skips}"
        )

    def _documents(self, split: str) -> Iterator[Document]:
        for document in checked(self.source.documents(split), self.source.config.on_bad_text, self.skipped):
            self.num_documents += 1
            yield document

    def _add(self, documents: Iterable[Document], *, closed: bool = True) -> float | None:
        """Write documents; return the sum of their log p, None where one has none."""
        total: float | None = 0.0
        for document, ids, num_prompt in encode(documents, self.tokenizer):
            size = len(document.prompt.encode()) + len(document.text.encode())
            self.writer.add(np.concatenate([ids, self._eot]) if closed else ids, size, num_prompt)
            self._bar.update(size)
            total = None if total is None or document.log_prob is None else total + document.log_prob
        return total

    def _add_splits(self, splits: dict[str, str]) -> None:
        """Write splits, given as their names and what they are called in the source."""
        for name, source_split in splits.items():
            begin = self._here()
            log_prob = self._add(self._documents(source_split))
            self._note_split(name, begin, self._here(), log_prob)

    def _here(self) -> tuple[int, int, int]:
        return self.writer.num_documents, self.writer.num_tokens, self.writer.num_bytes

    def _note_split(self, name: str, begin: tuple, end: tuple, log_prob: float | None = None) -> None:
        if begin[0] == end[0]:
            return
        split = {"documents": [begin[0], end[0]], "tokens": [begin[1], end[1]], "bytes": end[2] - begin[2]}
        self.splits[name] = split | ({"log_prob": log_prob} if log_prob is not None else {})

    def _add_and_cut(self) -> None:
        """Cut a single text inside, as nanoGPT does, where it has no end to learn; several between two of them."""
        fraction = self.source.config.valid_fraction
        documents = self._documents("all")
        first_two = list(itertools.islice(documents, 2))
        start = self._here()
        if len(first_two) == 1 and fraction and not first_two[0].prompt:
            text = first_two[0].text
            cut = int(len(text) * (1 - fraction))
            self._add([Document(text[:cut])] if cut else [], closed=False)
            middle = self._here()
            self._add([Document(text[cut:])], closed=False)
        else:
            self._add(itertools.chain(first_two, documents))
            middle = self._boundary(fraction)
        self._note_split("train", start, middle)
        self._note_split("valid", middle, self._here())

    def _boundary(self, fraction: float) -> tuple[int, int, int]:
        """Return the boundary between two documents with at most 1 - fraction of the text before it."""
        if not fraction or self.writer.num_documents < 2:
            return self._here()
        ends = self.writer.document_ends()
        cut = cut_documents(ends[:, 1], fraction)
        return cut, int(ends[cut - 1, 0]), int(ends[cut - 1, 1])

    def _manifest(self) -> dict[str, Any]:
        return {
            "source": self.source.spec,
            "documents": self.num_documents,
            "tokenizer": describe_tokenizer(self.tokenizer),
            "splits": self.splits,
            "skipped": dataclasses.asdict(self.skipped),
        }


def cut_documents(ends: np.ndarray, fraction: float) -> int:
    """Return how many documents, whose sizes add up to `ends`, are for training; at least one, and not all."""
    cut = int(np.searchsorted(ends, int(ends[-1] * (1 - fraction)), side="right"))
    return min(max(cut, 1), len(ends) - 1)


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a manifest says about the tokenizer."""
    t = tokenizer
    return {"name": t.name, "fingerprint": t.fingerprint, "vocab_size": t.vocab_size, "eot_id": t.eot_id}
