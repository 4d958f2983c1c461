"""Checksums of source files, by which a token store knows its text: a copied, moved or touched file
is the same text.

A file has to be read whole for its checksum, which takes about a second a gigabyte. So checksums
are noted in the folder of the stores, together with the size and the times of each file, and a file
is read again only where one of these differs.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Sequence
from typing import Any

from tinylm.core.errors import UserError
from tinylm.core.files import replace_text
from tinylm.core.storage import in_bucket
from tinylm.data import mirror
from tinylm.data.progress import Progress

_CHUNK_BYTES = 1 << 22


def file_state(path: str, outage_secs: float) -> list[Any]:
    """Return what changes whenever a file is written to: its size and its times of modification and
    change; of an object in a bucket its size and a mark.

    The second time is kept by the system alone, so it also shows a file whose first time was set
    back.

    Args:
      path: on a disk or in a bucket.
      outage_secs: how long the bucket may fail.
    """
    if in_bucket(path):
        return mirror.state(path, outage_secs)
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"{path} is a pipe or a device, which can be read only once; write its content to a "
            "file."
        )
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def checksums(
    paths: Sequence[str], notes: pathlib.Path, work: Progress, outage_secs: float
) -> list[str]:
    """Return the SHA-256 of each file, from `notes` where the file is as it was when they were
    written.

    Args:
      paths: on a disk or in a bucket.
      notes: the file of notes.
      work: is told how many bytes were read.
      outage_secs: how long the bucket may fail.
    """
    states = [file_state(path, outage_secs) for path in paths]
    noted = _read(notes)
    found: dict[str, Any] = {}
    for path, state in zip(paths, states, strict=True):
        entry = noted.get(path)
        if _is_of(entry, state):
            found[path] = entry
        else:
            found[path] = [*state, _checksum(path, work, outage_secs)]
    if found != noted:
        _write(notes, found)
    return [found[path][-1] for path in paths]


def _is_of(entry: Any, state: list[Any]) -> bool:
    """Return whether an entry of the notes, which may be damaged, is of a file in this state."""
    return isinstance(entry, list) and entry[:-1] == state and isinstance(entry[-1], str)


def _checksum(path: str, work: Progress, outage_secs: float) -> str:
    digest = hashlib.sha256()
    try:
        with pathlib.Path(mirror.local(path, outage_secs)).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                work.update(len(chunk))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from error
    return digest.hexdigest()


def _read(notes: pathlib.Path) -> dict[str, Any]:
    """Return what was noted; notes that are missing or damaged only cost a reading of the files."""
    try:
        noted = json.loads(notes.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _write(notes: pathlib.Path, found: dict[str, Any]) -> None:
    """Write notes in one step; a folder that only its owner can write to goes without."""
    with contextlib.suppress(OSError):
        notes.parent.mkdir(exist_ok=True, mode=0o700)
        replace_text(notes, json.dumps(found), suffix=f".{os.getpid()}.tmp")
