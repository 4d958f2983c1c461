"""Sources: each gives its documents, on real files where they are; and every mistake is one clear
line.
"""

import gzip
import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest
import zstandard

from tinylm.core.errors import StorageError, UserError
from tinylm.data import open_data, store
from tinylm.data.atomic import make
from tinylm.data.config import DataConfig
from tinylm.data.manifest import Split
from tinylm.data.sources import base, files, hub, made, make_source, records
from tinylm.data.tokenizers import portions

STORIES = ["One day a cat sat.", "Two dogs ran\nfar away.", "Drei Mäuse — 日本 🙂"]


def config_of(tmp_path, **settings):
    return DataConfig(
        **{"seq_len": 8, "batch_size": 1, "store_dir": str(tmp_path / "stores")} | settings
    )


def texts_of(spec, split="all", **settings):
    return [
        (d.prompt, d.text) if d.prompt else d.text
        for d in make_source(spec, DataConfig(**settings)).documents(split)
    ]


def manifest(data):
    return data.stores[0].manifest


def real(path):
    folder = os.environ.get("TINYLM_TEST_DATA")
    if not folder:
        pytest.skip("needs the real files that TINYLM_TEST_DATA names")
    return pathlib.Path(folder) / path


def refused(tmp_path, match, **settings):
    with pytest.raises(UserError, match=match) as error:
        open_data(config_of(tmp_path, **settings), seed=0, progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_text_files_split_at_the_separator_wherever_chunks_end(
    tmp_path, monkeypatch, ending, chunk
):
    monkeypatch.setattr(files, "_CHUNK_BYTES", chunk)
    packers = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
    content = "<|endoftext|>".join(STORIES).encode() + b"<|endoftext|>\n"
    (tmp_path / f"a.txt{ending}").write_bytes(packers[ending](content))
    assert texts_of(f"text:{tmp_path}/a*") == STORIES
    assert texts_of(f"text:{tmp_path}/a*", separator="") == [content.decode()]


def test_a_file_whose_name_is_a_pattern_is_itself(tmp_path):
    (tmp_path / "story [1].txt").write_text("a cat")
    assert texts_of(f"text:{tmp_path}/story [1].txt") == ["a cat"]


def test_files_of_a_glob_come_in_the_order_of_their_names(tmp_path):
    for name, story in zip("bca", STORIES, strict=True):
        (tmp_path / f"{name}.txt").write_text(story)
    assert texts_of(f"text:{tmp_path}/*.txt") == [STORIES[2], STORIES[0], STORIES[1]]


def test_jsonl_and_parquet_give_texts_and_pairs(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    plain = [{"story": story, "n": i} for i, story in enumerate(STORIES)]
    pairs = [{"prompt": "Q: ", "completion": story} for story in STORIES]
    for name, rows in (("plain", plain), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    for kind in ("jsonl", "parquet"):
        assert texts_of(f"{kind}:{tmp_path}/plain.{kind}", text_field="story") == STORIES
        assert texts_of(f"{kind}:{tmp_path}/pairs.{kind}") == [("Q: ", story) for story in STORIES]
        refused(
            tmp_path,
            r"has no field text, only story, n; set data\.text_field",
            source=f"{kind}:{tmp_path}/plain.{kind}",
        )
        refused(
            tmp_path,
            "holds int instead of text",
            source=f"{kind}:{tmp_path}/plain.{kind}",
            text_field="n",
        )


def test_pairs_after_plain_texts_are_masked_from_their_own_begin(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_MASK_TOKENS", 2)
    monkeypatch.setattr(portions, "BATCH_CHARS", 2)
    rows = [{"text": "abc"}, {"prompt": "de", "completion": "f"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = config_of(
        tmp_path,
        source=f"jsonl:{tmp_path}/a.jsonl",
        loss_on="answer",
        packing="single",
        valid_fraction=0,
    )
    data = open_data(config, seed=0, progress=False)
    examples = data.train.read(np.arange(2))
    scored = sorted(
        data.tokenizer.decode(t[w > 0])
        for t, w in zip(examples["targets"], examples["weights"], strict=True)
    )
    assert scored == ["abc", "f"]


@pytest.mark.parametrize("text", ["own", "real"])
def test_the_cut_of_one_text_is_nanogpts(tmp_path, text):
    """A tenth is held out: nanoGPT trains on the first int(0.9 * n) characters."""
    if text == "own":
        path = tmp_path / "input.txt"
        path.write_text("abcde" * 25 + "fgh")
        vocab_size, train_tokens, valid_tokens = 9, 115, 13
    else:
        path = real("tinyshakespeare/input.txt")
        vocab_size, train_tokens, valid_tokens = 66, 1_003_854, 111_540
    data = open_data(
        config_of(tmp_path, source=f"text:{path}", tokenizer="char"), seed=0, progress=False
    )
    assert data.vocab_size == vocab_size
    assert manifest(data).splits["train"].tokens == (0, train_tokens)
    assert data.valid_tokens == valid_tokens and data.valid_bytes_per_token() == 1


def test_the_cut_of_several_texts_falls_between_two(tmp_path):
    (tmp_path / "a.txt").write_text("<|endoftext|>".join("x" * n for n in (50, 30, 15, 5)))
    data = open_data(
        config_of(tmp_path, source=f"text:{tmp_path}/a.txt", valid_fraction=0.2),
        seed=0,
        progress=False,
    )
    assert manifest(data).splits["train"] == Split((0, 2), (0, 82), bytes=80)
    assert manifest(data).splits["valid"] == Split((2, 4), (82, 104), bytes=20)


def test_a_validation_source_of_its_own_takes_no_text_from_training(tmp_path):
    for name, story in zip("ab", STORIES, strict=False):
        (tmp_path / name).write_text(story)
    config = config_of(
        tmp_path, source=f"text:{tmp_path}/a", valid_source=f"text:{tmp_path}/b", tokenizer="char"
    )
    data = open_data(config, seed=0, progress=False)
    assert manifest(data).tokens == len(STORIES[0]) + 1 and data.valid_tokens == len(STORIES[1]) + 1


def test_tales_have_a_floor_and_keep_their_splits_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "VALID_TALES", 30)
    config = config_of(tmp_path, source="tales:300", packing="single", seq_len=600)
    data = open_data(config, seed=0, progress=False)
    documents = list(make_source("tales:300", config).documents("valid"))
    tokens = sum(len(d.text.encode()) + 1 for d in documents)
    assert data.valid_tokens == tokens
    assert data.floor_nats_per_token == pytest.approx(-sum(d.log_prob for d in documents) / tokens)
    assert not {d.text for d in documents} & set(texts_of("tales:300", "train"))


@pytest.mark.parametrize(
    ("kind", "vocab"), [(np.uint16, 300), (np.uint32, 300), (np.uint16, 65536)]
)
def test_ready_ids_are_read_in_place_in_the_type_they_have(tmp_path, kind, vocab):
    bpe = "bpe:300"
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(STORIES * 40))
    made = open_data(
        config_of(tmp_path, source=f"text:{tmp_path}/text.txt", tokenizer=bpe),
        seed=0,
        progress=False,
    )
    made.tokenizer.save(tmp_path / "tok")
    ids = np.concatenate([[*made.tokenizer.encode(s), made.tokenizer.eot_id] for s in STORIES * 40])
    for name, part in zip("ab", np.split(ids, [332]), strict=True):
        part.astype(kind).tofile(tmp_path / f"{name}.bin")
    spec = {"source": f"tokens:{tmp_path}/*.bin", "tokenizer": f"hf:{tmp_path}/tok/tokenizer.json"}
    data = open_data(config_of(tmp_path, **spec), seed=0, progress=False)
    opened = data.stores[0]
    out = np.empty(len(ids), np.int32)
    opened.tokens.read(out, 0)
    assert np.array_equal(out, ids)
    assert not list(opened.folder.glob("tokens-*")) and manifest(data).documents == 120
    assert (
        manifest(data).splits["train"].tokens[1] in np.flatnonzero(ids == made.tokenizer.eot_id) + 1
    )
    assert sum(s.bytes for s in manifest(data).splits.values()) == 40 * sum(
        len(s.encode()) for s in STORIES
    )
    ids[70] = vocab - 1
    ids.astype(np.uint32).tofile(tmp_path / "c.bin")
    if vocab > 300:
        refused(
            tmp_path,
            r"id 65535 at byte 280.*data\.tokenizer",
            **spec | {"source": f"tokens:{tmp_path}/c.bin"},
        )


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is an empty document"),
        (b"good<|endoftext|><|endoftext|>good", r"at byte 17 is an empty document"),
        (b"good<|endoftext|>caf\xe9 noir", r"at byte 17 is not UTF-8 \(byte 20\)"),
        (b"\x7fELF\0\0\0", r"zero byte \(byte 4\).*not text"),
        (b"\x80\x81\x82", r"a\.txt at byte 0 is not UTF-8"),
    ],
)
def test_bad_text_is_named_with_file_and_byte_or_skipped_and_counted(tmp_path, content, match):
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text("enough good text to train on")
    spec = {"source": f"text:{tmp_path}/*.txt", "valid_fraction": 0}
    refused(tmp_path, match, **spec)
    data = open_data(config_of(tmp_path, on_bad_text="skip", **spec), seed=0, progress=False)
    assert manifest(data).skipped.count == 1
    assert manifest(data).documents == 1 + content.count(b"good")


def test_a_record_without_its_field_is_skipped_and_counted(tmp_path):
    rows = [{"text": "a good line here"}, {"txt": "no such field"}, {"text": 5}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = {"source": f"jsonl:{tmp_path}/a.jsonl", "valid_fraction": 0, "on_bad_text": "skip"}
    data = open_data(config_of(tmp_path, **spec), seed=0, progress=False)
    assert manifest(data).skipped.count == 2
    assert "line 2, has no field text, only txt" in str(manifest(data).skipped.examples)
    refused(
        tmp_path,
        "holds no text .skipped 3, first: .*has no field story, only text; set data.text_field",
        **spec | {"text_field": "story"},
    )


def test_bad_lines_of_jsonl_are_named_or_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "a good line here"}\n{"text": "cut\n{"text": "\xff"}\n{"text": "\\ud800"}\n[1]'
    )
    spec = {"source": f"jsonl:{tmp_path}/a.jsonl", "valid_fraction": 0}
    refused(tmp_path, r"line 2, at byte 29, is not JSON", **spec)
    data = open_data(config_of(tmp_path, on_bad_text="skip", **spec), seed=0, progress=False)
    assert manifest(data).skipped.count == 4 and manifest(data).documents == 1


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_bad_strings_of_parquet_are_named_or_skipped(tmp_path, kind):
    import pyarrow as pa
    from pyarrow import parquet

    texts = pa.array([b"a good line here", b"\xff\xfe", None]).view(pa.string())
    texts = texts.dictionary_encode() if kind == "dictionary" else texts.cast(kind)
    parquet.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    spec = {"source": f"parquet:{tmp_path}/a.parquet", "valid_fraction": 0}
    refused(tmp_path, r"a\.parquet, row 1, field text, is not UTF-8 \(byte 0 of it\)", **spec)
    data = open_data(config_of(tmp_path, on_bad_text="skip", **spec), seed=0, progress=False)
    assert manifest(data).skipped.count == 2 and manifest(data).documents == 1


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"source": "text:{}/absent*"}, r"matches no file; set data\.source"),
        ({"source": "txt:a"}, "did you mean 'text'"),
        ({"source": "text:"}, "must say more"),
        ({"valid_source": "txt:a"}, "data.valid_source=txt:a must begin with"),
        (
            {"valid_source": "text:{}/absent*"},
            r"data.valid_source=.*matches no file; set data\.valid_source",
        ),
        (
            {"source": "addition", "valid_source": "tales", "loss_on": "answer"},
            "which data.valid_source=tales",
        ),
        ({"source": "0*tales, 1*addition"}, "above 0"),
        ({"source": "0.7*tales, 0.3*"}, r"must be WEIGHT\*SOURCE"),
        ({"source": "0.7.1*tales, 0.3*addition"}, r"must be WEIGHT\*SOURCE"),
        ({"source": "0.7*tales, 0.333333333*addition"}, "too fine"),
        ({"tokenizer": "bpe:100"}, "at least 257"),
        ({"tokenizer": "bpe:1000000000000"}, "at most 16777216"),
        ({"tokenizer": "bpe:99999999999999999999"}, "a whole number above 0"),
        ({"tokenizer": "bbpe:300"}, "did you mean 'bpe'"),
        ({"packing": "pack"}, "did you mean 'packed'"),
        ({"batch_size": 0}, "at least 1"),
        ({"valid_fraction": 1.0}, "below 1"),
        ({"loss_on": "answer"}, "needs prompt and completion"),
        (
            {"source": "jsonl:{}/texts.jsonl", "loss_on": "answer"},
            "loss_on=answer needs prompts, and .* has none",
        ),
        ({"source": "tokens:x", "vocab_top_k": 9}, "can't cut"),
        ({"source": "tokens:x", "tokenizer": "char"}, "must be the one that made the ids"),
        (
            {"source": "text:{}/short.txt", "seq_len": 99},
            r"data\.seq_len=99 must be at most the 18 training tokens",
        ),
        (
            {"source": "text:{}/short.txt", "seq_len": 2**30, "packing": "packed"},
            "at most the 18 training tokens",
        ),
        (
            {"source": "text:{}/short.txt", "seq_len": 2**30, "packing": "single"},
            "at most the 18 training tokens",
        ),
        (
            {"source": "text:{}/short.txt", "seq_len": 9, "batch_size": 7},
            r"data\.batch_size=7 must be at most the 2 rows",
        ),
        ({"source": "text:{}/blank.txt", "on_bad_text": "skip"}, "holds no text"),
        ({"source": "text:{}/broken.gz"}, r"broken\.gz can't be read"),
        ({"source": "text:{}/cut.gz"}, r"cut\.gz can't be read"),
        ({"source": "text:{}/cut.zst"}, r"cut\.zst can't be read"),
        ({"source": "parquet:{}/short.txt"}, "can't be read as parquet"),
        ({"source": "tokens:{}/odd.bin"}, "can't be ids of 2 or 4 bytes"),
        ({"source": "tfds:no_such_set"}, "neither a data set of TFDS"),
    ],
)
def test_each_mistake_is_one_line(tmp_path, settings, match):
    (tmp_path / "short.txt").write_text("twenty characters ok")
    (tmp_path / "blank.txt").write_text("  \n")
    (tmp_path / "texts.jsonl").write_text('{"text": "twenty characters ok"}\n' * 9)
    (tmp_path / "broken.gz").write_text("no gzip")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(os.urandom(9999))[:-99])
    (tmp_path / "cut.zst").write_bytes(zstandard.compress(os.urandom(9999))[:-99])
    (tmp_path / "odd.bin").write_bytes(b"abc")
    filled = {k: v.format(tmp_path) if isinstance(v, str) else v for k, v in settings.items()}
    refused(tmp_path, match, **filled)


@pytest.mark.parametrize("spec", ["text:{}", "jsonl:{}", "parquet:{}", "tokens:{}"])
def test_files_that_can_hold_objects_are_read_as_what_they_are_not_and_run_nothing(tmp_path, spec):
    """A pickle that would make a file, alone and as NumPy's array of objects."""
    pickled = f"cos\nsystem\n(S'touch {tmp_path}/done'\ntR.".encode()
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickled
    for name, content in ("a.pkl", b"\x80\x04" + pickled), ("a.npy", array):
        (tmp_path / name).write_bytes(content + b"\0" * (len(content) % 2))
        refused(tmp_path, name, source=spec.format(tmp_path / name), tokenizer="byte")
    assert not (tmp_path / "done").exists()


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    refused(tmp_path, "can't be read by this user", source=f"text:{tmp_path}/a.txt")


def test_the_hub_is_read_from_its_parquet_files_with_their_splits(tmp_path, monkeypatch):
    import huggingface_hub
    import pyarrow as pa
    from pyarrow import parquet

    for name, stories in (("train-0", STORIES[:2]), ("validation-0", STORIES[2:])):
        (tmp_path / "hub/data").mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.table({"text": stories}), tmp_path / f"hub/data/{name}.parquet")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(tmp_path / "hub")
    )
    data = open_data(
        config_of(tmp_path, source="hf:org/name", valid_fraction=0.5), seed=0, progress=False
    )
    assert data.valid_tokens == len(STORIES[2].encode()) + 1


def test_only_the_writer_fetches_and_a_store_is_opened_without_fetching_again(
    tmp_path, monkeypatch
):
    import huggingface_hub
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "hub").mkdir()
    parquet.write_table(pa.table({"text": STORIES}), tmp_path / "hub/0.parquet")
    fetches = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: fetches.append(k) or tmp_path / "hub"
    )
    config = config_of(tmp_path, source="hf:org/name@v2", tokenizer="char")
    with pytest.raises(UserError, match="waited 0 s for another process to prepare"):
        open_data(config, seed=0, is_writer=False, wait_secs=0, progress=False)
    assert not fetches
    made = open_data(config, seed=0, progress=False)
    assert [fetch["revision"] for fetch in fetches] == ["v2"]
    assert (
        open_data(config, seed=0, is_writer=False, wait_secs=0, progress=False).stores[0].folder
        == made.stores[0].folder
    )
    assert len(fetches) == 1


def test_test_data_of_the_hub_is_not_trained_on(tmp_path, monkeypatch):
    files = [pathlib.Path(f"{name}-0.parquet") for name in ("test", "train", "validation")]
    source = make_source("hf:org/name", DataConfig())
    source._files = files
    monkeypatch.setattr(base.FileSource, "documents", None)
    monkeypatch.setattr(records.ParquetSource, "read", lambda self, path: [path])
    assert list(source.read_split("train")) == ["train-0.parquet"]
    assert list(source.read_split("valid")) == ["validation-0.parquet"]


def test_a_tfds_data_set_by_name_is_not_prepared_by_those_who_wait(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds, "builder", lambda *args, **kwargs: pytest.fail("prepared"))
    with pytest.raises(UserError, match="waited 0 s for another process to prepare"):
        config = config_of(tmp_path, source="tfds:tiny_shakespeare", tokenizer="char")
        open_data(config, seed=0, is_writer=False, wait_secs=0, progress=False)


def test_pairs_after_plain_texts_keep_their_prompts_in_tfds(tmp_path):
    from tinylm.data.tfds_builder import write_tfds

    rows = [{"text": "abc"}, {"prompt": "de", "completion": "f"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = write_tfds(
        config_of(tmp_path, source=f"jsonl:{tmp_path}/a.jsonl"), str(tmp_path / "t"), "my_pairs"
    )
    assert texts_of(f"tfds:{folder}", "train") == ["abc", ("de", "f")]


@pytest.mark.parametrize("place", ["file", "full"])
def test_a_tfds_data_set_that_cannot_be_written_is_one_line(tmp_path, place):
    from tinylm.data.tfds_builder import write_tfds

    (tmp_path / "file").write_text("kept")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limit[1]))
    try:
        with pytest.raises(StorageError, match=r"1\.0\.0 can't be written: ") as error:
            write_tfds(config_of(tmp_path, source="tales:500"), str(tmp_path / place), "my_text")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "\n" not in str(error.value) and (tmp_path / "file").read_text() == "kept"


def test_ready_ids_show_how_far_they_are(tmp_path, monkeypatch):
    seen = []

    class Bar:
        disable = False

        def __init__(self, **settings):
            seen.append(settings["total"])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            seen.append(count)

    monkeypatch.setattr("tqdm.tqdm", Bar)
    np.arange(200, dtype=np.uint16).tofile(tmp_path / "a.bin")
    open_data(config_of(tmp_path, source=f"tokens:{tmp_path}/a.bin"), seed=0)
    assert seen[:2] == [400, 400], "one bar for the checksum"
    assert seen[2] == sum(seen[3:]) == 800


def test_the_hub_without_a_network_says_how_to_use_a_local_copy(tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(tmp_path, r"could not be fetched.*parquet:DIR", source="hf:org/name")


@pytest.mark.parametrize("source", ["tales:40", "addition:5", "text"])
def test_a_written_tfds_data_set_gives_the_tokens_of_its_source(
    tmp_path, monkeypatch, capsys, source
):
    monkeypatch.setattr(made, "VALID_TALES", 30)
    from tinylm.data.tfds_builder import write_tfds

    if source == "text":
        (tmp_path / "a.txt").write_text(
            "<|endoftext|>".join(f"{i} {story}" for i, story in enumerate(STORIES * 9))
        )
        source = f"text:{tmp_path}/a.txt"
    config = config_of(tmp_path, source=source)
    folder = write_tfds(config, str(tmp_path / "tfds"), "my_text", "1.2.3")
    assert folder.name == "1.2.3" and list(folder.glob("*.array_record*"))
    assert capsys.readouterr().out == ""
    with pytest.raises(UserError, match=r"1\.2\.3 is there already; remove it"):
        write_tfds(
            config_of(tmp_path, source="addition:4"), str(tmp_path / "tfds"), "my_text", "1.2.3"
        )
    again = open_data(config_of(tmp_path, source=f"tfds:{folder}"), seed=0, progress=False)
    direct = open_data(config, seed=0, progress=False)
    by_name = config_of(tmp_path, source="tfds:my_text", tfds_data_dir=str(tmp_path / "tfds"))
    assert texts_of(f"tfds:{folder}", "train") == texts_of(
        "tfds:my_text", "train", tfds_data_dir=by_name.tfds_data_dir
    )
    for data in (again, direct):
        data.ids = np.empty(manifest(data).tokens, np.int32)
        data.stores[0].tokens.read(data.ids, 0)
    assert np.array_equal(again.ids, direct.ids)
    assert manifest(again).splits["train"].tokens == manifest(direct).splits["train"].tokens
    assert "tensorflow" not in sys.modules


@pytest.mark.slow
def test_the_stock_tiny_shakespeare_builder_works_offline(tmp_path):
    pytest.importorskip("tensorflow", reason="preparing a stock TFDS data set needs the tfds extra")
    program = (
        "import sys; from tinylm.data import open_data; from tinylm.data.config import DataConfig\n"
        "d = open_data(DataConfig(source='tfds:tiny_shakespeare', tokenizer='char', "
        "store_dir=sys.argv[1] + '/s',"
        " tfds_data_dir=sys.argv[1] + '/t', tfds_manual_dir=sys.argv[2]), seed=0, progress=False)\n"
        "print(d.vocab_size, [s.tokens for s in d.stores[0].manifest.splits.values()])"
    )
    command = [sys.executable, "-c", program, str(tmp_path), str(real("tinyshakespeare"))]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "66 [(0, 1003855), (1003855, 1059626)]"


def test_the_data_room_needs_neither_jax_nor_its_heavy_libraries_to_open(tmp_path):
    program = (
        "import sys; from tinylm.data import open_data; from tinylm.data.config import DataConfig\n"
        "open_data(DataConfig(source='tales:50', tokenizer='char', store_dir=sys.argv[1]), "
        "seed=0, progress=False)\n"
        "heavy = ('jax', 'grain', 'tensorflow_datasets', 'pyarrow', 'tiktoken', 'tokenizers')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("a/validation-00000.parquet", "validation"),
        ("a/valid/0.parquet", "valid"),
        ("a/test_1.parquet", "test"),
        ("a/dev.parquet", "dev"),
        ("a/train-00000.parquet", ""),
        ("a/testimonials.parquet", ""),
        ("a/values-0.parquet", ""),
    ],
)
def test_records_name_splits_as_data_sets_do(path, split):
    assert hub.held_out_split(pathlib.Path(path)) == split


def test_an_edited_tokenizer_file_makes_another_store(tmp_path):
    """The same spec, another content: the store that the old file made is not taken for the new
    one.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    (tmp_path / "a.txt").write_text("once upon a time " * 9)
    sizes = []
    for extra in (["once"], ["once", "upon", "was"]):
        vocab = {piece: i for i, piece in enumerate(["<unk>", "<|endoftext|>", *extra])}
        tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        config = DataConfig(
            source=f"text:{tmp_path}/a.txt",
            tokenizer=f"hf:{tmp_path}/tokenizer.json",
            seq_len=8,
            batch_size=1,
            store_dir=str(tmp_path / "stores"),
        )
        sizes.append(open_data(config, seed=0, progress=False).vocab_size)
    assert sizes[0] < sizes[1]


def test_a_store_dir_that_cannot_hold_a_lock_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(StorageError, match=r"Permission denied.*set data\.store_dir"):
        make(tmp_path / "x", pathlib.Path.exists, print)
