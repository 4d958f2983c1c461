"""Files that are whole or absent, and where a user's cache is.

A process can be killed between any two of its instructions, and a machine can lose its power. A
file that is written next to its place and then renamed is never seen half; what was synced is
there after a power cut too.
"""

import contextlib
import os
import pathlib
from typing import TypeVar

from etils import epath

from tinylm.core.storage import in_bucket

P = TypeVar("P", pathlib.Path, epath.Path)


def replace_text(path: P, text: str, suffix: str = ".tmp") -> None:
    """Write a small file in one step: at any time there is the old one or the new one.

    Args:
      path: on a disk or in a bucket.
      text: the new content.
      suffix: of the temporary file next to it; it holds the process's number where several
        processes may write at the same time.
    """
    temporary = path.with_name(path.name + suffix)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def make_folder(path: pathlib.Path | epath.Path) -> None:
    """Make a folder, and those above it, where they aren't there.

    A bucket has no folders; s3fs would make the bucket itself, where its name is misspelt.
    """
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def sync(path: os.PathLike | str, required: bool = True) -> None:
    """Wait until a file, or the entries of a folder, are on the disk.

    Args:
      path: on a disk.
      required: whether a file system that can't do this, or fails, is an error.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.nullcontext() if required else contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def user_cache() -> pathlib.Path | None:
    """Return tinylm's folder in the user's cache, by the XDG base directory specification.

    It may not be there yet. None where the user has no home.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    if cache:
        return pathlib.Path(cache, "tinylm")
    # A HOME that is set to nothing means that there is none; `expanduser` would take "/".
    if os.environ.get("HOME") == "":
        return None
    home = os.path.expanduser("~")
    # It stays as it is where the system knows no home of this user.
    if home == "~":
        return None
    return pathlib.Path(home, ".cache", "tinylm")
