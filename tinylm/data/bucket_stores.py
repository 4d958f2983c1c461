"""Token stores in a bucket (`data.store_dir=gs://bucket/stores`): prepared once, read by all hosts.

    process 0   text -> store on its disk -> bucket
    each host   bucket -> its disk, whole, where that has room for all (data.cache_bytes)
                bucket -> blocks of what its batches need, otherwise

A store has the same name and the same files there as on a disk, and with each file of tokens or
masks the checksums of its blocks. The manifest is written last, so a store that has one is whole;
two jobs that write the same store at the same time write the same bytes.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

from tinylm.core import buckets
from tinylm.core.log import alive
from tinylm.data.bucket_files import CHECKSUMS_ENDING, block_checksums
from tinylm.data.manifest import MANIFEST, Manifest, Shard, read_manifest
from tinylm.data.store import Store

T = TypeVar("T")
_TOKENIZER = "tokenizer"


@dataclasses.dataclass(frozen=True)
class StoreBucket:
    """The folder of all stores, where it is in a bucket.

    Attributes:
      url: data.store_dir.
      outage_secs: how long the bucket may fail.
    """

    url: str
    outage_secs: float

    def url_of(self, name: str) -> str:
        """Return the URL of the store of a name."""
        return f"{self.url.rstrip('/')}/{name}"

    def has(self, name: str) -> bool:
        """Say whether there is the store of a name."""
        url = f"{self.url_of(name)}/{MANIFEST}"
        return self._patiently(url, functools.partial(buckets.exists_there, url))

    def upload(self, folder: pathlib.Path, ready_files: Sequence[str] = ()) -> None:
        """Copy a store there.

        Args:
          folder: the store on this disk.
          ready_files: its files of ids, where these lie elsewhere.
        """
        manifest = read_manifest(folder)
        if ready_files:
            manifest = _with_numbered_files(manifest)
        # Where the files of tokens and masks lie, by their names there.
        paths = {shard.file: folder / shard.file for shard in _in_blocks(manifest)}
        for shard, ready in zip(manifest.shards, ready_files, strict=False):
            paths[shard.file] = pathlib.Path(ready)

        url = self.url_of(folder.name)
        with alive(lambda: f"copying {folder} to {url}"):
            for name, path in paths.items():
                # Hosts that read a file by its blocks check each of them.
                checksums = block_checksums(path)
                self._write(checksums.tobytes(), f"{url}/{name}{CHECKSUMS_ENDING}")
                self._put(path, f"{url}/{name}")
            for shard in manifest.document_shards:
                documents = folder / shard.file
                self._put(documents, f"{url}/{shard.file}")
            tokenizer = folder / _TOKENIZER
            for path in tokenizer.iterdir():
                self._put(path, f"{url}/{_TOKENIZER}/{path.name}")
            # A store with a manifest counts as whole.
            content = manifest.content()
            self._write(content.encode(), f"{url}/{MANIFEST}")

    def num_bytes(self, name: str) -> int:
        """Return how many bytes the files of a store have."""
        return sum(self._sizes(self.url_of(name)).values())

    def fetch(self, folder: pathlib.Path, name: str, is_whole: bool) -> None:
        """Copy a store into `folder`: the whole of it, or all but the tokens and masks, which are
        then read where they are.

        Raises:
          StorageError: what came differs from its checksum, or the bucket fails.
        """
        url = self.url_of(name)
        with alive(lambda: f"copying {url}"):
            self._get(f"{url}/{MANIFEST}", folder / MANIFEST)
            files = set(self._sizes(url))
            files.discard(MANIFEST)
            if not is_whole:
                manifest = read_manifest(folder)
                files -= {shard.file for shard in _in_blocks(manifest)}
            for file in files:
                path = buckets.place_of(file, folder)
                self._get(f"{url}/{file}", path)
            if is_whole:
                Store(folder).verify()

    def read_note(self, name: str) -> str | None:
        """Return the content of a small file of the folder; None where there is none."""
        url = self.url_of(name)

        def read() -> str | None:
            if not buckets.exists_there(url):
                return None
            return buckets.file_system(url).cat_file(url).decode()

        return self._patiently(url, read)

    def write_note(self, name: str, text: str) -> None:
        """Write a small file of the folder."""
        self._write(text.encode(), self.url_of(name))

    def _sizes(self, url: str) -> dict[str, int]:
        """Return the sizes of the objects of a store, by their path in it."""

        def find() -> dict[str, int]:
            files = buckets.file_system(url)
            files.invalidate_cache()
            prefix = f"{url.partition('://')[2]}/"
            found = filter(buckets.is_file, files.find(url, detail=True).values())
            return {info["name"].removeprefix(prefix): info["size"] for info in found}

        return self._patiently(url, find)

    def _get(self, url: str, path: pathlib.Path) -> None:
        self._patiently(url, functools.partial(buckets.copy_here, url, path))

    def _put(self, path: pathlib.Path, url: str) -> None:
        self._patiently(url, functools.partial(buckets.copy_there, path, url))

    def _write(self, content: bytes, url: str) -> None:
        self._patiently(url, functools.partial(buckets.write_there, content, url))

    def _patiently(self, url: str, use: Callable[[], T]) -> T:
        return buckets.patiently(url, "data.store_dir", use, self.outage_secs)


def _with_numbered_files(manifest: Manifest) -> Manifest:
    """Return a manifest in which the files of ids have names of their own.

    Ready files come from several folders, in which two may have the same name.
    """
    shards = []
    for number, shard in enumerate(manifest.shards):
        shard = dataclasses.replace(shard, file=f"ready-{number:05d}.bin")
        shards.append(shard)
    return dataclasses.replace(manifest, shards=shards)


def _in_blocks(manifest: Manifest) -> list[Shard]:
    """Return the shards that may stay in the bucket."""
    return [*manifest.shards, *manifest.mask_shards]


def cache_bytes(limit: int, folder: pathlib.Path, kept_bytes: int) -> int:
    """Return how many bytes a host may keep of a run's stores in buckets, of all of them together.

    Args:
      limit: data.cache_bytes; 0 for half of what is free.
      folder: where they are kept.
      kept_bytes: what is there of these stores already. It counts as room, or else a run that
        goes on would have less of it than it began with.

    It is never more than there is room for: what was copied before took its part of the disk.
    """
    room = shutil.disk_usage(folder).free + kept_bytes
    return min(limit or room // 2, room)


def choose_whole(sizes: dict[str, int], here: Collection[str], limit: int) -> set[str]:
    """Return the names of the stores that a host has whole on its disk.

    These are all where all fit. Otherwise the smallest ones are copied, into half of the limit, and
    the rest is for blocks of the others.

    Args:
      sizes: of all stores of a run, in bytes, by their names.
      here: the names of those that are on the disk already, and stay.
      limit: how many bytes may be kept of all of them together.
    """
    if sum(sizes.values()) <= limit:
        return set(sizes)
    chosen = set(here)
    room = limit // 2 - sum(sizes[name] for name in chosen)
    for name in sorted(sizes.keys() - chosen, key=lambda name: (sizes[name], name)):
        if sizes[name] > room:
            break
        chosen.add(name)
        room -= sizes[name]
    return chosen
