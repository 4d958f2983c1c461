"""The files of a run: metrics after a crash, which checkpoints stay, what --step means."""

import json
import shutil

import jax
import pytest
from etils import epath
from helpers import small_state

from tinylm.core.errors import StorageError, UserError
from tinylm.core.settings import to_dict
from tinylm.run.checkpoint import CheckpointConfig, Checkpoints
from tinylm.run.folder import RunFolder
from tinylm.run.open_run import open_run
from tinylm.train.clock import Clock
from tinylm.train.config import Config
from tinylm.view.history import gather


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


@pytest.mark.parametrize("step", ["1e400", "1" + 400 * "0", "null", '"1"', "1.5", "[1]"])
def test_a_line_with_a_step_that_none_can_be_is_passed_over(tmp_path, step):
    folder = RunFolder(str(tmp_path))
    line = f'{{"step": {step}, "split": "train", "loss": 1.0}}\n'
    folder.metrics_file.write_text(
        line + '{"step": 2, "split": "train", "loss": 1' + 400 * "0" + "}"
    )
    assert folder.metrics() == [{"step": 2, "split": "train"}]


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
    for content in b"{", b"\xff", b"[" * 100_000:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"config.json is not JSON") as caught:
            RunFolder(str(tmp_path)).read_config()
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"config.json holds no run \(no config.json\)"):
        RunFolder(str(tmp_path / "config.json")).read_config()
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    with pytest.raises(StorageError, match=r"config.json cannot be read: Is a directory"):
        RunFolder(str(tmp_path)).read_config()


def config_record():
    config = Config()
    config = config.resolve(257)
    return {"config": to_dict(config), "versions": {"mesh": {"data": 1, "model": 1}}}


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ((), []),
        ((), {}),
        (("versions",), 5),
        (("token_stores",), []),
        (("checkpoints",), 5),
        (("start_id",), "x"),
        (("config", "model"), None),
        (("config", "seed"), "0"),
        (("config", "data", "seq_len"), None),
        (("config", "sample", "prompts"), "x"),
    ],
)
def test_a_config_that_lacks_what_is_read_of_it_is_one_line(tmp_path, keys, value):
    folder, record = RunFolder(str(tmp_path)), config_record()
    folder.write_config(record)
    assert folder.read_config() == json.loads(json.dumps(record))
    place = record
    for key in keys[:-1]:
        place = place[key]
    if keys:
        place[keys[-1]] = value
    folder.write_config(record if keys else value)
    with pytest.raises(UserError, match=f"^{folder.config_file} lacks what a run's has"):
        folder.read_config()


def started(workdir, scratch, steps=("1",)):
    """Start a run with checkpoints on scratch storage; return its folder and that of these."""
    folder = RunFolder(str(workdir))
    folder.create()
    folder.checkpoints = epath.Path(folder.place_checkpoints(str(scratch)))
    folder.write_config({**config_record(), **folder.checkpoints_note})
    for step in steps:
        (folder.checkpoints / step).mkdir()
    return RunFolder(str(workdir)), folder.checkpoints


def test_a_run_whose_scratch_storage_is_gone_does_not_begin_again(tmp_path):
    folder, place = started(tmp_path / "run", tmp_path / "scratch", steps=())
    assert folder.place_checkpoints(str(tmp_path / "scratch")) == str(place)
    shutil.rmtree(tmp_path / "scratch")
    with pytest.raises(UserError, match=r"were in .*/scratch/run-.*, which is gone or not mounted"):
        folder.place_checkpoints(str(tmp_path / "scratch"))


def test_a_new_run_takes_no_checkpoints_of_an_earlier_one(tmp_path):
    folder, place = started(tmp_path / "run", tmp_path / "scratch")
    folder.config_file.unlink()
    with pytest.raises(
        UserError,
        match=f"{place} holds checkpoints of a run that was in --workdir={folder.path} bef",
    ):
        RunFolder(str(folder.path)).place_checkpoints(str(tmp_path / "scratch"))


def test_a_moved_run_keeps_its_checkpoints_and_a_copy_does_not_take_them(tmp_path):
    folder, place = started(tmp_path / "run", tmp_path / "scratch")
    shutil.copytree(folder.path, tmp_path / "copy")
    copy = RunFolder(str(tmp_path / "copy"))
    assert copy.checkpoints == place, "tools may read them"
    with pytest.raises(
        UserError, match=r"copy is a copy of the run in .*/run, which still uses the checkpoints in"
    ):
        copy.place_checkpoints(str(tmp_path / "scratch"))
    shutil.rmtree(folder.path)
    assert copy.place_checkpoints(str(tmp_path / "scratch")) == str(place)
    assert copy.place_checkpoints(str(tmp_path / "scratch")) == str(place)


def test_checkpoints_that_were_moved_to_other_storage_are_taken(tmp_path):
    folder, place = started(tmp_path / "run", tmp_path / "scratch")
    with pytest.raises(UserError, match=r"move this folder to .*/new/run-"):
        folder.place_checkpoints(str(tmp_path / "new"))
    (tmp_path / "new").mkdir()
    shutil.move(place, tmp_path / "new" / place.name)
    assert folder.place_checkpoints(str(tmp_path / "new")) == str(tmp_path / "new" / place.name)


def test_the_address_of_a_bucket_that_lost_a_slash_is_not_a_folder_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match="--workdir=gs:/b/run must be gs://b/run for a bucket, or a folder on a disk",
    ):
        RunFolder("gs:/b/run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ({"embed_dim": "wide"}, "config.json: model.embed_dim='wide' must be a whole number"),
        ({"norm_epsilon": None}, "config.json: model.norm_epsilon=None must be a number"),
        (
            {"attention_window": "0"},
            "config.json: model.attention_window='0' must be a whole number",
        ),
        ({"num_layers": -1}, "model.num_layers=-1 must be at least 1"),
        ({"embed_dim": 64}, r"step 2 in .*/checkpoints doesn't hold what config.json says"),
        ({"bias": True}, r"step 2 in .*/checkpoints doesn't hold what config.json says"),
    ],
)
def test_a_model_that_the_config_does_not_describe_is_one_line(tmp_path, setting, wanted):
    folder = RunFolder(str(tmp_path))
    checkpoints = Checkpoints(folder.checkpoints, CheckpointConfig())
    checkpoints.save(small_state(2), None)
    checkpoints.close()
    record = config_record()
    record["config"]["model"].update(setting)
    folder.write_config(record)
    with pytest.raises(UserError, match=wanted) as caught:
        open_run(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_lines_and_samples_that_no_run_wrote_are_passed_over(tmp_path):
    folder = RunFolder(str(tmp_path))
    folder.write_config(config_record())
    good = [
        b'{"step": 1, "split": "train", "loss": 2.0, "note": "a", "unix_secs": null, "mfu": 1e999}',
        b'{"step": 2, "split": "time"}',
    ]
    bad = [
        b"5",
        b"[]",
        b"null",
        b'{"step": "x", "split": "train"}',
        b'{"step": 1, "split": []}',
        b"\xff",
        b"\0" * 4,
        b"[" * 100_000,
    ]
    folder.metrics_file.write_bytes(b"\n".join([*bad, *good, *bad, b""]))
    folder.samples_file.write_bytes(b"--- step 1 ---\n\xff\n--- step " + b"1" * 5000 + b" ---\n")
    assert folder.metrics() == [
        {"step": 1, "split": "train", "loss": 2.0},
        {"step": 2, "split": "time"},
    ]
    run = gather(str(tmp_path))
    assert (run.train["loss"], run.samples[0].texts[0][0]) == (
        [2.0],
        "\N{REPLACEMENT CHARACTER}",
    )
    assert "Goodput" in Clock(folder).summary(1)


def test_the_latest_and_the_best_stay(tmp_path):
    folder = RunFolder(str(tmp_path)).checkpoints
    nan = float("nan")
    begun = ((0, nan), (1, 3.0), (2, 1.0), (3, 2.0))
    resumed = ((4, nan), (5, 4.0))
    for part in begun, resumed:
        checkpoints = Checkpoints(folder, CheckpointConfig(keep=2))
        for step, loss in part:
            checkpoints.save(small_state(step), loss)
        checkpoints.close()
    opened = Checkpoints(folder)
    assert opened.steps() == [2, 4, 5]
    assert (opened.find("best"), opened.find("latest"), opened.find("4")) == (2, 5, 4)
    for step in "3", "²", "-4", "":
        with pytest.raises(
            UserError, match=f"--step={step} must be best, latest or one of 2, 4, 5"
        ):
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
    # What the disk took of a line.
    folder.metrics_file.write_bytes(folder.metrics_file.read_bytes() + b'{"step": 2, "spl')
    folder.log({"step": 4, "split": "train", "loss": 2.0})
    folder.flush()
    assert [line["step"] for line in folder.lines()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "config.json", "checkpoints", "tokenizer/tokenizer.json"]
)
def test_a_link_out_of_the_folder_is_refused(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = RunFolder(str(tmp_path / "run"))
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / name).symlink_to(victim)
    for use in folder.read_config, folder.create:
        with pytest.raises(
            UserError, match=f"{name} is a link to {victim}, out of the run's folder"
        ):
            use()
    assert victim.read_text() == "mine"
    # The folder itself may be reached by a link.
    moved = tmp_path / "moved"
    moved.symlink_to(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    RunFolder(str(moved)).create()


@pytest.mark.parametrize(
    ("workdir", "directory", "setting"),
    [
        ("az://bucket/run", "", "--workdir=az://bucket/run"),
        ("gs://bucket/run", "az://bucket/checkpoints", "checkpoint.dir=az://bucket/checkpoints"),
    ],
)
def test_a_bucket_that_orbax_lacks_is_refused_before_anything_is_trained(
    workdir, directory, setting
):
    with pytest.raises(UserError, match=f"^{setting}: .* set checkpoint.dir to such a bucket"):
        RunFolder(workdir).check_checkpoint_dir(directory)


@pytest.mark.parametrize(
    ("workdir", "directory"),
    [("az://b/run", "/shared"), ("s3://b/run", ""), ("gs://b/run", ""), ("runs/a", "gs://b")],
)
def test_other_places_of_checkpoints_are_taken(workdir, directory):
    RunFolder(workdir).check_checkpoint_dir(directory)
