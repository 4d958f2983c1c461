"""Shards of a store that stay in a bucket, and are read a stretch at a time.

An object is read in blocks. A block that came is held to its checksum, and kept in a cache on the
disk until others need the room. Rows lie at random places, so a block is small: the cost of a row
is a request, not the bytes around it. What a run of batches needs is fetched at once (`fetch`), as
batches are known long before they are trained on; then a request takes as long as all of them.
"""

import collections
import dataclasses
import functools
import os
import pathlib
import tempfile
import threading
import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from tinylm.core.buckets import RangeReader, patiently
from tinylm.core.errors import StorageError
from tinylm.data.manifest import Shard

BLOCK_BYTES = 1 << 16
CHECKSUMS_ENDING = ".crc32"
# How often a block that came damaged is asked for again.
_TRIES = 3

# A block: the URL of its object, and its number there. Stores share a cache, and files of different
# stores have the same names.
Block = tuple[str, int]


class BlockCache:
    """The blocks that were used last, in one file on the disk, which goes when the process ends.

    Attributes:
      limit_bytes: how large the file may become.
      fetched_bytes: how much has come from the bucket.
      requests: how many requests that took.
    """

    def __init__(self, folder: pathlib.Path, limit_bytes: int):
        self.limit_bytes = limit_bytes
        self.fetched_bytes = 0
        self.requests = 0
        # It has no name, so that it goes however this process ends.
        self._file = tempfile.TemporaryFile("w+b", dir=folder)  # noqa: SIM115
        self._most_blocks = max(1, limit_bytes // BLOCK_BYTES)
        # Where each block is in the file, and how long it is; the least recently used first.
        self._places: collections.OrderedDict[Block, tuple[int, int]] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, block: Block) -> bytes | None:
        """Return a block, or None where it isn't in the cache."""
        # Under the lock, for the place may be given to another block.
        with self._lock:
            if block not in self._places:
                return None
            self._places.move_to_end(block)
            place, length = self._places[block]
            return os.pread(self._file.fileno(), length, place * BLOCK_BYTES)

    def put(self, block: Block, content: bytes) -> None:
        """Keep a block, and give up the one that was used least recently where there is no room."""
        with self._lock:
            if block in self._places:
                return
            if len(self._places) < self._most_blocks:
                place = len(self._places)
            elif self._places:
                _, (place, _) = self._places.popitem(last=False)
            else:
                return
            try:
                os.pwrite(self._file.fileno(), content, place * BLOCK_BYTES)
            except OSError:
                # Others have taken the rest of the disk; the cache stays as large as it is.
                self._most_blocks = len(self._places)
                return
            self._places[block] = (place, len(content))

    def __contains__(self, block: Block) -> bool:
        with self._lock:
            return block in self._places

    def count(self, num_bytes: int) -> None:
        """Note a request."""
        with self._lock:
            self.fetched_bytes += num_bytes
            self.requests += 1


@dataclasses.dataclass
class Remote:
    """Where the files of a store are that were not copied, and how they are read.

    Attributes:
      url: of the store's folder.
      cache: of blocks.
      outage_secs: how long the bucket may fail before a run that waits for it ends.
    """

    url: str
    cache: BlockCache
    outage_secs: float

    @functools.cached_property
    def reader(self) -> RangeReader:
        """The connection."""
        return RangeReader(self.url)


class BucketFile:
    """An array in an object, with the interface of an `ArrayFile`."""

    def __init__(
        self, folder: pathlib.Path, shard: Shard, dtype: np.dtype | type | str, remote: Remote
    ):
        """Open a shard.

        Args:
          folder: of the store on this disk, which has the checksums of the shard's blocks.
          shard: the shard.
          dtype: of its items.
          remote: where it is.

        Raises:
          StorageError: the checksums are missing, or are those of another file.
        """
        self.dtype = np.dtype(dtype)
        self.items = shard.items
        self._name = shard.file
        self._url = f"{remote.url}/{shard.file}"
        self._remote = remote
        self._num_bytes = shard.items * self.dtype.itemsize
        checksums = folder / (shard.file + CHECKSUMS_ENDING)
        try:
            self._checksums = np.fromfile(checksums, np.uint32)
        except OSError as error:
            raise StorageError(f"{checksums} can't be read: {error.strerror}.") from error
        if len(self._checksums) != -(-self._num_bytes // BLOCK_BYTES):
            raise StorageError(f"{checksums} isn't that of {shard.file}; delete {folder}.")

    def fetch(self, stretches: Iterable[tuple[int, int]]) -> None:
        """Have the blocks of some stretches (begin, count) in the cache, by requests at once."""
        wanted: set[int] = set()
        for begin, count in stretches:
            wanted.update(self._blocks(begin, count))
        cache = self._remote.cache
        missing = sorted(number for number in wanted if (self._url, number) not in cache)
        # More than the cache holds would push itself out.
        for number, content in self._load(missing[: cache.limit_bytes // (2 * BLOCK_BYTES)]):
            cache.put((self._url, number), content)

    def read(self, begin: int, count: int) -> np.ndarray:
        """Return `count` items from `begin` on."""
        parts: list[bytes] = []
        numbers = self._blocks(begin, count)
        for number in numbers:
            content = self._remote.cache.get((self._url, number))
            if content is None:
                ((_, content),) = self._load([number])
                self._remote.cache.put((self._url, number), content)
            parts.append(content)
        first_byte = begin * self.dtype.itemsize - numbers.start * BLOCK_BYTES
        whole = parts[0] if len(parts) == 1 else b"".join(parts)
        return np.frombuffer(whole, self.dtype, count, first_byte)

    def _blocks(self, begin: int, count: int) -> range:
        """Return the numbers of the blocks that hold `count` items from `begin` on."""
        first_byte = begin * self.dtype.itemsize
        end_byte = first_byte + count * self.dtype.itemsize
        return range(first_byte // BLOCK_BYTES, -(-end_byte // BLOCK_BYTES))

    def _load(self, numbers: Sequence[int]) -> list[tuple[int, bytes]]:
        """Return blocks from the bucket, each as its checksum says.

        Raises:
          StorageError: one is damaged there, or the bucket fails for too long.
        """
        remote = self._remote
        ranges = []
        for number in numbers:
            begin = number * BLOCK_BYTES
            ranges.append((begin, min(begin + BLOCK_BYTES, self._num_bytes)))
        for _ in range(_TRIES):
            contents = patiently(
                f"{remote.url}/{self._name}",
                "data.store_dir",
                # The connection is made in there too.
                lambda: remote.reader.read_many(self._name, ranges),
                remote.outage_secs,
            )
            damaged = []
            for number, content in zip(numbers, contents, strict=True):
                remote.cache.count(len(content))
                if zlib.crc32(content) != self._checksums[number]:
                    damaged.append(number)
            if not damaged:
                return list(zip(numbers, contents, strict=True))
        raise StorageError(
            f"{remote.url}/{self._name} differs from its checksum in {len(damaged)} blocks: it is "
            f"damaged; delete {remote.url} to prepare it again."
        )


def block_checksums(path: pathlib.Path) -> np.ndarray:
    """Return the CRC-32 of each block of a file: [blocks] of uint32."""
    found: list[int] = []
    with path.open("rb") as file:
        while content := file.read(BLOCK_BYTES):
            found.append(zlib.crc32(content))
    return np.array(found, np.uint32)
