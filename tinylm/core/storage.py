"""What disks and buckets raise, and what a user can do about it.

Buckets are reached through epath and fsspec, whose libraries (gcsfs, s3fs) raise errors of their
own, of their HTTP client and of the provider's sign-in, few of them an OSError. Each becomes one
line that names what to change.
"""

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

from tinylm.core.errors import StorageError, UserError, one_line
from tinylm.core.log import say

T = TypeVar("T")
SLOW_SECS = 5.0

_PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs"}
_LIBRARY_ERRORS = (
    ("gcsfs.retry", "HttpError"),
    ("gcsfs.retry", "ChecksumError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
)


def failures() -> tuple[type[Exception], ...]:
    """Return what reading or writing a file can raise, given the libraries in use; made for an
    `except`.
    """
    there = [
        (sys.modules[module], name) for module, name in _LIBRARY_ERRORS if module in sys.modules
    ]
    return (OSError, *(getattr(module, name) for module, name in there if hasattr(module, name)))


def in_bucket(path: os.PathLike | str) -> bool:
    """Say whether a path is in a bucket, not on a disk."""
    return "://" in os.fspath(path)


def reach(path: os.PathLike | str, setting: str, use: Callable[[], T]) -> T:
    """Return `use()` of a path; raise one line where its bucket can't be reached, naming the
    `setting` that has it.

    Libraries try again for a minute where there is no network, so something is said after
    SLOW_SECS.
    """
    if not in_bucket(path):
        return use()
    slow = threading.Timer(SLOW_SECS, say, [f"waiting for {os.fspath(path)} ..."])
    slow.daemon = True
    slow.start()
    try:
        return use()
    except UserError:
        raise
    except Exception as error:
        # The library is imported by the first use, so that only now its errors are known.
        if not isinstance(error, (ImportError, ValueError, *failures())):
            raise
        raise explained(path, setting, error) from error
    finally:
        slow.cancel()


def explained(path: os.PathLike | str, setting: str, error: Exception) -> UserError:
    """Return the error for a user whose bucket failed with an error of its library."""
    scheme, _, rest = os.fspath(path).partition("://")
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    what = f"{setting}={os.fspath(path)}"
    said = f"{type(error).__name__} {getattr(error, 'code', '')} {error}".lower()
    if isinstance(error, ImportError):
        package = _PACKAGES.get(scheme, "")
        advice = (
            f"pip install {package}" if package else "install the package that fsspec needs for it"
        )
        return UserError(
            f"{what} needs a package that is not installed ({one_line(error)}): {advice}."
        )
    if any(
        sign in said for sign in ("401", "anonymous", "credential", "refresherror", "unauthorized")
    ):
        return UserError(
            f"{what}: no credentials for {bucket} ({one_line(error)}); sign in (gcloud "
            "auth application-default login, "
            "or aws configure), or name a key file in GOOGLE_APPLICATION_CREDENTIALS."
        )
    if any(
        sign in said for sign in ("403", "forbidden", "permission", "access denied", "accessdenied")
    ):
        return UserError(
            f"{what}: no permission for {bucket} ({one_line(error)}); give the account "
            "that runs this the right to "
            "read and write objects there (on Google Cloud the role storage.objectAdmin)."
        )
    if isinstance(error, FileNotFoundError) or "nosuchbucket" in said or "404" in said:
        return UserError(f"{what}: there is no bucket {bucket}; make it, or correct {setting}.")
    if isinstance(error, ValueError):
        return UserError(
            f"{what} cannot be used ({one_line(error)}); give a path, or a bucket such as "
            "gs://NAME/runs/a."
        )
    return StorageError(
        f"{what} cannot be reached ({one_line(error)}); check the network, its proxy, and "
        "that the service is up."
    )
