"""Starts that meet in one workdir: one alone trains there, and the others leave its files as they are."""

import os
import shutil

import pytest

from tinylm.config import load_config
from tinylm.core.errors import StorageError, UserError
from tinylm.run.folder import RunFolder
from tinylm.run.lock import WorkdirLock
from tinylm.run.open_run import open_run
from tinylm.train import start

SMALL = [
    "data.source=tales:200", "data.tokenizer=byte", "data.seq_len=16", "data.batch_size=8", "model.embed_dim=16",
    "model.num_layers=1", "train.num_steps=2", "eval.every_steps=0", "sample.max_tokens=0", "writers.plot=False",
    "mesh.data=1",
]  # fmt: skip


def begin(workdir, *overrides):
    return start.start_run(load_config("tales", [*SMALL, *overrides]), str(workdir))


def content(workdir):
    files = (path for path in workdir.rglob("*") if path.is_file() and path.name != "lock.json")
    return {path.name: path.read_bytes() for path in files}


def test_a_start_that_comes_second_changes_nothing(tmp_path, monkeypatch):
    first, open_data = [], start.open_data

    def while_the_second_prepares(*arguments, **kwargs):
        monkeypatch.setattr(start, "open_data", open_data)
        first.append(begin(tmp_path))
        return open_data(*arguments, **kwargs)

    monkeypatch.setattr(start, "open_data", while_the_second_prepares)
    with pytest.raises(UserError, match="is in use by process"):
        begin(tmp_path, "data.tokenizer=char", "model.embed_dim=32")
    there = content(tmp_path)
    assert b'"embed_dim": 16' in there["config.json"]
    with pytest.raises(UserError, match="is in use by process"):
        begin(tmp_path, "checkpoint.keep=7")
    assert content(tmp_path) == there
    assert first[0].run().step == 2
    begin(tmp_path, "checkpoint.keep=7").run()
    assert b'"keep": 7' in content(tmp_path)["config.json"]


def test_an_evaluation_reads_as_many_rows_whatever_the_micro_batches(tmp_path):
    losses = []
    for count in (1, 4):
        many = f"train.accumulation_steps={count}"
        trainer = begin(tmp_path / many, many, "eval.every_steps=2", "eval.max_batches=1")
        trainer.run()
        losses.append(trainer.valid_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_same_text_in_another_place_goes_on_and_another_text_does_not(tmp_path):
    """As after cp, scp, git checkout or on a fresh host: what counts is the content."""
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(f"{i} and {i * i}" for i in range(200)))
    tokenizer = "data.tokenizer=bpe:300"
    run = tmp_path / "run"
    begin(run, f"data.source=text:{tmp_path}/a.txt", tokenizer).lock.close()
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "a.txt", tmp_path / "elsewhere" / "b.txt")
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    begin(run, f"data.source=text:{tmp_path}/a.txt", tokenizer).lock.close()
    moved = f"data.source=text:{tmp_path}/elsewhere/b.txt"
    begin(run, moved, tokenizer).lock.close()
    assert RunFolder(str(run)).read_config()["config"]["data"]["source"] == f"text:{tmp_path}/elsewhere/b.txt"
    with pytest.raises(UserError, match=r"holds another run, which differs in data\.separator"):
        begin(run, moved, tokenizer, "data.separator=|")
    with pytest.raises(UserError, match=r"holds another run, which differs in data\.source"):
        begin(run, "data.source=tales:30", tokenizer)
    # The same tokenizer and as many tokens, but in another order.
    parts = (tmp_path / "a.txt").read_text().split("<|endoftext|>")
    (tmp_path / "elsewhere" / "b.txt").write_text("<|endoftext|>".join([*parts[1:3], parts[0], *parts[3:]]))
    with pytest.raises(UserError, match=r"text:.*/b\.txt doesn't give the tokens .* its content changed since"):
        begin(run, moved, tokenizer)


def test_checkpoints_on_scratch_storage_are_found_by_all_that_read_them(tmp_path):
    scratch, run = tmp_path / "scratch", tmp_path / "run"
    place = f"checkpoint.dir={scratch}"
    assert begin(run, place, "train.stop_step=1").run().step == 1
    assert not (run / "checkpoints").exists()
    (folder,) = scratch.iterdir()
    assert folder.name.startswith("run-") and (folder / "1" / "checksums").exists()
    again = begin(run, place)
    assert again.restore_or_init().step == 1
    again.lock.close()
    assert open_run(str(run)).step == 1
    other = begin(tmp_path / "other", place, f"train.init_from={run}", "train.stop_step=1")
    assert other.run().step == 1
    assert len(list(scratch.iterdir())) == 2, "each run has a folder of its own"
    with pytest.raises(UserError, match=r"are in .*/scratch/run-.*; move this folder to .*/run/checkpoints, or set"):
        begin(run)
    shutil.move(folder, run / "checkpoints")
    begin(run).lock.close()
    assert "checkpoints" not in RunFolder(str(run)).read_config()
    assert open_run(str(run)).step == 1


def test_a_run_that_noted_its_stores_by_time_and_place_goes_on(tmp_path):
    begin(tmp_path).lock.close()
    folder = RunFolder(str(tmp_path))
    record = folder.read_config()
    record["stores"] = dict.fromkeys(record.pop("token_stores"), "0" * 64)
    folder.write_config(record)
    begin(tmp_path).lock.close()
    assert folder.read_config()["token_stores"]


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["data.source=tales:200"], "eval.exact_match needs validation pairs"),
        (["data.source=addition:10", "eval.answer_pattern=####"], "eval.answer_pattern=#### finds nothing"),
        (
            ["data.source=addition:300", "data.seq_len=8", "eval.exact_match=9000"],
            "eval.exact_match: a prompt of 9 tokens",
        ),
        (["eval.answer_pattern=["], r"eval.answer_pattern=\[ must be a regular expression"),
    ],
)
def test_answers_that_could_not_be_counted_are_refused_before_anything_is_written(tmp_path, overrides, wanted):
    with pytest.raises(UserError, match=wanted):
        begin(tmp_path / "run", "eval.exact_match=5", "eval.every_steps=1", *overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails", ["check_same_stores", "store_digests", "make_blueprint", "Trainer"])
def test_a_start_that_fails_gives_the_workdir_free(tmp_path, monkeypatch, fails):
    begin(tmp_path).lock.close()
    with monkeypatch.context() as patched, pytest.raises(StorageError, match="it fails"):
        patched.setattr(start, fails, lambda *_: (_ for _ in ()).throw(StorageError("it fails")))
        begin(tmp_path)
    WorkdirLock(RunFolder(str(tmp_path)).path).release()
