"""Buckets and disks: which paths are which, what they raise, and what a user can do about it.

Buckets are reached through epath and fsspec, whose libraries (gcsfs, s3fs) raise errors of their
own, of their HTTP client and of the provider's sign-in, few of them an OSError. Each becomes one
line that names what to change. `pathlib` takes `gs://bucket/x` for a folder named `gs:` here, and
makes it without a word, so addresses are checked before.
"""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from tinylm.core.errors import StorageError, UserError, one_line
from tinylm.core.log import say

T = TypeVar("T")
SLOW_SECS = 5.0
# After this long without an answer a request counts as failed. Large ones may need minutes.
REQUEST_SECS = 120
# Without this, gcsfs waits for ever.
os.environ.setdefault("FSSPEC_GCS_REQUESTS_TIMEOUT", str(REQUEST_SECS))
# By default listings are kept for ever, though other processes, and tensorstore in this one, write
# to the same folders: a notebook would never see a checkpoint that came later.
for _service in "FSSPEC_GS", "FSSPEC_S3":
    os.environ.setdefault(_service, '{"use_listings_cache": false}')
# fsspec reads the variables when it is imported, which a notebook may have done before.
if "fsspec.config" in sys.modules:
    _fsspec = sys.modules["fsspec.config"]
    _fsspec.set_conf_env(_fsspec.conf)

# gs://bucket/x, and gs:/bucket/x, which has lost a slash.
_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]*:/")
# What fsspec needs for each scheme.
_PACKAGES = {
    "gs": "'tinylm[gcs]'",
    "gcs": "'tinylm[gcs]'",
    "s3": "'tinylm[s3]'",
    "az": "adlfs",
    "abfs": "adlfs",
}
_LIBRARY_ERRORS = (
    ("gcsfs.retry", "HttpError"),
    ("gcsfs.retry", "ChecksumError"),
    ("google.auth.exceptions", "GoogleAuthError"),
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
)
# What a provider's error is about: the HTTP status, or parts of the message.
_NO_CREDENTIALS = (
    401,
    ("anonymous", "credential", "refresherror", "unauth", "expiredtoken", "invalidtoken"),
)
_NO_PERMISSION = (403, ("forbidden", "permission", "access denied", "accessdenied"))
_MISSING = (404, ("nosuchbucket", "nosuchkey"))
# By these words it is the bucket that is missing, and not an object in it.
_NO_BUCKET = ("nosuchbucket", "no such bucket", "bucket does not exist")
# A request that the service doesn't accept, now or later; S3 gives the same status to one that came
# too slowly.
_BAD_REQUEST = (400, ("bad request",))
_TOO_SLOW = "requesttimeout"
# Where messages name the status: "403, message=...", "... , 403", "(403)", "HTTP 403", "code: 403".
_STATUS = re.compile(
    r"^([45]\d\d)\b|, ([45]\d\d)$|\(([45]\d\d)\)|(?:http|status|code)\W+([45]\d\d)\b"
)


def in_bucket(path: os.PathLike | str) -> bool:
    """Say whether a path is in a bucket, not on a disk."""
    return "://" in os.fspath(path)


def check_on_disk(setting: str, path: str) -> None:
    """Raise UserError where `setting` names a place in a bucket, which isn't supported there."""
    if _ADDRESS.match(path):
        raise UserError(
            f"{setting}={path} must be a file or folder on a disk; buckets aren't supported there."
        )


def check_address(setting: str, path: str) -> None:
    """Raise UserError for the address of a bucket that lacks a slash.

    It would be made as a folder here.
    """
    if _ADDRESS.match(path) and not in_bucket(path):
        scheme, _, rest = path.partition(":/")
        raise UserError(
            f"{setting}={path} must be {scheme}://{rest} for a bucket, or a folder on a disk."
        )


def failures() -> tuple[type[Exception], ...]:
    """Return what reading or writing a file can raise, given the libraries in use.

    It is made for an `except`.
    """
    return (OSError, *_errors_of_libraries())


def _errors_of_libraries() -> list[type[Exception]]:
    """Return what the libraries in use raise; one that isn't imported has raised nothing."""
    found = []
    for module_name, name in _LIBRARY_ERRORS:
        module = sys.modules.get(module_name)
        if hasattr(module, name):
            found.append(getattr(module, name))
    return found


def reach(path: os.PathLike | str, setting: str, use: Callable[[], T]) -> T:
    """Return `use()` of a path, with one line for the user where its bucket can't be reached.

    Libraries try again for a minute where there is no network, so after SLOW_SECS a line says what
    is waited for.

    Args:
      path: on a disk, or in a bucket.
      setting: the flag or setting that has the path, for the line.
      use: reads or writes something there.

    Raises:
      UserError: for a bucket that isn't there, or that the user may not use.
      StorageError: for one that can't be reached.
    """
    try:
        with waited_for(path), explaining(path, setting):
            return use()
    except UserError:
        raise
    except (ImportError, ValueError) as error:
        if not in_bucket(path):
            raise
        raise explained(path, setting, error) from error


@contextlib.contextmanager
def waited_for(path: os.PathLike | str) -> Iterator[None]:
    """Say that a path in a bucket is waited for, where the body takes longer than SLOW_SECS."""
    if not in_bucket(path):
        yield
        return
    slow = threading.Timer(SLOW_SECS, say, [f"waiting for {os.fspath(path)} ..."])
    slow.daemon = True
    slow.start()
    try:
        yield
    finally:
        slow.cancel()


@contextlib.contextmanager
def explaining(path: os.PathLike | str, setting: str) -> Iterator[None]:
    """Have one line for the user where the bucket of a path fails while the body runs.

    Args:
      path: on a disk, whose failures stay as they are, or in a bucket.
      setting: the flag or setting that has the path, for the line.

    Raises:
      UserError, StorageError: as `reach` does.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # The library is imported by the first use, so that only now its errors are known.
        if not in_bucket(path) or not isinstance(error, failures()):
            raise
        raise explained(path, setting, error) from error


def is_from_bucket(error: BaseException) -> bool:
    """Say whether an error is one that a library for buckets alone raises."""
    return isinstance(error, tuple(_errors_of_libraries()))


def explained(path: os.PathLike | str, setting: str, error: Exception) -> UserError:
    """Return the error for a user whose bucket failed with an error of its library."""
    scheme, _, rest = os.fspath(path).partition("://")
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    what = f"{setting}={os.fspath(path)}"
    # s3fs keeps the service's own code, such as NoSuchBucket, in the cause alone. Names of objects
    # may hold any word and number, such as the 403 of step 403.
    words = f"{type(error).__name__} {error} {error.__cause__ or ''}"
    message = words.replace(rest, "").lower()
    status = _status_of(error)
    if not status and error.__cause__ is not None:
        status = _status_of(error.__cause__)

    def is_about(kind: tuple[int, tuple[str, ...]]) -> bool:
        kind_status, signs = kind
        if status:
            return status == kind_status
        return any(sign in message for sign in signs)

    if isinstance(error, ImportError):
        advice = "install the package that fsspec needs for it"
        if scheme in _PACKAGES:
            advice = f"pip install {_PACKAGES[scheme]}"
        return UserError(
            f"{what} needs a package that is not installed ({in_words(error)}): {advice}."
        )
    if is_about(_NO_CREDENTIALS):
        return UserError(
            f"{what}: no credentials for {bucket} ({in_words(error)}); sign in (gcloud auth "
            "application-default login, or aws configure), or name a key file in "
            "GOOGLE_APPLICATION_CREDENTIALS."
        )
    if is_about(_NO_PERMISSION):
        return UserError(
            f"{what}: no permission for {bucket} ({in_words(error)}); give the account that runs "
            "this the right to read and write objects there (on Google Cloud the role "
            "storage.objectAdmin)."
        )
    if isinstance(error, FileNotFoundError) or is_about(_MISSING):
        is_named = any(sign in message for sign in _NO_BUCKET)
        if is_named or not _has_bucket(path):
            return UserError(f"{what}: there is no bucket {bucket}; make it, or correct {setting}.")
        return UserError(
            f"{what}: there is no such object in the bucket {bucket}; put it there, or correct "
            f"{setting}."
        )
    if is_about(_BAD_REQUEST) and _TOO_SLOW not in message:
        return UserError(
            f"{what}: {bucket} refuses the request ({in_words(error)}); check the address, the "
            "region of the bucket, and that the credentials are still good."
        )
    if isinstance(error, ValueError):
        return UserError(
            f"{what} cannot be used ({in_words(error)}); give a path, or a bucket such as "
            "gs://NAME/runs/a."
        )
    return StorageError(
        f"{what} cannot be reached ({in_words(error)}); check the network, its proxy, and that the "
        "service is up."
    )


def in_words(error: Exception) -> str:
    """Return what an error says, in one line.

    Some of gcsfs hold nothing but the HTTP status. Those of tensorstore name a file several times
    before they say what the system or the HTTP status was.
    """
    if isinstance(error, TimeoutError):
        # Orbax waits at barriers until all processes have written their parts.
        is_for_others = "barrier" in str(error)
        return "another process was not done in time" if is_for_others else "it doesn't answer"
    of_system = re.search(r": ([^:]+) \[os_error_code", str(error))
    if of_system:
        return of_system[1]
    text = one_line(error).strip(" ,")
    answered = re.search(r"http_response_code='(\d+)'", str(error))
    status = answered[1] if answered else text
    return f"HTTP status {status}" if status.isdigit() else text


def _has_bucket(path: os.PathLike | str) -> bool:
    """Say whether the bucket is there in which something is missing.

    Google answers 404 to both. A listing of what nobody has written there is short, and fails only
    where there is no bucket.
    """
    import fsspec

    nothing = f"{os.fspath(path).rstrip('/')}/.nothing"
    try:
        files, place = fsspec.core.url_to_fs(nothing)
        files.invalidate_cache()
        files.find(place)
    except FileNotFoundError:
        return False
    except Exception as error:
        if not isinstance(error, (ImportError, ValueError, *failures())):
            raise
        # Who may read objects need not have the right to list them.
    return True


def _status_of(error: BaseException) -> int:
    """Return the HTTP status that an error of a library tells of; 0 where it tells of none."""
    code = str(getattr(error, "code", "") or getattr(error, "status", ""))
    if code.isdigit():
        return int(code)
    found = _STATUS.search(str(error).lower())
    return int(next(filter(None, found.groups()))) if found else 0
