"""The checksums of a checkpoint: which files it has, how long they are and what is in them.

Orbax writes a step whole or not at all, but nothing in it tells a flipped bit, a file that was cut
or one that is gone. So when a step is complete, the size and the BLAKE2b of each file are written
to a list next to them, and everything is brought safely onto the disk. Before anything is restored,
the files are compared with the list, which begins with its own checksum. It guards against
accidents: anyone who can write a checkpoint can write its list too.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from etils import epath

from tinylm.core import buckets
from tinylm.core.files import sync
from tinylm.core.storage import in_bucket

NAME = "checksums"
_CHUNK_BYTES = 1 << 22
# Hashing and reading leave Python's lock, so threads do run at the same time.
_HASH_THREADS = 4
# A disk takes many requests to sync in one go.
_SYNC_THREADS = 32


class Listed(NamedTuple):
    """What the list of a step says."""

    # [size in bytes, checksum] by the name of each file. The values are as they were read: a list
    # with a right checksum of its own may still hold anything.
    files: dict[str, Any]
    loss: float | None  # the validation loss at the step, where there was an evaluation


def write(folder: epath.Path, step: int, loss: float | None) -> None:
    """Write the list for all files in the folder of a step, and bring all of it onto the disk."""
    files = _files(folder)
    with ThreadPoolExecutor(_HASH_THREADS) as threads:
        described = threads.map(_describe, files.values())
        content = {
            "files": dict(zip(files, described, strict=True)),
            "step": step,
            "loss": loss,
        }
    body = json.dumps(content, indent=0).encode()
    (folder / NAME).write_bytes(_digest(body).encode() + b"\n" + body)

    parents = {path.parent for path in files.values()}
    written = [*files.values(), folder / NAME]
    # A file survives a power cut only if the folder that names it was synced, too.
    written += [*parents, folder, folder.parent]
    with ThreadPoolExecutor(_SYNC_THREADS) as threads:
        list(threads.map(_sync, written))


def read(folder: epath.Path) -> Listed | None:
    """Return the list of a step, or None where it is missing or altered."""
    try:
        digest, _, body = (folder / NAME).read_bytes().partition(b"\n")
        if digest != _digest(body).encode():
            return None
        content = json.loads(body)
    except (OSError, ValueError, RecursionError) as error:
        _raise_outage(folder, error)
        return None
    match content:
        case {"files": dict() as files, "loss": int() | float() | None as loss}:
            return Listed(files, loss)
    return None


def damage(folder: epath.Path, parts: Collection[str]) -> str:
    """Return in words what is wrong with a step: "" where all is as it was written.

    Args:
      folder: of the step.
      parts: the items of the step ("params", "train") whose files are read. Files of others must be
        there, but what is in them doesn't count.
    """
    listed = read(folder)
    if listed is None:
        fault = "altered" if (folder / NAME).exists() else "missing"
        return f"{NAME} is {fault}"

    found = _files(folder)
    for name in sorted(listed.files.keys() ^ found.keys()):
        if name in listed.files:
            return f"{name} is missing"
        return f"{name} does not belong to it"
    for name, path in found.items():
        if os.path.islink(os.fspath(path)):
            return f"{name} is a link"

    # Files directly in the folder of the step belong to all of its items.
    checked = []
    for name in listed.files:
        item, slash, _ = name.partition("/")
        if item in parts or not slash:
            checked.append(name)
    with ThreadPoolExecutor(_HASH_THREADS) as threads:
        described = threads.map(_describe, [found[name] for name in checked])
        for name, now in zip(checked, described, strict=True):
            wanted = listed.files[name]
            if wanted == now:
                continue
            match wanted:
                case [int(size), str()] if size != now[0]:
                    return f"{name} has {now[0]:,} bytes instead of {size:,}"
            return f"{name} is altered"
    return ""


def _sync(path: epath.Path) -> None:
    """Bring a file or a folder onto the disk, where it is on one."""
    if not in_bucket(path):
        sync(path, required=False)


def _files(folder: epath.Path) -> dict[str, epath.Path]:
    """Return every file below a folder except the list itself, by its path from there, sorted."""
    files = {}
    found = _walk(folder)
    if in_bucket(folder):
        # A bucket lists all in one go.
        found = (epath.Path(url) for url in buckets.find_objects(os.fspath(folder)))
    for path in found:
        files[path.relative_to(folder).as_posix()] = path
    files.pop(NAME, None)
    return dict(sorted(files.items()))


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    """Yield every file below a folder, and the links to folders, which are not followed."""
    for path in folder.iterdir():
        if path.is_dir() and not os.path.islink(os.fspath(path)):
            yield from _walk(path)
        else:
            yield path


def _describe(path: epath.Path) -> list[Any]:
    """Return [size in bytes, checksum] of a file, as the list has them.

    A file that the disk can't read back gives [-1, the reason], which no list has.
    """
    digest = hashlib.blake2b(digest_size=16)
    size = 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        _raise_outage(path, error)
        return [-1, str(error)]
    return [size, digest.hexdigest()]


def _raise_outage(path: epath.Path, error: Exception) -> None:
    """Raise an error again by which a bucket can't be reached.

    What a disk can't read back is damaged. A bucket that doesn't answer tells nothing about what is
    in it, and a step that was taken for damaged would be removed.
    """
    is_missing = isinstance(error, FileNotFoundError)
    if in_bucket(path) and isinstance(error, OSError) and not is_missing:
        raise error


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
