"""The files of a run: metrics after a crash, which checkpoints stay, what --step means."""

import json

import jax
import pytest
from helpers import small_state

from tinylm.core.errors import StorageError, UserError
from tinylm.run.checkpoint import CheckpointConfig, Checkpoints
from tinylm.run.folder import RunFolder


def test_a_torn_last_line_is_cut_off(tmp_path):
    folder = RunFolder(str(tmp_path))
    folder.log({"step": 1, "split": "train", "loss": 2.0})
    folder.metrics_file.write_bytes(folder.metrics_file.read_bytes() + b'{"step": 2, "lo')
    RunFolder(str(tmp_path)).log({"step": 2, "split": "train", "loss": float("nan")})
    lines = [json.loads(line) for line in folder.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["loss"] is None


def test_a_step_logged_twice_counts_by_its_last_line(tmp_path):
    folder = RunFolder(str(tmp_path))
    for loss in (3.0, 2.0):
        folder.log({"step": 1, "split": "train", "loss": loss})
    folder.log({"step": 1, "split": "valid", "loss": 5.0})
    assert [line["loss"] for line in folder.metrics()] == [2.0, 5.0]


@pytest.mark.parametrize("name", ["a*b", "a?b", "a[1]", "a[1]/b"])
def test_a_name_that_stands_for_others_is_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"/a.* must be free of \* \? and \["):
        RunFolder(f"{tmp_path}/{name}")


def test_home_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(RunFolder("~/run").path) == f"{tmp_path}/run"
    assert str(RunFolder("gs://bucket/~/run").path) == "gs://bucket/~/run"


def test_a_config_that_is_missing_or_broken_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        RunFolder(str(tmp_path)).read_config()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        RunFolder(str(tmp_path)).read_config()


def test_the_latest_and_the_best_stay(tmp_path):
    folder = RunFolder(str(tmp_path)).checkpoints
    nan = float("nan")
    for part in (((0, nan), (1, 3.0), (2, 1.0), (3, 2.0)), ((4, nan), (5, 4.0))):  # a run and its resumption
        checkpoints = Checkpoints(folder, CheckpointConfig(keep=2))
        for step, loss in part:
            checkpoints.save(small_state(step), loss)
        checkpoints.close()
    opened = Checkpoints(folder)
    assert opened.steps() == [2, 4, 5]
    assert (opened.find("best"), opened.find("latest"), opened.find("4")) == (2, 5, 4)
    for step in "3", "²", "-4", "":
        with pytest.raises(UserError, match=f"--step={step} must be best, latest or one of 2, 4, 5"):
            opened.find(step)
    restored = opened.restore(2, jax.eval_shape(lambda: small_state(0)))
    assert (int(restored.step), restored.params["w"].tolist()) == (2, [2.0] * 4)


def test_lines_that_a_full_disk_refuses_are_written_later(tmp_path, monkeypatch):
    folder = RunFolder(str(tmp_path))
    folder.log({"step": 1, "split": "train", "loss": 2.0})
    full = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(type(folder.metrics_file), "open", full)
        for step in 2, 3:
            folder.log({"step": step, "split": "train", "loss": 2.0})
        with pytest.raises(StorageError, match="cannot be written, its last lines are lost"):
            folder.flush()
    folder.metrics_file.write_bytes(folder.metrics_file.read_bytes() + b'{"step": 2, "spl')  # what the disk took of it
    folder.log({"step": 4, "split": "train", "loss": 2.0})
    folder.flush()
    assert [line["step"] for line in folder.lines()] == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "checkpoints", "tokenizer/tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = RunFolder(str(tmp_path / "run"))
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / name).symlink_to(victim)
    for use in folder.read_config, folder.create:
        with pytest.raises(UserError, match=f"{name} is a link to {victim}, out of the run's folder"):
            use()
    assert victim.read_text() == "mine"
    moved = tmp_path / "moved"
    moved.symlink_to(tmp_path / "run")  # the folder itself may be reached by a link
    (tmp_path / "run" / name).unlink()
    RunFolder(str(moved)).create()
