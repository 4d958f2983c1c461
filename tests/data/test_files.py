"""Files as users have them: folders, pipes, compression, Windows' texts, separators; and what is no
text is named.
"""

import bz2
import gzip
import json
import lzma
import os
import threading
import zipfile

import pytest
import zstandard

from tinylm.core import log
from tinylm.core.errors import UserError
from tinylm.data import open_data, prepare
from tinylm.data.config import DataConfig
from tinylm.data.sources import files, make_source

STORY = "Once upon a time there was a cat. Она спала.\n"


def documents_of(spec, split="all", **settings):
    return list(make_source(spec, DataConfig(**settings)).documents(split))


def texts_of(spec, **settings):
    return [document.text for document in documents_of(spec, **settings)]


def config_of(tmp_path, source, **settings):
    return DataConfig(
        **{"seq_len": 8, "batch_size": 1, "store_dir": str(tmp_path / "s"), "source": source}
        | settings
    )


def zstd_with_a_long_window(content):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(content) + packer.flush()


PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
    "long.zst": zstd_with_a_long_window,
}


@pytest.mark.parametrize("name", PACKERS)
def test_compressed_files_are_read_whatever_they_are_called(tmp_path, name):
    for place in (tmp_path / f"a.{name}", tmp_path / "a.txt"):
        place.write_bytes(PACKERS[name](STORY.encode()))
        assert texts_of(f"text:{place}") == [STORY]
    records = json.dumps({"text": STORY}).encode()
    (tmp_path / f"a.jsonl.{name}").write_bytes(PACKERS[name](records))
    assert texts_of(f"jsonl:{tmp_path}/a.jsonl.{name}") == [STORY]


@pytest.mark.parametrize("name", PACKERS)
def test_a_compressed_file_that_is_cut_is_one_line(tmp_path, name):
    (tmp_path / f"a.{name}").write_bytes(PACKERS[name](os.urandom(9999))[:-99])
    with pytest.raises(
        UserError, match=rf"a\.{name} can't be read after byte \d+ of its content: .*\."
    ):
        texts_of(f"text:{tmp_path}/a.{name}")


def zipped(folder):
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("a.txt", STORY)
    return (folder / "a.zip").read_bytes()


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("a zip archive", zipped),
        ("a PDF", b"%PDF-1.7\n%"),
        ("a Parquet file", b"PAR1\x15\x04\x15"),
        ("a tar archive", b"a.txt".ljust(257, b"\0") + b"ustar  \0".ljust(255, b"\0")),
        ("UTF-16 text", STORY.encode("utf-16")),
        ("UTF-32 text", STORY.encode("utf-32")),
        (
            "a tar archive",
            gzip.compress(b"a.txt".ljust(257, b"\0") + b"ustar  \0".ljust(255, b"\0")),
        ),
    ],
    # Names of their own: bytes in names hold the time, and so would differ between xdist's workers.
    ids=["zip", "pdf", "parquet", "tar", "utf-16", "utf-32", "tar in gzip"],
)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_files_of_another_kind_are_named_and_not_skipped_as_one_document(
    tmp_path, kind, content, policy
):
    (tmp_path / "a.txt").write_bytes(content(tmp_path) if callable(content) else content)
    (tmp_path / "b.txt").write_text(STORY, encoding="utf-8")
    with pytest.raises(UserError, match=rf"a\.txt is {kind}, not text in UTF-8; .*\."):
        open_data(
            config_of(tmp_path, f"text:{tmp_path}/*.txt", on_bad_text=policy),
            seed=0,
            progress=False,
        )


def test_a_folder_stands_for_its_files(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    (tmp_path / "texts/later").mkdir(parents=True)
    (tmp_path / "texts/later/b.txt").write_text("b", encoding="utf-8")
    (tmp_path / "texts/a.txt.gz").write_bytes(gzip.compress(b"a"))
    (tmp_path / "texts/about.md").write_text("about", encoding="utf-8")
    (tmp_path / "texts/.hidden.txt").write_text("hidden", encoding="utf-8")
    assert texts_of(f"text:{tmp_path}/texts") == texts_of(f"text:{tmp_path}/texts/") == ["a", "b"]
    # Spark writes a folder for each table, with notes of its own next to the parts.
    spark = tmp_path / "corpus.parquet"
    spark.mkdir()
    for name in ("_SUCCESS", "._SUCCESS.crc", ".part-00000.snappy.parquet.crc"):
        (spark / name).write_bytes(b"crc\0")
    for part in range(2):
        table = pa.table({"text": [f"part {part}"]})
        parquet.write_table(table, spark / f"part-0000{part}.snappy.parquet")
    assert (
        texts_of(f"parquet:{spark}")
        == texts_of(f"parquet:{tmp_path}/*.parquet")
        == ["part 0", "part 1"]
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=r"matches no file; set data\.source to a file, folder or glob that exists"
    ):
        texts_of(f"text:{tmp_path}/empty")


def test_a_folder_without_the_usual_endings_stands_for_all_its_files(tmp_path):
    for name in ("one", "two.story"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert texts_of(f"text:{tmp_path}") == ["one", "two.story"]


@pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
def test_a_text_from_a_pipe_is_read_as_often_as_it_is_needed(tmp_path, tokenizer):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(STORY * 20, encoding="utf-8"))
    writer.start()
    data = open_data(
        config_of(tmp_path, f"text:{pipe}", tokenizer=tokenizer), seed=0, progress=False
    )
    writer.join()
    splits = data.stores[0].manifest.splits
    assert splits["train"].bytes + splits["valid"].bytes == len((STORY * 20).encode())
    assert files.rereadable(str(pipe)).startswith(files._copies().name)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            '[{"text": "a"}, {"text": "b"}]',
            r"holds a JSON array .*jq -c '\.\[\]' .*a\.json > lines\.jsonl",
        ),
        ('[\n {"text": "a"},\n {"text": "b"}\n]\n', r"holds a JSON array .*jq -c '\.\[\]'"),
        ('\n{\n "text": "a"\n}\n', r"holds JSON over several lines .*jq -c \. "),
    ],
)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_json_that_is_not_a_record_a_line_gets_a_hint(tmp_path, content, match, policy):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=match) as error:
        open_data(
            config_of(tmp_path, f"jsonl:{tmp_path}/a.json", on_bad_text=policy),
            seed=0,
            progress=False,
        )
    assert "on_bad_text" not in str(error.value)


def test_lines_that_are_arrays_are_not_objects(tmp_path):
    (tmp_path / "a.jsonl").write_text('["a"]\n["b"]\n', encoding="utf-8")
    problems = [document.problem for document in documents_of(f"jsonl:{tmp_path}/a.jsonl")]
    assert len(problems) == 2 and "line 1, at byte 0, is not a JSON object" in problems[0]


def test_a_long_number_in_an_unwanted_field_does_not_matter(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a", "key": %s}\n' % ("7" * 5_000), encoding="utf-8"
    )
    assert texts_of(f"jsonl:{tmp_path}/a.jsonl") == ["a"]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    mark = "\ufeff"
    (tmp_path / "a.txt").write_text(f"{mark}one<|endoftext|>{mark}two", encoding="utf-8")
    assert texts_of(f"text:{tmp_path}/a.txt") == ["one", "two"]
    (tmp_path / "a.jsonl").write_text(mark + json.dumps({"text": f"{mark}one"}), encoding="utf-8")
    assert texts_of(f"jsonl:{tmp_path}/a.jsonl") == ["one"]
    (tmp_path / "b.txt").write_text(mark, encoding="utf-8")
    assert "is an empty document" in documents_of(f"text:{tmp_path}/b.txt")[0].problem


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 20])
def test_windows_line_ends_are_kept_or_turned_to_unix(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(files, "_CHUNK_BYTES", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n\r\n\r\nthree\r\n\r\nfour\rfive\r\n")
    paragraphs = {"separator": r"\n\n"}
    assert texts_of(f"text:{path}", **paragraphs) == [path.read_bytes().decode()]
    assert texts_of(f"text:{path}", line_ends="unix", **paragraphs) == [
        "one\ntwo",
        "three",
        "four\nfive",
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a\r\nb"}), encoding="utf-8")
    assert texts_of(f"jsonl:{tmp_path}/a.jsonl", line_ends="unix") == ["a\nb"]


def test_whitespace_around_the_separator_belongs_to_it_unless_it_is_kept(tmp_path):
    path = tmp_path / "stories.txt"
    content = "\n\u3000Once.\nThe end.\n<|endoftext|>\n Twice.\n<|endoftext|>\n"
    path.write_text(content, encoding="utf-8")
    assert texts_of(f"text:{path}") == ["\u3000Once.\nThe end.", "Twice."]
    kept = texts_of(f"text:{path}", separator_space="keep")
    assert kept == ["\n\u3000Once.\nThe end.\n", "\n Twice.\n"]
    path.write_text("\nA text that is not cut keeps its ends.\n", encoding="utf-8")
    assert texts_of(f"text:{path}") == ["\nA text that is not cut keeps its ends.\n"]
    path.write_text("a<|endoftext|>\n<|endoftext|>b", encoding="utf-8")
    assert "at byte 14 is an empty document" in documents_of(f"text:{path}")[1].problem


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"\n", "\n"),
        (r"\n\n", "\n\n"),
        (r"\t", "\t"),
        (r"\\n", r"\n"),
        ("\n", "\n"),
        (r"\d", r"\d"),
    ],
)
def test_a_separator_from_a_shell_may_be_a_line_break(tmp_path, typed, meant):
    (tmp_path / "a.txt").write_text(f"one{meant}two", encoding="utf-8")
    assert texts_of(f"text:{tmp_path}/a.txt", separator=typed) == ["one", "two"]


def test_any_number_of_separators_of_whitespace_is_one(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n\n\n\ntwo\n\n \n\nthree\n\n", encoding="utf-8")
    assert texts_of(f"text:{tmp_path}/a.txt", separator=r"\n\n") == ["one", "two", "three"]


def test_lower_case_and_its_floor(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Á?", "completion": "Yes İ"}', encoding="utf-8")
    document = documents_of(f"jsonl:{tmp_path}/a.jsonl", lowercase=True)[0]
    assert (document.prompt, document.text) == ("á?", "yes i̇")
    tales = documents_of("tales:5", "train", lowercase=True)
    assert all(tale.text == tale.text.lower() and tale.log_prob is None for tale in tales)
    plain, lower = (make_source("text:x", DataConfig(lowercase=on)) for on in (False, True))
    plain.files = lower.files = []
    assert plain.identity() != lower.identity()


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(prepare, "say", lines.append)
    return lines


def test_a_separator_that_never_occurs_and_kept_line_ends_are_said(tmp_path, told):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_bytes(b"a line\r\n\r\nand another\r\n" * 9)
    open_data(config_of(tmp_path, f"text:{tmp_path}/*.txt", separator=r"\n\n"), seed=0)
    assert any(
        r"data.separator='\n\n' does not occur in it: each of its 2 files is one document" in t
        for t in told
    )
    assert any("matches Windows' line ends only with data.line_ends=unix" in line for line in told)
    assert any(r"it has Windows' line ends (\r\n), which are kept" in line for line in told)
    told.clear()
    open_data(
        config_of(tmp_path, f"text:{tmp_path}/*.txt", separator=r"\n\n", line_ends="unix"), seed=0
    )
    assert not any("data.separator" in line or "Windows'" in line for line in told)


def test_what_was_skipped_is_told_with_its_place_and_the_rest_is_listed(tmp_path, told):
    lines = [json.dumps({"text": "a good line"}), *["{"] * 12]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = config_of(tmp_path, f"jsonl:{tmp_path}/a.jsonl", on_bad_text="skip", valid_fraction=0)
    data = open_data(config, seed=0)
    assert "skipped 12 documents (data.on_bad_text=skip):" in told
    places = [line for line in told if line.startswith(f"  {tmp_path}/a.jsonl, line ")]
    assert len(places) == 10 and "line 2, at byte 24, is not JSON" in places[0]
    listed = data.stores[0].folder / prepare.SKIPPED
    assert f"  all of them are in {listed}" in told
    assert len(listed.read_text(encoding="utf-8").splitlines()) == 12


def test_a_wrong_name_of_a_field_suggests_the_field_and_not_to_skip_everything(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a good line", "n": 1}', encoding="utf-8")
    for settings in ({}, {"text_field": "n"}):
        config = config_of(tmp_path, f"jsonl:{tmp_path}/a.jsonl", **settings)
        with pytest.raises(UserError, match=r"set data\.text_field") as error:
            open_data(config, seed=0, progress=False)
        assert "on_bad_text" not in str(error.value)


def test_long_work_says_that_it_lives_and_short_work_nothing(monkeypatch):
    lines = []
    heard = threading.Event()
    monkeypatch.setattr(log, "say", lambda line: (lines.append(line), heard.set()))
    with log.alive(lambda: "learning", after_secs=60):
        pass
    assert not lines
    with log.alive(lambda: "learning", after_secs=0.01):
        assert heard.wait(30)
    assert lines[0].startswith("learning ... ")
