"""The checksums of a checkpoint: which files it has, how long they are and what is in them.

Orbax writes a step whole or not at all, but nothing in it tells a flipped bit, a cut file or one
that is gone. So when a step is complete, each file's size and BLAKE2b are written beside them, and
everything is brought safely onto the disk; before anything is restored they are compared. The list
begins with its own checksum. It guards against accidents: who can write a checkpoint can write its
list too.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from tinylm.core.files import sync
from tinylm.core.storage import in_bucket

NAME = "checksums"
_CHUNK_BYTES = 1 << 22
_THREADS = 4  # hashing leaves Python's lock


def write(folder: epath.Path, **facts: Any) -> None:
    """Write the list for all files in `folder`, with `facts` beside them, once all is safe on the
    disk.
    """
    files = _files(folder)
    with ThreadPoolExecutor(_THREADS) as threads:
        content = {
            "files": dict(zip(files, threads.map(_describe, files.values()), strict=True)),
            **facts,
        }
    body = json.dumps(content, indent=0).encode()
    (folder / NAME).write_bytes(_digest(body).encode() + b"\n" + body)
    written = [
        *files.values(),
        folder / NAME,
        *{path.parent for path in files.values()},
        folder,
        folder.parent,
    ]
    with ThreadPoolExecutor(32) as threads:  # at once, for a disk that takes many in one go
        list(threads.map(_sync, written))


def read(folder: epath.Path) -> dict[str, Any] | None:
    """Return the list of `folder` with its facts, or None where it is missing or altered."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        digest, _, body = (folder / NAME).read_bytes().partition(b"\n")
        match json.loads(body) if digest == _digest(body).encode() else None:
            case {"files": {}, "loss": int() | float() | None} as content:
                return content
    return None


def damage(folder: epath.Path, parts: Iterable[str]) -> str:
    """Return what is wrong with the files below `parts` of a step, in words; nothing where all is
    as it was written.
    """
    content = read(folder)
    if content is None:
        return f"{NAME} is {'altered' if (folder / NAME).exists() else 'missing'}"
    wanted, found = content["files"], _files(folder)
    for name in sorted(wanted.keys() ^ found.keys()):
        return f"{name} is {'missing' if name in wanted else 'not of it'}"
    for name in (name for name, path in found.items() if os.path.islink(os.fspath(path))):
        return f"{name} is a link"
    checked = [name for name in wanted if "/" not in name or name.partition("/")[0] in parts]
    with ThreadPoolExecutor(_THREADS) as threads:
        for name, now in zip(
            checked, threads.map(lambda name: _describe(found[name]), checked), strict=True
        ):
            match wanted[name]:
                case [int(size), str()] if size != now[0]:
                    return f"{name} has {now[0]:,} bytes instead of {size:,}"
                case entry if entry != now:
                    return f"{name} is altered"
    return ""


def _sync(path: epath.Path) -> None:
    """Bring a file or a folder onto the disk, where it is on one."""
    if not in_bucket(path):
        sync(path, required=False)


def _files(folder: epath.Path) -> dict[str, epath.Path]:
    """Return every file below a folder, but the list itself, by its name from there on."""
    files = {path.relative_to(folder).as_posix(): path for path in _walk(folder)}
    return {name: files[name] for name in sorted(files) if name != NAME}


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.is_dir() and not os.path.islink(os.fspath(path)):
            yield from _walk(path)
        else:
            yield path


def _describe(path: epath.Path) -> list:
    """Return the size and the checksum of a file."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:  # a disk that can't read it back
        return [-1, str(error)]
    return [size, digest.hexdigest()]


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
