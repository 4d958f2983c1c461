"""Token stores: ids in shards that are read at random, where documents end, and a manifest that is
written last.

A store is a folder. `manifest.json` names its shards (in the smallest unsigned type that holds the
vocabulary, or ready files that are read in place) with sizes and checksums; `documents.bin` has,
after each document, how many tokens and bytes of text there are so far; `mask-*.bin`, where there
are prompts, is 1 where a token carries loss. Both splits lie in one sequence. Nothing in a store
depends on where its text lay, so each opening says where ready files are. Opening costs a look
at each shard, whatever its size. A file that is cut or written to under a run is an error at the
next reading, so shards are read, not mapped (a map that shrinks kills the process). One that was
only touched is compared with its checksum, and read on.
"""

import bisect
import collections
import dataclasses
import hashlib
import itertools
import json
import mmap
import os
import pathlib
import resource
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from tinylm.core.errors import StorageError
from tinylm.data.bucket_files import BucketFile, Remote
from tinylm.data.manifest import (
    Manifest,
    Shard,
    SkippedFacts,
    Split,
    TokenizerFacts,
    as_json,
    read_manifest,
)
from tinylm.data.tokenizers import Tokenizer

SHARD_TOKENS = 1 << 32  # few files: each costs a descriptor
_MASK_TOKENS = 1 << 20
_READ_AHEAD_BYTES = 1 << 26


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned type that holds every id."""
    if vocab_size <= 1 << 8:
        return np.dtype(np.uint8)
    if vocab_size <= 1 << 16:
        return np.dtype(np.uint16)
    return np.dtype(np.uint32)


class ArrayWriter:
    """Appends arrays of one type to numbered shard files, with checksums.

    Attributes:
      total: how many items were appended.
      shards: the files that are complete; after `close` these are all.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        stem: str,
        dtype: np.dtype | type,
        shard_items: int = SHARD_TOKENS,
    ):
        self.folder = folder
        self.stem = stem
        self.dtype = np.dtype(dtype)
        self.shard_items = shard_items
        self.shards: list[Shard] = []
        self.total = 0
        # The shard that is being written.
        self._file: Any = None
        self._items = 0
        self._digest = hashlib.sha256()

    def append(self, values: np.ndarray) -> None:
        """Write `values` behind what is there, in a new shard where one is full."""
        while len(values):
            if self._file is None:
                self._open()
            room = self.shard_items - self._items
            content = np.ascontiguousarray(values[:room], self.dtype)
            self._file.write(content.data)
            self._digest.update(content.data)
            self._items += len(content)
            self.total += len(content)
            values = values[room:]
            if len(content) == room:
                self.close()

    def _name(self, number: int) -> str:
        return f"{self.stem}-{number:05d}.bin"

    def _open(self) -> None:
        """Begin the next shard."""
        self._file = (self.folder / self._name(len(self.shards))).open("wb")
        self._items = 0
        self._digest = hashlib.sha256()

    def so_far(self) -> np.ndarray:
        """Map what the first shard holds by now."""
        if not self.total:
            return np.zeros(0, self.dtype)
        if self._file is not None:
            self._file.flush()
        return np.memmap(self.folder / self._name(0), self.dtype, mode="r")

    def close(self) -> None:
        """End the current shard and note its checksum."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        name = self._name(len(self.shards))
        self.shards.append(Shard(name, self._items, sha256=self._digest.hexdigest()))


class StoreWriter:
    """Writes documents into a folder, which is a store once `finish` has written the manifest."""

    def __init__(self, folder: pathlib.Path, dtype: np.dtype, unknown_ids: Sequence[int] = ()):
        """Begin a store; `unknown_ids`, which stand for what a tokenizer can't spell, are
        counted.
        """
        self.folder = folder
        self.tokens = ArrayWriter(folder, "tokens", dtype)
        self.masks = ArrayWriter(folder, "mask", np.uint8)
        # The tokens and bytes so far, in turn; in one file, which is read while it grows.
        self.ends = ArrayWriter(folder, "documents", np.int64, shard_items=2**62)
        self.num_bytes = 0
        self.num_unknown = 0
        self._unknown_ids = unknown_ids

    @property
    def num_documents(self) -> int:
        """Documents so far."""
        return self.ends.total // 2

    def add(
        self, ids: np.ndarray, lengths: np.ndarray, sizes: np.ndarray, prompts: np.ndarray
    ) -> None:
        """Append documents.

        Args:
          ids: of all of them in a row: [tokens].
          lengths: how many ids each has: [documents].
          sizes: how many bytes of text each has: [documents].
          prompts: how many of its first ids carry no loss: [documents].
        """
        ends = np.cumsum(lengths)
        if prompts.any() or self.masks.total:
            self._fill_mask()
            prompt_ends = ends - lengths + prompts
            carries_loss = np.arange(len(ids)) >= np.repeat(prompt_ends, lengths)
            self.masks.append(carries_loss)
        tokens_so_far = self.tokens.total + ends
        bytes_so_far = self.num_bytes + np.cumsum(sizes)
        self.ends.append(np.stack([tokens_so_far, bytes_so_far], axis=1).ravel())
        self.tokens.append(ids)
        self.num_bytes += int(sizes.sum())
        self.count_unknown(ids)

    def _fill_mask(self) -> None:
        """Let the mask reach as far as the tokens: those before the first prompt all carry loss."""
        while self.masks.total < self.tokens.total:
            count = min(_MASK_TOKENS, self.tokens.total - self.masks.total)
            self.masks.append(np.ones(count, np.uint8))

    def count_unknown(self, ids: np.ndarray) -> None:
        """Count the ids that stand for what a tokenizer can't spell."""
        for unknown in self._unknown_ids:
            self.num_unknown += int((ids == unknown).sum())

    def document_ends(self) -> np.ndarray:
        """Return the tokens and bytes up to the end of each document so far: [documents, 2]."""
        return self.ends.so_far().reshape(-1, 2)

    def close(self) -> None:
        """Close the files."""
        for writer in (self.tokens, self.ends, self.masks):
            writer.close()

    def finish(
        self,
        source: str,
        tokenizer: Tokenizer,
        splits: dict[str, Split],
        *,
        skipped: SkippedFacts,
        documents: int | None = None,
        held_out: str = "",
        ready_shards: Sequence[Shard] = (),
    ) -> None:
        """Close the files and write the manifest.

        Args:
          source: the spec of the source.
          tokenizer: what made the ids.
          splits: the splits by name.
          skipped: what was skipped.
          documents: how many documents the source gave, where it isn't as many as were added: one
            that is cut was added in two parts.
          held_out: which part is held out, in words.
          ready_shards: the files of ids that are read in place, where no ids were added.
        """
        self.close()
        shards = list(ready_shards) or self.tokens.shards
        manifest = Manifest(
            dtype=self.tokens.dtype.name,
            tokens=sum(shard.items for shard in shards),
            documents=self.num_documents if documents is None else documents,
            bytes=self.num_bytes,
            unknown=self.num_unknown,
            shards=shards,
            mask_shards=self.masks.shards,
            document_shards=self.ends.shards,
            source=source,
            tokenizer=TokenizerFacts.of(tokenizer),
            splits=splits,
            skipped=skipped,
            held_out=held_out,
        )
        manifest.write(self.folder)


class TokenArray:
    """One long array over several files, read a stretch at a time."""

    def __init__(
        self,
        folder: pathlib.Path,
        shards: Sequence[Shard],
        dtype: np.dtype | type,
        remote: Remote | None = None,
    ):
        """Open files.

        Args:
          folder: of the store.
          shards: the files.
          dtype: that of shards that name none.
          remote: where the files are that aren't on this disk.
        """
        _allow_files(len(shards))
        self._files: list[ArrayFile | BucketFile] = []
        for shard in shards:
            if remote is not None and not (folder / shard.file).exists():
                self._files.append(BucketFile(folder, shard, shard.dtype or dtype, remote))
            else:
                self._files.append(ArrayFile(folder, shard, shard.dtype or dtype))
        self.is_remote = any(isinstance(file, BucketFile) for file in self._files)
        self._starts = [0, *itertools.accumulate(shard.items for shard in shards)]

    def __len__(self) -> int:
        return self._starts[-1]

    def between(self, begin: int, end: int) -> np.ndarray:
        """Return the items from `begin` to before `end`, as int32; none where `end` isn't behind
        `begin`.
        """
        out = np.empty(max(end - begin, 0), np.int32)
        self.read(out, begin)
        return out

    def fetch(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Fetch stretches (start, count) that are in a bucket, all at once, for `read` to find."""
        wanted: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
        for start, count in stretches:
            end = start + count
            shard = bisect.bisect_right(self._starts, start) - 1
            while start < end:
                stop = min(end, self._starts[shard + 1])
                wanted[shard].append((start - self._starts[shard], stop - start))
                start = stop
                shard += 1
        for shard, parts in wanted.items():
            file = self._files[shard]
            if isinstance(file, BucketFile):
                file.fetch(parts)

    def read(self, out: np.ndarray, start: int) -> None:
        """Fill `out` with what begins at `start`."""
        shard = bisect.bisect_right(self._starts, start) - 1
        done = 0
        while done < len(out):
            begin = start + done - self._starts[shard]
            count = min(len(out) - done, self._starts[shard + 1] - start - done)
            out[done : done + count] = self._files[shard].read(begin, count)
            done += count
            shard += 1


class ArrayFile:
    """An array in a file that nobody may change while it is open: StorageError where it isn't what
    it has to be.

    A small file is read ahead whole; a large one never, since its reads are scattered.
    """

    def __init__(self, folder: pathlib.Path, shard: Shard, dtype: np.dtype | type | str):
        """Open a shard of the store in `folder`, whose items are of type `dtype`."""
        self.folder = folder
        self.path = folder / shard.file
        self.sha256 = shard.sha256
        self.dtype = np.dtype(dtype)
        self.items = shard.items
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise self._damaged(str(error.strerror)) from error
        self._at_first = self._look()
        num_bytes, _ = self._at_first
        expected_bytes = self.items * self.dtype.itemsize
        if num_bytes != expected_bytes:
            raise self._damaged(f"has {num_bytes:,} bytes instead of {expected_bytes:,}")
        if hasattr(os, "posix_fadvise"):
            advice = os.POSIX_FADV_RANDOM
            if expected_bytes <= _READ_AHEAD_BYTES:
                advice = os.POSIX_FADV_WILLNEED
            os.posix_fadvise(self._file.fileno(), 0, 0, advice)

    def _damaged(self, how: str) -> StorageError:
        return damaged(self.folder, self.path, how)

    def _look(self) -> tuple[int, int]:
        """Return the size and the time of modification."""
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def check(self) -> None:
        """Raise StorageError where it was changed since it was opened."""
        now = self._look()
        if now == self._at_first:
            return
        with self.path.open("rb") as file:
            has_size = now[0] == self._at_first[0]
            is_same = has_size and hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
        if not is_same:
            raise self._damaged("was changed while it was read")
        # It was only touched.
        self._at_first = now

    def read(self, begin: int, count: int) -> np.ndarray:
        """Return `count` items from `begin` on."""
        size = self.dtype.itemsize
        try:
            content = os.pread(self._file.fileno(), count * size, begin * size)
            self.check()
        except OSError as error:
            raise self._damaged(f"can't be read ({error.strerror})") from error
        if len(content) != count * size:
            raise self._damaged("ends too early")
        return np.frombuffer(content, self.dtype)

    def mapped(self) -> np.ndarray:
        """Map the whole; call `check` before each later reading."""
        if not self.items:
            return np.zeros(0, self.dtype)
        content = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM") and len(content) > _READ_AHEAD_BYTES:
            content.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(content, self.dtype)


def damaged(folder: pathlib.Path, path: pathlib.Path, how: str) -> StorageError:
    """Return the error for a file of the store in `folder`, which may be a ready one that lies
    elsewhere.
    """
    if folder not in path.parents:
        return StorageError(f"{path} {how}; put back the file as it was when it was prepared.")
    return StorageError(f"{path} {how}: it is damaged; delete {folder} to prepare it again.")


def _allow_files(count: int) -> None:
    """Let this process hold `count` more files open, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
    if count > soft // 4 and soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class Store:
    """A finished store, opened for reading.

    Attributes:
      folder: where it is.
      manifest: what it holds.
      spec: the source that it is of.
      tokens: the ids of all documents in a row.
      mask: 1 where a token carries loss; None where all do.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        spec: str = "",
        ready_files: Sequence[str] = (),
        remote: Remote | None = None,
    ):
        """Open a store.

        Args:
          folder: where it is.
          spec: the source, where another spec than the one it was prepared for leads to it.
          ready_files: where the ready files of ids are now.
          remote: where its files are that aren't in `folder`.
        """
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.spec = spec or self.manifest.source
        shards = self.manifest.shards
        if ready_files:
            shards = [
                dataclasses.replace(shard, file=path)
                for shard, path in zip(shards, ready_files, strict=True)
            ]
        self.tokens = TokenArray(folder, shards, np.dtype(self.manifest.dtype), remote)
        masks = self.manifest.mask_shards
        self.mask = TokenArray(folder, masks, np.uint8, remote) if masks else None
        self._files = shards + masks + self.manifest.document_shards

    @property
    def _files_here(self) -> list[Shard]:
        """Its files that are on this disk: all, or all but those that stay in a bucket."""
        if not self.is_remote:
            return self._files
        return [shard for shard in self._files if (self.folder / shard.file).exists()]

    @property
    def is_remote(self) -> bool:
        """Whether some of its files are read from a bucket."""
        return self.tokens.is_remote or (self.mask is not None and self.mask.is_remote)

    @property
    def num_bytes(self) -> int:
        """How many bytes its files on this disk have."""
        return sum((self.folder / shard.file).stat().st_size for shard in self._files_here)

    @property
    def digest(self) -> str:
        """A hash of what it holds: ids, masks, ends of documents, splits and the tokenizer; not of
        where it lies.
        """
        files = [[shard.items, shard.sha256] for shard in self._files]
        splits = {name: as_json(split) for name, split in self.manifest.splits.items()}
        content = [files, splits, self.manifest.tokenizer.fingerprint]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def verify(self) -> None:
        """Read every file on this disk and raise StorageError where one differs from its checksum.

        What comes from a bucket is compared whenever it is read.
        """
        for shard in self._files_here:
            path = self.folder / shard.file
            try:
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise StorageError(f"{path} can't be read: {error.strerror}.") from error
            if found != shard.sha256:
                raise damaged(self.folder, path, "differs from its checksum")

    def document_ends(self) -> np.ndarray:
        """Return, for each document, the tokens and bytes up to its end: [documents, 2]."""
        (shard,) = self.manifest.document_shards
        return ArrayFile(self.folder, shard, np.int64).mapped().reshape(-1, 2)

    def spans(self, split: Split, documents: Iterable[int]) -> Iterator[tuple[int, int]]:
        """Yield the first token of each of these documents of a split, and the one after its last.

        Where a split begins or ends inside a document, only the part in the split counts.
        """
        first_token, end_token = split.tokens
        ends = self.document_ends()[:, 0]
        for document in documents:
            begin = int(ends[document - 1]) if document else 0
            end = int(ends[document])
            yield max(begin, first_token), min(end, end_token)

    def pairs(self, split: Split) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (prompt ids, completion ids) of the documents of a split that have a prompt."""
        if self.mask is None:
            return
        for begin, end in self.spans(split, range(*split.documents)):
            num_with_loss = int(self.mask.between(begin, end).sum())
            prompt_end = end - num_with_loss
            if prompt_end > begin:
                prompt = self.tokens.between(begin, prompt_end)
                # The last id is the end of text.
                completion = self.tokens.between(prompt_end, end - 1)
                yield prompt, completion
