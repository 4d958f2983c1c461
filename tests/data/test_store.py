"""Token stores: whole or absent after any kill, one for many at once, one clear line when the disk
is full.
"""

import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tinylm.core.errors import HangError, StorageError, UserError
from tinylm.data import encoding, open_data, prepare, sources, store, stores
from tinylm.data.config import DataConfig
from tinylm.data.manifest import MANIFEST, Shard, read_manifest
from tinylm.data.tokenizers import ByteTokenizer, portions

PREPARE = """
import sys
from tinylm.data import open_data
from tinylm.data.config import DataConfig
data = open_data(DataConfig(source=sys.argv[1], store_dir=sys.argv[2], seq_len=8, batch_size=2), seed=0, progress=False)
print(data.stores[0].folder)
"""


def start(source, folder, before="", **kwargs):
    command = [sys.executable, "-c", before + PREPARE, source, str(folder)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def write_text(path, documents=20_000):
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 122, 40))) for _ in range(50)]
    path.write_text("<|endoftext|>".join(words[i % 50] + str(i) for i in range(documents)))
    return path


def config_of(path, folder, **settings):
    return DataConfig(
        source=f"text:{path}", store_dir=str(folder), **{"seq_len": 8, "batch_size": 2} | settings
    )


def manifest(data):
    return data.stores[0].manifest


def ids_of(opened):
    opened = store.Store(opened) if isinstance(opened, pathlib.Path) else opened
    out = np.empty(len(opened.tokens), np.int32)
    opened.tokens.read(out, 0)
    return out


def finished(folder):
    return [path.parent for path in folder.glob("*/manifest.json") if path.parent.suffix != ".tmp"]


# Says when it begins; slowed between writes, so that most kills fall inside the work.
SLOW = """
import time
from tinylm.data import store
from tinylm.data.tokenizers import portions
portions.BATCH_CHARS, append = 1 << 17, store.ArrayWriter.append
def slowly(*args):
    time.sleep(0.02)
    append(*args)
store.ArrayWriter.append = slowly
print("begun", flush=True)
"""


@pytest.mark.parametrize("points", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_a_store_is_whole_or_absent_after_kill_9_at_any_point(tmp_path, points):
    path = write_text(tmp_path / "a.txt", 60_000)
    wanted = open_data(config_of(path, tmp_path / "whole"), seed=0, progress=False).stores[0].folder
    draw = random.Random(0)
    for point in range(points):
        folder = tmp_path / f"stores{point}"
        process = start(f"text:{path}", folder, SLOW)
        assert process.stdout.readline() == "begun\n"
        time.sleep(draw.uniform(0, 1.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for found in finished(folder) if folder.exists() else []:
            store.Store(found).verify()
        again = open_data(config_of(path, folder), seed=0, progress=False).stores[0].folder
        store.Store(again).verify()
        assert np.array_equal(ids_of(again), ids_of(wanted))
        assert not list(folder.glob("*.tmp"))


def test_batches_of_any_size_encode_to_the_same_store(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.txt", 3_000)
    path.write_text(path.read_text() + "<|endoftext|>café\r\n— 日本 🙂\n")
    few = open_data(config_of(path, tmp_path / "few", tokenizer="bpe:300"), seed=0, progress=False)
    monkeypatch.setattr(portions, "BATCH_CHARS", 1 << 10)
    many = open_data(
        config_of(path, tmp_path / "many", tokenizer="bpe:300"), seed=0, progress=False
    )
    assert len(manifest(many).shards) == 1
    assert manifest(many).shards == manifest(few).shards
    assert manifest(many).document_shards == manifest(few).document_shards


def test_documents_are_read_no_further_ahead_than_a_batch(monkeypatch):
    """This bounds memory, whatever the size of a source."""
    monkeypatch.setattr(portions, "BATCH_CHARS", 10)
    read = []

    def documents():
        for number in range(100):
            read.append(number)
            yield sources.Document("abcd", prompt="é" if number % 2 else "")

    batches = encoding.encode(documents(), ByteTokenizer())
    batch, encoded = next(batches)
    assert len(batch) == len(read) == 3
    assert encoded.counts.tolist() == [0, 4, 2, 4, 0, 4]
    assert bytes(encoded.ids.tolist()) == "abcdéabcdabcd".encode()


def test_a_text_that_is_not_unicode_is_one_line():
    with pytest.raises(UserError, match="not valid Unicode"):
        list(encoding.encode([sources.Document("\ud800")], ByteTokenizer()))


def test_a_store_that_was_not_renamed_is_none(tmp_path):
    source = f"text:{write_text(tmp_path / 'a.txt', 100)}"
    assert (
        start(source, tmp_path / "s", "import os; os.rename = lambda *a: os._exit(9)\n").wait() == 9
    )
    assert not finished(tmp_path / "s") and len(list((tmp_path / "s").glob("*.tmp"))) == 1


def test_many_that_prepare_at_once_make_one_store(tmp_path):
    source = f"text:{write_text(tmp_path / 'a.txt')}"
    # The last two have no lock, like hosts that share a file system without locks.
    no_lock = (
        "import fcntl; fcntl.flock = lambda *a: None; import socket; socket.gethostname = lambda: "
        "'host%d'\n"
    )
    processes = [
        start(source, tmp_path / "s", before) for before in ("", "", no_lock % 1, no_lock % 2)
    ]
    outputs = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0] * 4 and len(outputs) == 1
    store.Store(finished(tmp_path / "s")[0]).verify()
    assert len(finished(tmp_path / "s")) == 1 and not list((tmp_path / "s").glob("*.tmp"))


def test_others_wait_for_the_writer_but_not_for_ever(tmp_path):
    path = write_text(tmp_path / "a.txt")
    config = config_of(path, tmp_path / "s")
    with pytest.raises(
        HangError, match=r"waited 0 s for another process to prepare .*nothing moved"
    ):
        open_data(config, seed=0, is_writer=False, wait_secs=0.3, progress=False)
    writer = start(config.source, tmp_path / "s")
    data = open_data(config, seed=0, is_writer=False, wait_secs=60, progress=False)
    assert writer.wait() == 0 and manifest(data).tokens > 0


def test_a_full_disk_is_one_line_with_its_own_exit_code_and_leaves_nothing(tmp_path):
    path = write_text(tmp_path / "a.txt")
    config = config_of(path, tmp_path / "s")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(StorageError) as error:
            open_data(config, seed=0, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (
        error.value.exit_code == 5
        and "\n" not in str(error.value)
        and "data.store_dir" in str(error.value)
    )
    assert not finished(tmp_path / "s") and not list((tmp_path / "s").glob("*.tmp"))
    assert manifest(open_data(config, seed=0, progress=False)).tokens > 100_000


def test_a_store_is_made_once_and_again_when_its_text_changes(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.txt", 500)
    config = config_of(path, tmp_path / "s")
    first = open_data(config, seed=0, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "Preparer", lambda *args: pytest.fail("prepared again"))
        assert open_data(config, seed=3, progress=False).stores[0].folder == first.stores[0].folder
    path.write_text(path.read_text().replace("a", "b"))
    assert open_data(config, seed=0, progress=False).stores[0].folder != first.stores[0].folder


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:260", "char"])
def test_a_text_that_was_moved_or_touched_finds_its_store(tmp_path, monkeypatch, tokenizer):
    path = write_text(tmp_path / "a.txt", 500)
    stores = tmp_path / "s"
    first = open_data(config_of(path, stores, tokenizer=tokenizer), seed=0, progress=False).stores[
        0
    ]
    monkeypatch.setattr(prepare, "Preparer", lambda *args: pytest.fail("prepared again"))
    os.utime(path, ns=(1, 1))
    touched = open_data(
        config_of(path, stores, tokenizer=tokenizer), seed=0, progress=False
    ).stores[0]
    assert touched.folder == first.folder
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "b.txt")
    again = open_data(config_of(moved, stores, tokenizer=tokenizer), seed=0, progress=False).stores[
        0
    ]
    assert (again.folder, again.digest) == (first.folder, first.digest)
    assert len(list(stores.glob("*/manifest.json"))) == 1


def test_another_content_under_the_old_size_and_time_is_another_text(tmp_path):
    path = write_text(tmp_path / "a.txt", 500)
    config = config_of(path, tmp_path / "s")
    first = open_data(config, seed=0, progress=False).stores[0]
    status = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert open_data(config, seed=0, progress=False).stores[0].digest != first.digest


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"%s": 5}', b'{"%s": [1, 2, 3, 4]}', b'{"%s": ["a"]}']
)
def test_damaged_notes_of_checksums_only_cost_another_reading(tmp_path, damage):
    path = write_text(tmp_path / "a.txt", 50)
    config = config_of(path, tmp_path / "s")
    first = open_data(config, seed=0, progress=False).stores[0]
    (notes,) = (tmp_path / "s" / "checksums").iterdir()
    whole = notes.read_bytes()
    notes.write_bytes(damage.replace(b"%s", str(path).encode()))
    assert open_data(config, seed=0, progress=False).stores[0].folder == first.folder
    assert notes.read_bytes() == whole


def test_a_file_that_grows_while_it_is_prepared_makes_no_store(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.txt", 50)
    run = prepare.Preparer.run

    def and_grow(self, splits):
        run(self, splits)
        path.write_text(path.read_text() + "more")

    monkeypatch.setattr(prepare.Preparer, "run", and_grow)
    with pytest.raises(UserError, match=r"a\.txt was written to while it was prepared"):
        open_data(config_of(path, tmp_path / "s"), seed=0, progress=False)
    assert not finished(tmp_path / "s")


def ready_config(tmp_path, ids):
    np.array(ids, np.uint16).tofile(tmp_path / "ids.bin")
    config = config_of("", tmp_path / "s")
    config.source = f"tokens:{tmp_path}/ids.bin"
    return config


def test_ready_ids_that_were_moved_or_touched_are_the_same(tmp_path):
    config = ready_config(tmp_path, [*range(99), 256] * 9)
    first = open_data(config, seed=0, progress=False)
    before = first.train.read(np.arange(9))["tokens"]
    os.utime(tmp_path / "ids.bin", ns=(1, 1))
    assert np.array_equal(first.train.read(np.arange(9))["tokens"], before), (
        "also under a run that has it open"
    )
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "ids.bin", tmp_path / "elsewhere" / "other.bin")
    config.source = f"tokens:{tmp_path}/elsewhere/other.bin"
    again = open_data(config, seed=0, progress=False)
    assert again.stores[0].folder == first.stores[0].folder
    assert np.array_equal(again.train.read(np.arange(9))["tokens"], before)
    again.stores[0].verify()


@pytest.mark.parametrize("when", ["while it is read", "between two runs"])
def test_altered_ready_ids_are_found(tmp_path, when):
    data = open_data(ready_config(tmp_path, [*range(99), 256] * 9), seed=0, progress=False)
    path = tmp_path / "ids.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(StorageError, match=r"ids\.bin .*; put back the file as it was"):
        data.train.read(np.arange(9)) if when == "while it is read" else data.stores[0].verify()


def test_damage_is_found(tmp_path):
    path = write_text(tmp_path / "a.txt", 500)
    config = config_of(path, tmp_path / "s")
    folder = open_data(config, seed=0, progress=False).stores[0].folder
    shard = folder / "tokens-00000.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StorageError, match="checksum"):
        store.Store(folder).verify()
    shard.write_bytes(content[:-2])
    with pytest.raises(StorageError, match="damaged; delete"):
        open_data(config, seed=0, progress=False)


@pytest.mark.parametrize("packing", ["stream", "packed"])
@pytest.mark.parametrize("how", ["cut", "altered"])
def test_a_file_that_changes_under_a_reader_is_one_line(tmp_path, packing, how):
    """A cut one must not kill the process, as a memory map that shrinks would."""
    data = open_data(
        config_of(write_text(tmp_path / "a.txt", 500), tmp_path / "s", packing=packing), seed=0
    )
    data.train.read(np.arange(9))
    name = "tokens-*.bin" if packing == "stream" else "plan-*/pieces-*.bin"
    for path in data.stores[0].folder.glob(name):
        if how == "cut":
            os.truncate(path, 1000)
        else:
            path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(
        StorageError, match=f"{path.name} was changed while it was read: it is damaged; delete"
    ) as error:
        data.train.read(np.arange(9))
    assert "\n" not in str(error.value)


def test_a_shard_that_was_only_touched_is_read_on(tmp_path):
    data = open_data(config_of(write_text(tmp_path / "a.txt", 500), tmp_path / "s"), seed=0)
    before = data.train.read(np.arange(9))
    for path in data.stores[0].folder.glob("tokens-*.bin"):
        os.utime(path)
    assert np.array_equal(data.train.read(np.arange(9))["tokens"], before["tokens"])


MANIFEST_KEYS = (
    "format dtype tokens documents bytes unknown shards mask_shards document_shards source "
    "tokenizer splits skipped held_out"
)


def test_a_manifest_has_the_keys_that_other_versions_read_and_comes_back_as_it_was(tmp_path):
    config = config_of("", tmp_path / "s")
    config.source = "tales:50"
    opened = open_data(config, seed=0, progress=False).stores[0]
    content = json.loads((opened.folder / MANIFEST).read_text())
    assert list(content) == MANIFEST_KEYS.split()
    assert list(content["shards"][0]) == ["file", "items", "sha256"]
    assert list(content["splits"]["valid"]) == ["documents", "tokens", "bytes", "log_prob"]
    assert list(content["tokenizer"]) == ["name", "fingerprint", "vocab_size", "eot_id"]
    assert list(content["skipped"]) == ["count", "examples"]
    opened.manifest.write(tmp_path)
    assert read_manifest(tmp_path) == opened.manifest


@pytest.mark.parametrize("key", ["shards", "splits", "tokenizer"])
def test_a_manifest_that_lacks_a_part_is_one_line(tmp_path, key):
    config = config_of(write_text(tmp_path / "a.txt", 500), tmp_path / "s")
    folder = open_data(config, seed=0, progress=False).stores[0].folder
    content = json.loads((folder / MANIFEST).read_text())
    del content[key]
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(StorageError, match=f"can't be read .*{key}.*delete"):
        open_data(config, seed=0, progress=False)


def test_a_store_of_another_tokenizer_is_refused(tmp_path):
    path = write_text(tmp_path / "a.txt", 500)
    config = config_of(path, tmp_path / "s")
    folder = open_data(config, seed=0, progress=False).stores[0].folder
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "other"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="another tokenizer"):
        open_data(config, seed=0, progress=False)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)],
)
def test_ids_take_the_smallest_type_and_shards_read_as_one(tmp_path, vocab_size, dtype):
    assert store.smallest_dtype(vocab_size) == dtype
    values = np.random.default_rng(0).integers(0, vocab_size, 1000)
    writer = store.ArrayWriter(tmp_path, "x", store.smallest_dtype(vocab_size), shard_items=97)
    for part in np.split(values, [10, 11, 500, 777]):
        writer.append(part)
    writer.close()
    array = store.TokenArray(tmp_path, writer.shards, np.dtype(dtype))
    for begin, end in [(0, 1000), (96, 98), (97, 291), (990, 1000), (5, 6)]:
        out = np.empty(end - begin, np.int64)
        array.read(out, begin)
        assert np.array_equal(out, values[begin:end])


@pytest.mark.parametrize("home", ["", "/proc/nowhere"])
def test_without_a_home_stores_go_to_a_private_temporary_folder(tmp_path, monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(stores.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = stores.store_folder(DataConfig())
    assert tmp_path in folder.parents
    assert all(os.stat(path).st_mode & 0o077 == 0 for path in (folder, folder.parent))
    other = os.stat_result([*os.lstat(folder)[:4], os.getuid() + 1, *os.lstat(folder)[5:]])
    real = os.lstat
    monkeypatch.setattr(
        os, "lstat", lambda path, **_: other if path == folder.parent else real(path)
    )
    with pytest.raises(
        StorageError, match=r"set data\.store_dir"
    ):  # who owns the parent could rename what is in it
        stores.store_folder(DataConfig())


@pytest.mark.slow  # not long, but timed, which a busy machine disturbs
def test_a_trillion_tokens_open_at_once_and_read_like_few(tmp_path):
    sizes = {"small": (1 << 20, 1), "large": (1 << 37, 8)}
    rates = {}
    for name, (items, count) in sizes.items():
        folder = tmp_path / name
        folder.mkdir()
        shards = [Shard(f"tokens-{i:05d}.bin", items) for i in range(count)]
        for shard in shards:
            with (folder / shard.file).open("wb") as file:
                file.truncate(items)
        array = store.TokenArray(folder, shards, np.dtype(np.uint8))
        out = np.empty(64, np.int32)
        places = [(i * 0x9E3779B97F4A7C15) % (items * count - 64) for i in range(2000)]
        begun = time.perf_counter()
        for place in places:
            array.read(out, place)
        rates[name] = time.perf_counter() - begun
        assert len(array) == items * count
    shutil.rmtree(tmp_path / "large")
    assert (
        rates["large"] < 20 * rates["small"] + 0.5
    )  # each touches a page of its own; the benchmark has figures


def test_more_files_open_than_the_soft_limit_allows(tmp_path):
    for i in range(200):
        np.array([i, 256], np.uint16).tofile(tmp_path / f"{i:03d}.bin")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[1]))
    try:
        config = config_of("", tmp_path / "s", seq_len=4)
        config.source = f"tokens:{tmp_path}/*.bin"
        data = open_data(config, seed=0, progress=False)
        assert manifest(data).documents == 200 and ids_of(data.stores[0])[::2].tolist() == list(
            range(200)
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_private_plans_of_a_read_only_store_stay_in_memory(tmp_path, monkeypatch):
    path = write_text(tmp_path / "a.txt", 500)
    config = config_of(path, tmp_path / "s", seq_len=80, packing="packed")
    wanted = open_data(config, seed=0, progress=False)
    for plan in wanted.stores[0].folder.glob("plan-*-80"):
        shutil.rmtree(plan)
    monkeypatch.setattr(
        pathlib.Path,
        "mkdir",
        lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError(13, "no")),
    )
    config.store_dir = ""
    monkeypatch.setattr(stores, "store_folder", lambda config: tmp_path / "s")
    found = open_data(config, seed=0, progress=False)
    assert np.array_equal(
        found.train.read(np.arange(9))["targets"], wanted.train.read(np.arange(9))["targets"]
    )
