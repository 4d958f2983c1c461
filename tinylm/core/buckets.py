"""Objects of a bucket: whole ones through fsspec, stretches of them through tensorstore.

fsspec (gcsfs, s3fs) lists, copies and writes; it goes through one event loop in Python, at about a
millisecond a request. tensorstore reads a stretch of an object in C++, so it is what reads rows
while a model trains.

A service that fails for a while is waited for. `patiently` tries again with growing pauses, and
says so once; meanwhile `is_waiting` holds, by which the watchdog knows that a late step is not a
process that hangs.
"""

import base64
import contextlib
import functools
import hashlib
import os
import pathlib
import re
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple, TypeVar

from tinylm.core.errors import StorageError, UserError, one_line
from tinylm.core.log import say
from tinylm.core.storage import REQUEST_SECS, SLOW_SECS, explained, failures

T = TypeVar("T")
_FIRST_PAUSE_SECS = 1.0
_LONGEST_PAUSE_SECS = 15.0
_CHUNK_BYTES = 1 << 22
_SCHEMES = {"gs": "gcs", "gcs": "gcs", "s3": "s3"}
_AMAZON = re.compile(r"(^|\.)amazonaws\.com(\.cn)?$")


class Traffic(NamedTuple):
    """What this process has read of buckets while it trains: stretches of objects."""

    num_bytes: int
    requests: int


_lock = threading.Lock()
# How many threads wait for a service that fails.
_num_waiting = 0
# Objects of which it was told that they can't be reached.
_told: set[str] = set()
_traffic = Traffic(0, 0)


def is_waiting() -> bool:
    """Say whether a thread of this process waits for a bucket that can't be reached."""
    return _num_waiting > 0


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Have `is_waiting` hold while the body runs."""
    global _num_waiting
    with _lock:
        _num_waiting += 1
    try:
        yield
    finally:
        with _lock:
            _num_waiting -= 1


def traffic() -> Traffic:
    """Return what was read in stretches so far."""
    return _traffic


def patiently(url: str, setting: str, use: Callable[[], T], limit_secs: float) -> T:
    """Return `use()` of an object, tried again where its service fails.

    Args:
      url: of the object or folder.
      setting: the flag or setting that names it, for messages.
      use: reads or writes there; it may be called several times.
      limit_secs: how long the service may fail.

    Raises:
      UserError: for what trying again doesn't help: no such bucket, no permission.
      StorageError: it failed for longer than that.
    """
    began = time.monotonic()
    pause = _FIRST_PAUSE_SECS
    has_failed = False
    with contextlib.ExitStack() as until_done:
        while True:
            try:
                result = use()
            except UserError:
                raise
            except Exception as error:
                # The library is imported by the first use, so that only now its errors are known.
                if not isinstance(error, (ImportError, ValueError, *failures())):
                    raise
                reason = explained(url, setting, error)
                failed_secs = time.monotonic() - began
                if not isinstance(reason, StorageError) or failed_secs > limit_secs:
                    raise reason from error
                if not has_failed:
                    has_failed = True
                    until_done.enter_context(waiting())
                if failed_secs + pause > SLOW_SECS and _is_first(url):
                    say(f"warning: {reason} Trying again for {limit_secs:.0f} s.", from_all=True)
                time.sleep(min(pause, max(0.1, limit_secs - failed_secs)))
                pause = min(2 * pause, _LONGEST_PAUSE_SECS)
            else:
                if has_failed and _is_last(url):
                    say(
                        f"{url} answers again, after {time.monotonic() - began:.0f} s",
                        from_all=True,
                    )
                return result


def _is_first(url: str) -> bool:
    """Say whether this thread is the first to tell of an object that it can't be reached."""
    with _lock:
        is_first = url not in _told
        _told.add(url)
    return is_first


def _is_last(url: str) -> bool:
    """Say whether it was told that an object can't be reached, and not yet that it can again."""
    with _lock:
        is_last = url in _told
        _told.discard(url)
    return is_last


def file_system(url: str) -> Any:
    """Return fsspec's file system of a URL; ImportError where its package isn't installed."""
    import fsspec

    return fsspec.core.url_to_fs(url)[0]


def find_objects(pattern: str) -> list[str]:
    """Return the URLs that an object, folder or glob stands for: of a folder, all that is below."""
    files = file_system(pattern)
    # fsspec keeps listings, in which what another host has just written is missing.
    files.invalidate_cache()
    scheme = pattern.partition("://")[0]
    if any(letter in pattern for letter in "*?["):
        found = files.glob(pattern, detail=True).values()
    elif files.isfile(pattern):
        return [pattern]
    else:
        found = files.find(pattern, detail=True).values()
    return sorted(f"{scheme}://{one['name']}" for one in found if is_file(one))


def is_file(info: dict[str, Any]) -> bool:
    """Say whether an object that fsspec tells of holds a file; S3's console marks a folder by an
    empty object with a name that ends in "/".
    """
    return info["type"] == "file" and not info["name"].endswith("/")


def object_state(url: str) -> list[Any]:
    """Return the size of an object in bytes, and a mark that changes with its content."""
    return _state_of(file_system(url).info(url))


def _state_of(info: dict[str, Any]) -> list[Any]:
    """Return the state of an object, by what fsspec says of it."""
    mark = info.get("md5Hash") or info.get("ETag") or info.get("etag") or info.get("mtime")
    return [info["size"], str(mark)]


def place_of(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Return where below a folder on the disk an object of this name is copied to.

    An object may have any name, with `..` in it too: who owns a bucket must not decide about other
    places of this disk.

    Raises:
      UserError: the name isn't that of a file below the folder, or of another one than it seems.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise UserError(
            f"the object {name} can't be copied to the disk, since its name isn't that of a file; "
            "rename it."
        )
    return folder.joinpath(*parts)


def copy_here(url: str, path: pathlib.Path) -> list[Any]:
    """Copy an object to the disk, in one step; return its state, as `object_state` does.

    Raises:
      OSError: what came isn't what is there, by its size or by a checksum.
    """
    files = file_system(url)
    # A listing that fsspec keeps may tell of an object that was replaced since.
    files.invalidate_cache()
    info = files.info(url)
    state = _state_of(info)
    checksum = _checksum_there(url, info)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    digest = _DIGESTS[checksum.kind]()
    count = 0
    try:
        with files.open(url, "rb", block_size=_CHUNK_BYTES) as source, temporary.open("wb") as file:
            while chunk := source.read(_CHUNK_BYTES):
                _write(file, chunk)
                digest.update(chunk)
                count += len(chunk)
        if count != state[0]:
            raise OSError(f"{count:,} of the {state[0]:,} bytes of {url} came")
        if checksum.value and digest.digest() != checksum.value:
            raise OSError(f"{url} came with another checksum than it has there")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return state


class _Checksum(NamedTuple):
    """A checksum of the whole of an object, which its service vouches for.

    Attributes:
      kind: one of _DIGESTS.
      value: empty where there is none.
    """

    kind: str
    value: bytes


class _Crc32:
    """The CRC-32 of a stream, with the interface of hashlib's digests."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, chunk: bytes) -> None:
        """Take the next part of the stream."""
        self._value = zlib.crc32(chunk, self._value)

    def digest(self) -> bytes:
        """Return the checksum of what came so far."""
        return self._value.to_bytes(4, "big")


_DIGESTS: dict[str, Callable[[], Any]] = {
    "md5": functools.partial(hashlib.md5, usedforsecurity=False),
    "sha256": hashlib.sha256,
    "sha1": functools.partial(hashlib.sha1, usedforsecurity=False),
    "crc32": _Crc32,
}


def _checksum_there(url: str, info: dict[str, Any]) -> _Checksum:
    """Return a checksum that proves what an object holds, where its service has one.

    Google names the MD5 of an object that was written in one piece. S3 names the checksums that
    came with the object, some of them of the checksums of its parts (with a "-"). Its ETag is the
    MD5 of what was written in one piece, and only where the service itself has the key (AES256):
    under a key of the user's (SSE-KMS, SSE-C), and at other services of this protocol, it may look
    the same and be something else.
    https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html
    """
    scheme, _, rest = url.partition("://")
    if scheme != "s3":
        return _Checksum("md5", base64.b64decode(info.get("md5Hash", "")))
    bucket, _, key = rest.partition("/")
    # `info` leaves out what is needed here.
    head = file_system(url).call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    for kind in "sha256", "sha1", "crc32":
        value = head.get(f"Checksum{kind.upper()}", "")
        if value and "-" not in value:
            return _Checksum(kind, base64.b64decode(value))
    etag = head.get("ETag", "").strip('"')
    if head.get("ServerSideEncryption") == "AES256" and re.fullmatch("[0-9a-f]{32}", etag):
        return _Checksum("md5", bytes.fromhex(etag))
    return _Checksum("md5", b"")


def _write(file: BinaryIO, chunk: bytes) -> None:
    """Write to the disk, whose failures are not those of the bucket, and don't pass by waiting."""
    try:
        file.write(chunk)
    except OSError as error:
        raise StorageError(
            f"{file.name} can't be written ({one_line(error)}); free space there."
        ) from error


def copy_there(path: pathlib.Path, url: str) -> None:
    """Copy a file to an object, which appears whole or not at all."""
    file_system(url).put_file(os.fspath(path), url)


def write_there(content: bytes, url: str) -> None:
    """Write an object, which appears whole or not at all."""
    file_system(url).pipe_file(url, content)


def create_there(content: bytes, url: str) -> bool:
    """Write an object where there is none yet; say whether it was this request that made it.

    The service holds the condition, so of many that ask at the same time one alone makes it.
    """
    try:
        file_system(url).pipe_file(url, content, mode="create")
    except FileExistsError:
        return False
    return True


def read_there(url: str) -> bytes | None:
    """Return an object as it is now, or None where there is none."""
    try:
        return file_system(url).cat_file(url)
    except FileNotFoundError:
        return None


def remove_there(url: str) -> None:
    """Remove an object, which may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        file_system(url).rm_file(url)


def names_there(url: str) -> list[str]:
    """Return the names of all objects below a folder, by asking the service."""
    files = file_system(url)
    # fsspec keeps listings, in which what another host has just written is missing.
    files.invalidate_cache()
    return list(files.find(url))


def exists_there(url: str) -> bool:
    """Say whether there is an object, by asking the service."""
    files = file_system(url)
    # fsspec keeps listings, in which what another host has just written is missing.
    files.invalidate_cache()
    return bool(files.exists(url))


def store_spec(url: str) -> dict[str, Any]:
    """Return what tensorstore calls the spec of a place in a bucket.

    Args:
      url: of an object, or of a folder with a "/" at its end.

    Raises:
      ValueError: tensorstore doesn't know the kind of bucket.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in _SCHEMES:
        raise ValueError(f"{scheme}:// can't be read in stretches; use gs:// or s3://")
    bucket, _, path = rest.partition("/")
    spec: dict[str, Any] = {"driver": _SCHEMES[scheme], "bucket": bucket, "path": path}
    if scheme == "s3":
        # s3fs may have found another service than Amazon's, in the environment or in a file.
        service = file_system(url).s3.meta
        host = urllib.parse.urlsplit(service.endpoint_url).hostname or ""
        if not _AMAZON.search(host):
            spec["endpoint"] = service.endpoint_url
            spec["aws_region"] = service.region_name
        # Where it looks for them in files too, it complains of those that aren't there.
        if "AWS_ACCESS_KEY_ID" in os.environ:
            spec["aws_credentials"] = {"type": "environment"}
    return spec


class RangeReader:
    """Reads stretches of the objects below a folder of a bucket; many threads may use it."""

    def __init__(self, url: str):
        """Open nothing yet but a connection.

        Args:
          url: of the folder, such as gs://bucket/stores/0123.

        Raises:
          OSError, ValueError: the service or its address can't be used.
        """
        import tensorstore

        self.url = url
        spec = store_spec(f"{url}/")
        # Failures are ours to wait out, where they can be told to the user.
        spec["context"] = {f"{spec['driver']}_request_retries": {"max_retries": 1}}
        self._objects = tensorstore.KvStore.open(spec).result()

    def read_many(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes of an object in each range (begin, end), asked for at the same time.

        Raises:
          FileNotFoundError: there is no such object, or no such bucket.
          StorageError: the object ends before a range does.
          OSError: one of them can't be read.
        """
        contents: list[bytes] = []
        url = f"{self.url}/{name}"
        try:
            # All requests are under way before the first answer is waited for.
            reads = [
                self._objects.read(name, byte_range=slice(begin, end)) for begin, end in ranges
            ]
            found = [read.result(timeout=REQUEST_SECS) for read in reads]
        except TimeoutError:
            raise
        except Exception as error:
            # tensorstore raises ValueError and other kinds for what a service answers; the text
            # has the HTTP status, by which `explained` tells what it is about.
            if str(error).startswith("OUT_OF_RANGE"):
                raise StorageError(
                    f"{url} is shorter than its store says: it is damaged; delete {self.url} to "
                    "prepare it again."
                ) from error
            raise OSError(str(error)) from error
        for part in found:
            if part.state != "value":
                raise FileNotFoundError(url)
            contents.append(part.value)
        num_bytes = sum(map(len, contents))
        global _traffic
        with _lock:
            _traffic = Traffic(_traffic.num_bytes + num_bytes, _traffic.requests + len(contents))
        return contents
