"""What an error of a bucket's library is taken for: only what lasts ends a run."""

import threading

import pytest

from tinylm.core import buckets
from tinylm.core.errors import StorageError
from tinylm.core.storage import explained, in_words


class HttpError(Exception):
    """An error with the status that the service answered, as gcsfs has it."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def caused_by(error: Exception, cause: str) -> Exception:
    """Return an error with a cause, as s3fs translates those of its client."""
    error.__cause__ = Exception(cause)
    return error


@pytest.mark.parametrize("name", ["9a401f", "9a403f", "404", "403", "permission", "credential"])
@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("kind", ["code", "text"])
def test_the_name_of_an_object_does_not_make_an_outage_a_refusal(name, status, kind):
    url = f"gs://bucket/stores/{name}/tokens-00000.bin"
    error = OSError(f"UNAVAILABLE: Error reading {url}: HTTP {status}")
    if kind == "code":
        error = HttpError(f"{url}: backend error", status)
    assert isinstance(explained(url, "data.store_dir", error), StorageError)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (HttpError("caller lacks access", 403), "no permission"),
        (HttpError("caller is unknown", 401), "no credentials"),
        (HttpError("no such bucket", 404), "there is no bucket"),
        (OSError("An error occurred (403) when calling the HeadObject operation"), "no permission"),
        (OSError("403, message='Forbidden', url='http://x'"), "no permission"),
        (PermissionError("PERMISSION_DENIED: caller lacks access"), "no permission"),
        (OSError("Anonymous caller does not have storage.objects.get access, 401"), "no credent"),
        (OSError("UNAUTHENTICATED: no token"), "no credentials"),
        (PermissionError("The provided token has expired, ExpiredToken"), "no credentials"),
        # As tensorstore says it, gcsfs, and s3fs of an answer that has no body.
        (
            OSError("ExpiredToken: it has expired. [http_response_code='400']"),
            "refuses the request",
        ),
        (HttpError("The project is unknown", 400), "refuses the request"),
        (caused_by(OSError(22, "Bad Request"), "An error occurred (400)"), "refuses the request"),
        (caused_by(FileNotFoundError("x"), "An error occurred (NoSuchBucket)"), "is no bucket"),
    ],
)
def test_a_refusal_is_one(error, wanted):
    found = explained("gs://bucket/run", "--workdir", error)
    assert wanted in str(found) and not isinstance(found, StorageError)


def test_a_request_that_came_too_slowly_is_not_a_refusal():
    error = OSError("ABORTED: RequestTimeout: Your socket ... [http_response_code='400']")
    assert isinstance(explained("s3://bucket/run", "--workdir", error), StorageError)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (HttpError(", 503", 503), "HTTP status 503"),
        (OSError("ABORTED: Service Unavailable [http_response_code='503']"), "HTTP status 503"),
        (TimeoutError(), "it doesn't answer"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (
            ValueError(
                f'OUT_OF_RANGE: Error writing "a" in OCDBT database at local file "{"f" * 200}": '
                f'Failed writing: "{"f" * 200}": Failed to write 54248 bytes to file 24: File too '
                "large [os_error_code='27']"
            ),
            "File too large",
        ),
        (
            TimeoutError("Timed out while waiting for async_write_complete barrier."),
            "another process was not done in time",
        ),
    ],
)
def test_a_status_is_told_in_words(error, wanted):
    assert in_words(error) == wanted


def test_an_outage_that_many_threads_meet_is_told_once(monkeypatch):
    said = []
    monkeypatch.setattr(buckets, "say", lambda line, from_all: said.append(line))
    monkeypatch.setattr(buckets, "SLOW_SECS", 0.0)
    monkeypatch.setattr(buckets, "_FIRST_PAUSE_SECS", 0.01)
    all_failed = threading.Barrier(8)

    def read(tries):
        tries.append(None)
        if len(tries) < 3:
            raise OSError("HTTP 503")
        if len(tries) == 3:
            all_failed.wait(20)

    def wait_for_it():
        tries = []
        buckets.patiently("gs://bucket/x", "data.store_dir", lambda: read(tries), 60)

    for _ in range(2):
        said.clear()
        threads = [threading.Thread(target=wait_for_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(said) == 2
        assert said[0].startswith("warning: data.store_dir=gs://bucket/x cannot be reached")
        assert said[1].startswith("gs://bucket/x answers again")
    assert not buckets.is_waiting()
