"""Folders that users name, where only some may be in a bucket.

`pathlib` takes `gs://bucket/x` for a folder named `gs:` here, and makes it without a word.
"""

import re

from tinylm.core.errors import UserError

_BUCKET = re.compile("[A-Za-z][A-Za-z0-9+.-]*:/")


def is_bucket(path: str) -> bool:
    """Say whether a path is an address such as gs://bucket/x, also where it lost one of its
    slashes.
    """
    return bool(_BUCKET.match(path))


def check_on_disk(setting: str, path: str) -> None:
    """Raise UserError where `setting` names a place in a bucket, which isn't supported there."""
    if is_bucket(path):
        raise UserError(
            f"{setting}={path} must be a file or folder on a disk; buckets aren't supported there."
        )


def check_address(setting: str, path: str) -> None:
    """Raise UserError for the address of a bucket that lacks a slash, which would be made as a
    folder here.
    """
    if is_bucket(path) and "://" not in path:
        scheme, _, rest = path.partition(":/")
        raise UserError(
            f"{setting}={path} must be {scheme}://{rest} for a bucket, or a folder on a disk."
        )
