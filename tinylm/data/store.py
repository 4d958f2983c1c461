"""Token stores: ids in memory-mapped shards, where documents end, and a manifest that is written last.

A store is a folder. `manifest.json` names its shards (in the smallest unsigned type that holds the vocabulary, or
ready files that are read in place) with sizes and checksums; `documents.bin` has, after each document, how many tokens
and bytes of text there are so far; `mask-*.bin`, where there are prompts, is 1 where a token carries loss. Both splits
lie in one sequence. Opening costs a look at each shard, whatever its size.
"""

import bisect
import hashlib
import json
import mmap
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from tinylm.core.errors import StorageError, UserError

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 32  # few files: each mapped one costs a descriptor
_BUFFER_TOKENS = 1 << 20
_READ_AHEAD_BYTES = 1 << 26


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned type that holds every id."""
    return np.dtype(np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class ArrayWriter:
    """Appends arrays of one type to numbered shard files, with checksums."""

    def __init__(self, folder: pathlib.Path, stem: str, dtype: np.dtype, shard_items: int = SHARD_TOKENS):
        self.folder, self.stem, self.dtype, self.shard_items = folder, stem, np.dtype(dtype), shard_items
        self.shards: list[dict[str, Any]] = []
        self.total = 0
        self._file: Any = None
        self._digest = hashlib.sha256()

    def append(self, values: np.ndarray) -> None:
        """Write `values` behind what is there, in a new shard where one is full."""
        while len(values):
            if self._file is None:
                self._open()
            room = self.shard_items - self.shards[-1]["items"]
            content = np.ascontiguousarray(values[:room], self.dtype).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self.shards[-1]["items"] += min(room, len(values))
            self.total += min(room, len(values))
            values = values[room:]
            if self.shards[-1]["items"] == self.shard_items:
                self.close()

    def _open(self) -> None:
        name = f"{self.stem}-{len(self.shards):05d}.bin"
        self._file = (self.folder / name).open("wb")
        self._digest = hashlib.sha256()
        self.shards.append({"file": name, "items": 0})

    def flush(self) -> None:
        """Make what was appended visible to other openings of the file."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """End the current shard: flush it to the disk and note its checksum."""
        if self._file is not None:
            sync_and_close(self._file)
            self.shards[-1]["sha256"] = self._digest.hexdigest()
            self._file = None


def sync_and_close(file: Any) -> None:
    """Close a file after its content has reached the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


class StoreWriter:
    """Writes documents into a folder that is no store until `finish` wrote the manifest."""

    def __init__(self, folder: pathlib.Path, dtype: np.dtype):
        self.tokens = ArrayWriter(folder, "tokens", dtype)
        self.masks: ArrayWriter | None = None
        self.ends = ArrayWriter(folder, "documents", np.dtype(np.int64), shard_items=2**62)
        self.folder, self.num_documents, self.num_bytes = folder, 0, 0
        self._held: list[np.ndarray] = []
        self._held_prompts: list[int] = []
        self._held_ends: list[tuple[int, int]] = []
        self._held_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return self.tokens.total + self._held_tokens

    def add(self, ids: np.ndarray, num_bytes: int, num_prompt: int = 0) -> None:
        """Append one document: its ids, its bytes of text, how many of the first ids carry no loss."""
        self._held.append(ids)
        self._held_prompts.append(num_prompt)
        self._held_tokens += len(ids)
        self.num_documents += 1
        self.num_bytes += num_bytes
        self._held_ends.append((self.num_tokens, self.num_bytes))
        if self._held_tokens >= _BUFFER_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Hand what is held to the files."""
        if self._held:
            self._flush_masks()
            self.tokens.append(np.concatenate(self._held))
            self.ends.append(np.array(self._held_ends, np.int64).ravel())
        self._held, self._held_prompts, self._held_ends, self._held_tokens = [], [], [], 0

    def _flush_masks(self) -> None:
        """Hand on the masks; where this is the first prompt, also those of the tokens before, which all carry loss."""
        if self.masks is None and any(self._held_prompts):
            self.masks = ArrayWriter(self.folder, "mask", np.dtype(np.uint8))
            for done in range(0, self.tokens.total, _BUFFER_TOKENS):
                self.masks.append(np.ones(min(_BUFFER_TOKENS, self.tokens.total - done), np.uint8))
        if self.masks is not None:
            masks = [np.arange(len(ids)) >= n for ids, n in zip(self._held, self._held_prompts, strict=True)]
            self.masks.append(np.concatenate(masks))

    def document_ends(self) -> np.ndarray:
        """Return the tokens and bytes up to the end of each document so far: [documents, 2]."""
        self.flush()
        self.ends.flush()
        return np.memmap(self.folder / self.ends.shards[0]["file"], np.int64, mode="r").reshape(-1, 2)

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write what is held, then the manifest, each safe on the disk before the next."""
        self.flush()
        writers = [self.tokens, self.ends] + ([self.masks] if self.masks else [])
        for writer in writers:
            writer.close()
        manifest = {
            "format": FORMAT,
            "dtype": self.tokens.dtype.name,
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "bytes": self.num_bytes,
            "shards": self.tokens.shards,
            "mask_shards": self.masks.shards if self.masks else [],
            "document_shards": self.ends.shards,
            **manifest,
        }
        with (self.folder / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=1)
            sync_and_close(file)


class TokenArray:
    """One long array over several memory-mapped files, read a stretch at a time."""

    def __init__(self, folder: pathlib.Path, shards: list[dict[str, Any]], dtype: np.dtype):
        self._maps: list[np.ndarray] = []
        self._starts = [0]
        for shard in shards:
            path = folder / shard["file"]
            dtype_here = np.dtype(shard.get("dtype", dtype))
            _check_size(path, shard["items"] * dtype_here.itemsize)
            self._maps.append(map_file(path, dtype_here))
            self._starts.append(self._starts[-1] + shard["items"])

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, out: np.ndarray, start: int) -> None:
        """Fill `out` with what begins at `start`."""
        shard = bisect.bisect_right(self._starts, start) - 1
        begin = start - self._starts[shard]
        if begin + len(out) <= len(self._maps[shard]):
            out[:] = self._maps[shard][begin : begin + len(out)]
            return
        done = 0
        while done < len(out):
            begin = start + done - self._starts[shard]
            piece = self._maps[shard][begin : begin + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            shard += 1

    def whole(self) -> np.ndarray:
        """Return the one file there is as an array; empty where there is none."""
        assert len(self._maps) <= 1, "only a single shard can be seen as a whole"
        return self._maps[0] if self._maps else np.zeros(0, np.int64)


def map_file(path: pathlib.Path, dtype: np.dtype | type) -> np.ndarray:
    """Map a file for random reading: a small one is read ahead whole, a large one never, for most would be in vain."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_WILLNEED if len(mapped) <= _READ_AHEAD_BYTES else mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


def _check_size(path: pathlib.Path, expected: int) -> None:
    found = path.stat().st_size if path.exists() else -1
    if found != expected:
        what = f"has {found:,} bytes instead of {expected:,}" if found >= 0 else "is missing"
        raise StorageError(f"{path} {what}: the token store is damaged; delete {path.parent} to prepare it again.")


class Store:
    """A finished store, opened for reading."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.tokens = TokenArray(folder, self.manifest["shards"], np.dtype(self.manifest["dtype"]))
        masks = self.manifest["mask_shards"]
        self.mask = TokenArray(folder, masks, np.dtype(np.uint8)) if masks else None

    def pairs(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (prompt ids, completion ids) of the documents of a split that have a prompt."""
        if self.mask is None:
            return
        first, last = self.manifest["splits"][split]["documents"]
        ends = self.document_ends()[:, 0]
        for document in range(first, last):
            begin = int(ends[document - 1]) if document else 0
            length = int(ends[document]) - begin
            ids, mask = np.empty(length, np.int32), np.empty(length, np.uint8)
            self.tokens.read(ids, begin)
            self.mask.read(mask, begin)
            num_prompt = length - int(mask.sum())
            if num_prompt:
                yield ids[:num_prompt], ids[num_prompt:-1]

    def document_ends(self) -> np.ndarray:
        """Return, for each document, the tokens and bytes up to its end: [documents, 2]."""
        array = TokenArray(self.folder, self.manifest["document_shards"], np.dtype(np.int64))
        return array.whole().reshape(-1, 2)


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """Return the manifest of a finished store; raise where it can't be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise StorageError(f"{folder / MANIFEST} can't be read ({error}); delete {folder}.") from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder} is a token store of another version of tinylm; delete it to prepare it again.")
    return manifest


def verify(folder: pathlib.Path) -> None:
    """Read every shard and raise StorageError where one differs from its checksum."""
    manifest = read_manifest(folder)
    for shard in manifest["shards"] + manifest["mask_shards"] + manifest["document_shards"]:
        if "sha256" in shard:
            with (folder / shard["file"]).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard["sha256"]:
                raise StorageError(f"{folder / shard['file']} differs from its checksum; delete {folder}.")
