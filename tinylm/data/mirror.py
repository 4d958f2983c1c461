"""Source files that lie in a bucket: copied into the user's cache, and read there.

A text is read once to prepare it, or twice, from its beginning to its end; so whole files are
copied, and stay for the next run. A copy is used again as long as the object is the same. Where
tokens are prepared in a bucket too (data.store_dir), the hosts of a job read those, and copy no
text.
"""

import contextlib
import fcntl
import functools
import json
import os
import pathlib
import shutil
from typing import Any

from tinylm.core import buckets
from tinylm.core.errors import StorageError, UserError, one_line
from tinylm.core.files import replace_text, user_cache
from tinylm.core.log import alive
from tinylm.core.storage import in_bucket

_SETTING = "data.source"


def find(pattern: str, endings: tuple[str, ...], outage_secs: float) -> list[str]:
    """Return the URLs of the objects that a URL, folder or glob in a bucket stands for.

    A folder stands for the objects below it: those with one of `endings` where there are any,
    otherwise all.

    Args:
      pattern: the URL, folder or glob.
      endings: of the names of data files.
      outage_secs: how long the bucket may fail.
    """
    look = functools.partial(buckets.find_objects, pattern)
    found = buckets.patiently(pattern, _SETTING, look, outage_secs)
    wanted = [url for url in found if url.lower().endswith(endings)] if endings else []
    is_folder = found != [pattern] and not any(letter in pattern for letter in "*?[")
    return wanted if is_folder and wanted else found


@functools.cache
def state(url: str, outage_secs: float) -> list[Any]:
    """Return what changes with the content of an object: its size, and a mark of its service.

    It is asked once in a process.
    """
    look = functools.partial(buckets.object_state, url)
    return buckets.patiently(url, _SETTING, look, outage_secs)


def local(path: str, outage_secs: float) -> str:
    """Return the path of a file on the disk: `path` itself, or a copy of the object that it names.

    Args:
      path: on a disk or in a bucket.
      outage_secs: how long the bucket may fail.

    Raises:
      StorageError: the copy can't be made.
    """
    if not in_bucket(path):
        return path
    cache = user_cache()
    if cache is None:
        raise StorageError(f"{path} has to be copied to the disk, and this user has no home.")
    copy = buckets.place_of(path.replace("://", "/", 1), cache / "buckets")
    try:
        copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Of the processes of a host one copies it, while the others wait. On a file system without
        # locks each copies it, and the last copy stays, which is the same.
        with copy.with_name(copy.name + ".lock").open("ab") as lock:
            with (
                alive(lambda: f"waiting for another process that copies {path}"),
                contextlib.suppress(OSError),
            ):
                fcntl.flock(lock, fcntl.LOCK_EX)
            _copy(path, copy, outage_secs)
    except OSError as error:
        raise StorageError(f"{path} can't be copied to {copy}: {one_line(error)}.") from error
    return os.fspath(copy)


def _copy(path: str, copy: pathlib.Path, outage_secs: float) -> None:
    """Copy an object to the disk, unless it is there."""
    note = copy.with_name(copy.name + ".state")
    known = state(path, outage_secs)
    if copy.exists() and _noted(note) == known:
        return
    size = known[0]
    free = shutil.disk_usage(copy.parent).free
    if size > free:
        raise StorageError(
            f"{path} has {size:,} bytes and {copy.parent} room for {free:,}; prepare it on a "
            "machine with a larger disk, into a bucket (data.store_dir)."
        )
    with alive(lambda: f"copying {path} ({size / 1e6:,.0f} MB)"):
        fetch = functools.partial(buckets.copy_here, path, copy)
        found = buckets.patiently(path, _SETTING, fetch, outage_secs)
    if found != known:
        # Its checksums and its store would have the name of another text.
        state.cache_clear()
        copy.unlink(missing_ok=True)
        raise UserError(f"{path} was written to while it was read; prepare it when it is complete.")
    replace_text(note, json.dumps(known))


def _noted(note: pathlib.Path) -> Any:
    """Return the state of an object when it was copied; None where that isn't known."""
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
