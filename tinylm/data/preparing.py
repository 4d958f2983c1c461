"""Preparing: documents are encoded once, into a token store that appears whole or not at all.

Work happens in a folder of its own beside the final one, which is renamed when its manifest is on
the disk: a kill at any point leaves at most such a folder, which the next run on the host removes.
One process of a host works at a time (a file lock, freed by the system when its holder dies); hosts
that race for the same store are settled by the rename.
"""

import contextlib
import errno
import fcntl
import functools
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
from tinylm.core.files import sync, user_cache
from tinylm.core.log import alive, say
from tinylm.data import splits as splits_of
from tinylm.data.config import DataConfig, split_spec
from tinylm.data.encoding import Encoded, encode
from tinylm.data.sources import Document, Source, hash_bytes
from tinylm.data.store import FORMAT, MANIFEST, StoreWriter, read_manifest, smallest_dtype
from tinylm.data.tokenizers import Tokenizer

SKIPPED = "skipped.txt"
_TOLD_PROBLEMS = 10


def store_folder(config: DataConfig) -> pathlib.Path:
    """Return the folder of all stores: as configured, in the user's cache, or private in the
    temporary folder.
    """
    if config.store_dir:
        candidates = [pathlib.Path(config.store_dir).expanduser()]
    else:
        cache = user_cache()
        candidates = [cache / "stores"] if cache is not None else []
        candidates.append(pathlib.Path(tempfile.gettempdir(), f"tinylm-{os.getuid()}", "stores"))
    for folder in candidates:
        with contextlib.suppress(OSError):
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(exist_ok=True, mode=0o700)
            if config.store_dir or all(
                os.lstat(path).st_uid == os.getuid() for path in (folder.parent, folder)
            ):
                return folder
    raise StorageError(
        f"{candidates[-1]} can't be made; set data.store_dir to a folder that can be written."
    )


def text_key(source: Source, splits: tuple[str, ...], checksums: list[str]) -> list[Any]:
    """Return what decides the text of some splits of a source, with the checksums of its files; not
    where it lies.
    """
    c = source.config
    kind = split_spec(source.spec)[0]
    # How a file is read depends on the end of its name (.gz), so a content under another end is
    # another text.
    files = [
        [pathlib.Path(path).suffix, sha256]
        for path, sha256 in zip(source.content_files, checksums, strict=True)
    ]
    return [kind, source.identity(), files, splits, c.valid_fraction, c.valid_split, c.on_bad_text]


def store_key(text: list[Any], tokenizer: Any) -> str:
    """Return the name of the store of a text (its `text_key`) under a tokenizer."""
    return hash_bytes(json.dumps([FORMAT, text, tokenizer]).encode())


def make(
    folder: pathlib.Path,
    is_whole: Callable[[pathlib.Path], bool],
    fill: Callable[[pathlib.Path], None],
) -> None:
    """Let `fill` make the content of `folder`, which appears at once and whole, unless it is there
    by then.

    Raises StorageError where that can't be written. Another host's folder that came first is left
    as it is.
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
                sync(path)
            try:
                os.rename(temporary, folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            sync(folder.parent)
    except OSError as error:
        where = error.filename or folder.parent
        raise StorageError(
            f"{where}: {error.strerror or error}; free space there, or set data.store_dir."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
    """Hold the lock of one folder on this host, after removing what dead holders left.

    On a file system without locks the rename alone settles races, and leftovers stay: they may be
    another's work.
    """
    with folder.with_name(f"{folder.name}.lock").open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        else:
            for left in folder.parent.glob(f"{folder.name}.{socket.gethostname()}.*.tmp"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def wait_for(folder: pathlib.Path, wait_secs: float) -> None:
    """Wait until another process has prepared `folder`; raise UserError after `wait_secs`."""
    end = time.monotonic() + wait_secs
    while not (folder / MANIFEST).exists():
        if time.monotonic() > end:
            raise UserError(
                f"process 0 has not prepared {folder} within {wait_secs:.0f} s; all "
                "processes must see the same "
                "data.store_dir and the same files. Prepare first with tinylm.prepare for "
                "large data."
            )
        time.sleep(0.2)


def checked(
    documents: Iterable[Document], policy: str, note: Callable[[Document], None] | None = None
) -> Iterator[Document]:
    """Yield the good documents; raise for bad ones, or skip and `note` them, as the policy says."""
    for document in documents:
        if not document.problem:
            yield document
        elif policy == "error":
            remedy = document.remedy or "correct it, or set data.on_bad_text=skip"
            raise UserError(f"{document.problem}; {remedy}.")
        elif note is not None:
            note(document)


def training_documents(source: Source, holds_out: bool) -> Iterator[Document]:
    """Yield the good documents for training, as a store has them; `holds_out` where a part is for
    validation.
    """
    c = source.config
    good = functools.partial(checked, policy=c.on_bad_text)
    if source.own_splits:
        yield from good(source.documents("train"))
    elif not holds_out or not c.valid_fraction:
        yield from good(source.documents("all"))
    elif c.valid_split == "random":
        yield from splits_of.side_of(good(source.documents("all")), "train", c.valid_fraction)
    elif cut := splits_of.tail_cut(good(source.documents("all")), source):
        yield from splits_of.before(good(source.documents("all")), cut)


class Skipped:
    """What was skipped: counted, the first of it kept, and all of it written to a file, a line
    each.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.count = 0
        self.first: list[str] = []

    def note(self, document: Document) -> None:
        """Take in a document that is skipped."""
        line = "; ".join(filter(None, (document.problem, document.remedy)))
        self.count += 1
        if len(self.first) < _TOLD_PROBLEMS:
            self.first.append(line)
        # Opened each time, for what is skipped is rare; a name of a file may be no text.
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line + "\n")

    def forget(self) -> None:
        """Begin again, before the source is read again."""
        self.path.unlink(missing_ok=True)
        self.count = 0
        self.first = []


def tell_skipped(folder: pathlib.Path) -> None:
    """Say what was skipped for the store in `folder`: the first, with file and place, and where the
    rest stands.
    """
    skipped = read_manifest(folder)["skipped"]
    if not skipped["count"]:
        return
    say(f"skipped {skipped['count']:,} documents (data.on_bad_text=skip):")
    for problem in skipped["examples"]:
        say(f"  {problem}")
    if skipped["count"] > len(skipped["examples"]):
        say(f"  all of them are in {folder / SKIPPED}")


class Preparer:
    """Fills one store from one source; `folder` already holds the tokenizer."""

    def __init__(self, source: Source, tokenizer: Tokenizer, folder: pathlib.Path, progress: bool):
        self.source, self.tokenizer, self.folder, self.progress = (
            source,
            tokenizer,
            folder,
            progress,
        )
        self.writer = self._new_writer()
        self.skipped = Skipped(folder / SKIPPED)
        self.splits: dict[str, Any] = {}
        self.num_documents = 0
        self._is_cut_inside = False

    def _new_writer(self) -> StoreWriter:
        dtype = smallest_dtype(self.tokenizer.vocab_size)
        return StoreWriter(self.folder, dtype, self.tokenizer.unknown_ids)

    def run(self, splits: tuple[str, ...]) -> None:
        """Write the store of `splits`; raise UserError for bad text, StorageError for a disk that
        is full.
        """
        started = time.monotonic()
        with progress_bar(self.source.total_bytes(), self.progress) as self._bar, self._alive():
            self._add_all(splits)
        if not self.num_documents:
            skips = (
                f" (skipped {self.skipped.count:,}, first: {self.skipped.first[0]})"
                if self.skipped.count
                else ""
            )
            raise UserError(f"{self.source.setting} holds no text{skips}.")
        manifest = {
            "source": self.source.spec,
            "tokenizer": describe_tokenizer(self.tokenizer),
            "splits": self.splits,
        }
        skipped = {"count": self.skipped.count, "examples": self.skipped.first}
        more = {"documents": self.num_documents, "skipped": skipped, "held_out": self._held_out()}
        self.writer.finish(manifest | more)
        if self.progress:
            self._tell(time.monotonic() - started)

    def _alive(self) -> contextlib.AbstractContextManager[None]:
        """Say how far it is where there is no terminal for a bar."""
        if not self._bar.disable:
            return contextlib.nullcontext()
        return alive(
            lambda: f"preparing {self.source.spec}: {self.writer.num_bytes / 1e6:,.0f} MB of text"
        )

    def _tell(self, secs: float) -> None:
        """Say what was prepared, what is held out, and what is noteworthy about the source."""
        w = self.writer
        say(
            f"prepared {self.source.spec}: {w.tokens.total:,} tokens of "
            f"{self.num_documents:,} documents "
            f"in {secs:.1f} s ({w.num_bytes / 1e6 / max(secs, 1e-9):.1f} MB/s)"
        )
        if held_out := self._held_out():
            say(f"held out for validation: {held_out}")
        for remark in self.source.remarks():
            say(f"{self.source.spec}: {remark}.")

    def _held_out(self) -> str:
        """Return which part of a source without splits is held out, in words."""
        if self.source.own_splits or not {"train", "valid"} <= self.splits.keys():
            return ""
        first, last = self.splits["valid"]["documents"]
        share = self.splits["valid"]["bytes"] / self.writer.num_bytes
        count = last - first
        if self.source.config.valid_split == "random":
            which = f"{count:,} random documents"
        elif self._is_cut_inside:
            which = (
                "the end of the last document"
                if count == 1
                else f"the last {count:,} documents, cut inside one"
            )
        else:
            which = "the last document" if count == 1 else f"the last {count:,} documents"
        return f"{which}, {share:.1%} of the text"

    def _add_all(self, splits: tuple[str, ...]) -> None:
        """Write the documents of all splits, one split after the other."""
        c = self.source.config
        if self.source.own_splits:
            for name in splits:
                self._add_split(name, self._good(name))
        elif len(splits) == 1 or not c.valid_fraction:
            self._add_split(splits[0], self._good("all"))
        elif c.valid_split == "random":
            self._add_random()
        else:
            self._add_and_cut()

    def _good(self, split: str) -> Iterator[Document]:
        """Yield the good documents of a split."""
        for document in checked(
            self.source.documents(split), self.source.config.on_bad_text, self.skipped.note
        ):
            self.num_documents += 1
            yield document

    def _start_over(self) -> None:
        """Forget what was read and written, before the source is read again."""
        self.writer.close()
        self.writer = self._new_writer()
        self.skipped.forget()
        self.num_documents = 0
        self._bar.reset()

    def _add(self, documents: Iterable[Document], *, closed: bool = True) -> float | None:
        """Write documents on a thread of its own; return the sum of their log p, None where one has
        none.
        """
        total: float | None = 0.0
        with futures.ThreadPoolExecutor(1) as thread:
            writing: futures.Future | None = None
            for batch, encoded in encode(documents, self.tokenizer, self.folder / "tokenizer"):
                for document in batch:
                    total = (
                        None
                        if total is None or document.log_prob is None
                        else total + document.log_prob
                    )
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
        sizes = np.array(
            [len(document.prompt.encode()) + len(document.text.encode()) for document in batch]
        )
        self.writer.add(ids, lengths, sizes, prompts)
        self._bar.update(int(sizes.sum()))

    def _add_split(self, name: str, documents: Iterable[Document]) -> None:
        first = self.writer.num_documents
        log_prob = self._add(documents)
        self._note_split(name, first, self.writer.num_documents, log_prob)

    def _note_split(self, name: str, first: int, last: int, log_prob: float | None = None) -> None:
        if first == last:
            return
        ends = self.writer.document_ends()
        begin, end = (ends[number - 1].tolist() if number else [0, 0] for number in (first, last))
        split = {
            "documents": [first, last],
            "tokens": [begin[0], end[0]],
            "bytes": end[1] - begin[1],
        }
        self.splits[name] = split | ({"log_prob": log_prob} if log_prob is not None else {})

    def _add_random(self) -> None:
        """Read the source twice, once for each side, so that neither is held in memory."""
        fraction = self.source.config.valid_fraction
        for name in ("train", "valid"):
            self.skipped.forget()
            self.num_documents = 0
            self._add_split(name, splits_of.side_of(self._good("all"), name, fraction))
        if self.num_documents and self.splits.keys() != {"train", "valid"}:
            raise UserError(
                f"data.valid_split=random put all {self.num_documents:,} documents of "
                f"{self.source.setting} on one "
                "side; set data.valid_split=tail, or another data.valid_fraction."
            )

    def _add_and_cut(self) -> None:
        """Write all documents, and cut between two; where that would stray far, start over and cut
        inside one.
        """
        fraction = self.source.config.valid_fraction
        documents = self._good("all")
        first_two = list(itertools.islice(documents, 2))
        if not first_two:
            return
        if len(first_two) == 1 and not first_two[0].prompt:
            self._add_parts(splits_of.Cut(0, 1 - fraction), iter(first_two))
            return
        self._add(itertools.chain(first_two, documents))
        has_prompts = self.writer.masks.total > 0
        cut = splits_of.choose_cut(
            self.writer.document_ends()[:, 1], self.source, can_cut_inside=not has_prompts
        )
        if cut.inside:
            self._start_over()
            self._add_parts(cut, self._good("all"))
            return
        self._note_split("train", 0, cut.document)
        self._note_split("valid", cut.document, self.writer.num_documents)

    def _add_parts(self, cut: splits_of.Cut, documents: Iterator[Document]) -> None:
        """Write documents of which one is cut inside: no end of text follows its first part.

        A text that is alone has no end of text at all, as in nanoGPT: there would be none to learn
        from.
        """
        self._is_cut_inside = True
        self._add(itertools.islice(documents, cut.document))
        halves = splits_of.parts(next(documents), cut)
        self._add([part for part in halves[:1] if part.text], closed=False)
        middle = self.writer.num_documents
        rest = list(itertools.islice(documents, 1))
        is_alone = cut.document == 0 and not rest
        self._add([part for part in halves[1:] if part.text], closed=not is_alone)
        self._add(itertools.chain(rest, documents))
        self._note_split("train", 0, middle)
        self._note_split("valid", middle, self.writer.num_documents)


def progress_bar(total: int | None, shown: bool, what: str = "preparing") -> Any:
    """Return a bar of bytes that goes on a terminal alone, and is gone at the end."""
    from tqdm import tqdm

    disable = None if shown else True
    return tqdm(total=total, unit="B", unit_scale=True, desc=what, leave=False, disable=disable)


def describe_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a manifest says about the tokenizer."""
    t = tokenizer
    return {
        "name": t.name,
        "fingerprint": t.fingerprint,
        "vocab_size": t.vocab_size,
        "eot_id": t.eot_id,
    }
