"""Starts that meet in one workdir: one alone trains there, and the others leave its files as they
are.
"""

import fcntl
import json
import os
import shutil
import socket

import pytest
from helpers import call_command, lines, state_digest

from tinylm import generate
from tinylm.config import Config, ModelConfig, load_config
from tinylm.core.errors import StorageError, UserError
from tinylm.core.settings import to_dict
from tinylm.run.folder import RunFolder
from tinylm.run.lock import WorkdirLock
from tinylm.run.open_run import open_run
from tinylm.train import start

SMALL = [
    "data.source=tales:200",
    "data.tokenizer=byte",
    "data.seq_len=16",
    "data.batch_size=8",
    "model.embed_dim=16",
    "model.num_layers=1",
    "train.num_steps=2",
    "eval.every_steps=0",
    "sample.max_tokens=0",
    "writers.plot=False",
    "mesh.data=1",
]


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
        losses.append(trainer.run().valid_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_step_is_compiled_while_the_state_is_drawn(tmp_path, monkeypatch):
    trainer = begin(tmp_path)
    restore_or_init = trainer.restore_or_init
    compiled_before = []

    def after_the_program():
        compiled_before.append(trainer.program.result(timeout=60))
        return restore_or_init()

    monkeypatch.setattr(trainer, "restore_or_init", after_the_program)
    assert trainer.run().step == 2
    assert compiled_before

    # A run that has taken its steps has nothing to compile.
    again = begin(tmp_path)
    again.run()
    assert again.program is None


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
    assert (
        RunFolder(str(run)).read_config()["config"]["data"]["source"]
        == f"text:{tmp_path}/elsewhere/b.txt"
    )
    with pytest.raises(UserError, match=r"holds another run, which differs in data\.separator"):
        begin(run, moved, tokenizer, "data.separator=|")
    with pytest.raises(UserError, match=r"holds another run, which differs in data\.source"):
        begin(run, "data.source=tales:30", tokenizer)
    # The same tokenizer and as many tokens, but in another order.
    parts = (tmp_path / "a.txt").read_text().split("<|endoftext|>")
    (tmp_path / "elsewhere" / "b.txt").write_text(
        "<|endoftext|>".join([*parts[1:3], parts[0], *parts[3:]])
    )
    with pytest.raises(
        UserError, match=r"text:.*/b\.txt doesn't give the tokens .* its content changed since"
    ):
        begin(run, moved, tokenizer)


def test_cleaning_removes_the_stores_that_no_run_refers_to(tmp_path):
    stores = tmp_path / "stores"
    place = f"data.store_dir={stores}"
    folders = {}
    for name in ("kept", "gone", "elsewhere", "busy"):
        source = f"data.source=tales:{200 + len(folders)}"
        trainer = begin(tmp_path / name, place, source)
        trainer.lock.close()
        folders[name] = trainer.data.stores[0].folder
    for name in ("gone", "elsewhere", "busy"):
        shutil.rmtree(tmp_path / name)
    # Run of another host, which can't be seen from here.
    (folders["elsewhere"] / "used_by.txt").write_text(f"other-host\t{tmp_path}/elsewhere\n")
    left = stores / f"{'0' * 32}.{socket.gethostname()}.1.tmp"
    left.mkdir()
    (left / "part").write_text("unfinished")
    with (stores / f"{folders['busy'].name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = call_command(
            "tinylm.prepare", "--clean", "--json", "--config=tales", f"--config.{place}"
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["store"] for row in found["removed"]] == [folders["gone"].name]
    runs = {row["store"]: row["runs"] for row in found["kept"]}
    assert runs[folders["kept"].name] == [str(tmp_path / "kept")]
    assert runs[folders["elsewhere"].name] == [f"{tmp_path}/elsewhere on other-host"]
    assert runs[folders["busy"].name] == []
    assert {name for name, folder in folders.items() if folder.exists()} == {
        "kept",
        "elsewhere",
        "busy",
    }
    assert not left.exists() and found["freed_bytes"] > 10


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
    with pytest.raises(
        UserError, match=r"are in .*/scratch/run-.*; move this folder to .*/run/checkpoints, or set"
    ):
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
        (
            ["data.source=addition:10", "eval.answer_pattern=####"],
            "eval.answer_pattern=#### finds nothing",
        ),
        (
            ["data.source=addition:300", "data.seq_len=8", "eval.exact_match=9000"],
            "eval.exact_match: a prompt of 9 tokens",
        ),
        (["eval.answer_pattern=["], r"eval.answer_pattern=\[ must be a regular expression"),
    ],
)
def test_answers_that_could_not_be_counted_are_refused_before_anything_is_written(
    tmp_path, overrides, wanted
):
    with pytest.raises(UserError, match=wanted):
        begin(tmp_path / "run", "eval.exact_match=5", "eval.every_steps=1", *overrides)
    assert not (tmp_path / "run").exists()


# The other value of each counts as true where the default counts as false, or the other way.
OTHERS = [
    ("qk_norm", True),
    ("dropout", 0.2),
    ("z_loss", 1e-4),
    ("parallel_residual", True),
    ("conv_taps", 2),
    ("bias", True),
    ("attention_softcap", 5.0),
    ("tie_embeddings", False),
    ("embed_scale", 0.0),
    ("attention_window", (4,)),
]


@pytest.mark.parametrize(("name", "value"), OTHERS)
def test_a_run_goes_on_with_no_other_model_in_either_direction(tmp_path, name, value):
    plain, other = Config(), Config(model=ModelConfig(**{name: value}))
    for first, then in ((other, plain), (plain, other)):
        folder = RunFolder(str(tmp_path))
        folder.write_config({"config": to_dict(first.resolve(257)), "versions": {"mesh": {}}})
        for config in (then, then.resolve(257)):
            with pytest.raises(
                UserError, match=rf"holds another run, which differs in model.{name} \(there"
            ):
                start.check_same_config(config, folder)
        start.check_same_config(first, folder)


def test_sizes_that_are_left_open_are_compared_as_they_resolve(tmp_path):
    folder = RunFolder(str(tmp_path))
    config = load_config("tales", [*SMALL, "model.mlp_dim=48", "model.vocab_size=300"]).resolve(257)
    folder.write_config({"config": to_dict(config), "versions": {"mesh": {}}})
    with pytest.raises(UserError, match=r"differs in model.mlp_dim \(there 48, here 64\)"):
        start.check_same_config(load_config("tales", [*SMALL, "model.vocab_size=300"]), folder)
    with pytest.raises(UserError, match=r"differs in model.vocab_size \(there 300, here 257\)"):
        start.check_same_config(
            load_config("tales", [*SMALL, "model.mlp_dim=48"]).resolve(257), folder
        )


def test_checkpoints_without_their_config_are_left_alone(tmp_path):
    begin(tmp_path).run()
    (tmp_path / "config.json").unlink()
    there = content(tmp_path)
    with pytest.raises(
        UserError, match=r"holds checkpoints but no config.json.*restore config.json"
    ):
        begin(tmp_path, "model.embed_dim=32")
    assert content(tmp_path) == there


def test_a_run_is_made_longer_where_its_steps_would_have_been_the_same(tmp_path):
    constant = ["optimizer.schedule=constant", "train.log_every_steps=1"]
    begin(tmp_path / "whole", *constant, "train.num_steps=5").run()
    begin(tmp_path / "longer", *constant, "train.num_steps=3").run()
    begin(tmp_path / "longer", *constant, "train.num_steps=5").run()
    assert lines(tmp_path / "longer") == lines(tmp_path / "whole")
    assert state_digest(tmp_path / "longer", 5) == state_digest(tmp_path / "whole", 5)
    with pytest.raises(UserError, match=r"train.num_steps=5 \(here 4\)"):
        begin(tmp_path / "longer", *constant, "train.num_steps=4")


@pytest.mark.parametrize(
    ("schedule", "saved", "there", "here", "fits"),
    [
        ("constant", 100, 100, 200, True),
        ("constant", 60, 100, 60, True),
        ("constant", 60, 100, 59, False),
        ("constant", 0, 100, 200, True),
        ("wsd", 80, 100, 200, True),
        ("wsd", 90, 100, 200, False),
        ("wsd", 100, 100, 200, False),
        ("wsd", 60, 100, 70, False),
        ("wsd", 0, 100, 200, False),
        ("cosine", 100, 100, 200, False),
        ("cosine", 0, 100, 200, False),
        ("linear", 50, 100, 200, False),
    ],
)
def test_another_length_fits_where_no_rate_of_the_steps_taken_changes(
    tmp_path, schedule, saved, there, here, fits
):
    rates = [f"optimizer.schedule={schedule}", "optimizer.warmup_steps=3", "train.num_steps=100"]
    config = load_config("tales", [*SMALL, *rates])
    folder = RunFolder(str(tmp_path))
    if saved:
        (tmp_path / "checkpoints" / str(saved)).mkdir(parents=True)
    config.train.num_steps = there
    folder.write_config({"config": to_dict(config.resolve(257)), "versions": {"mesh": {}}})
    config.train.num_steps = here
    if fits:
        start.check_same_config(config, folder)
    else:
        with pytest.raises(
            UserError, match=rf"train.num_steps={there} \(here {here}\).*train.init_from={tmp_path}"
        ):
            start.check_same_config(config, folder)


@pytest.mark.parametrize(
    "fails", ["check_same_stores", "store_digests", "make_blueprint", "Trainer"]
)
def test_a_start_that_fails_gives_the_workdir_free(tmp_path, monkeypatch, fails):
    begin(tmp_path).lock.close()
    with monkeypatch.context() as patched, pytest.raises(StorageError, match="it fails"):
        patched.setattr(start, fails, lambda *_: (_ for _ in ()).throw(StorageError("it fails")))
        begin(tmp_path)
    WorkdirLock(RunFolder(str(tmp_path)).path).release()


def test_patience_without_a_validation_split_is_refused_before_training(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once there was a fox. It slept.\n" * 50)
    settings = [
        f"data.source=text:{text}",
        "data.valid_fraction=0",
        "eval.every_steps=1",
        "eval.patience=2",
    ]
    with pytest.raises(UserError, match=r"eval.patience=2 needs a validation split"):
        begin(tmp_path / "run", *settings)
    assert not (tmp_path / "run").exists()


def test_a_run_outlives_batches_without_any_answer(tmp_path):
    """Long prompts and short answers: most windows of 16 tokens hold nothing to learn, nor to
    evaluate.
    """
    pairs = tmp_path / "pairs.jsonl"
    records = [{"prompt": "ab" * 150, "completion": "c"} for _ in range(60)]
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    trainer = begin(
        tmp_path / "run",
        f"data.source=jsonl:{pairs}",
        "data.packing=stream",
        "data.loss_on=answer",
        "data.batch_size=2",
        "train.num_steps=30",
        "train.log_every_steps=1",
        "eval.every_steps=30",
        "eval.max_batches=1",
        "checkpoint.every_steps=0",
    )
    outcome = trainer.run()
    losses = lines(tmp_path / "run")
    missing = [step for step, loss in losses.items() if loss is None]
    assert outcome.step == 30
    assert 0 < len(missing) < 30
    assert all(loss > 0 for step, loss in losses.items() if step not in missing)


def test_an_evaluation_without_any_target_is_no_end_of_a_run(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    records = [{"prompt": "ab" * 150, "completion": "c"} for _ in range(60)]
    pairs.write_text("".join(json.dumps(record) + "\n" for record in records))
    trainer = begin(
        tmp_path / "run",
        f"data.source=jsonl:{pairs}",
        "data.packing=single",
        "data.loss_on=answer",
        "eval.every_steps=1",
        "eval.max_batches=1",
        "eval.patience=1",
    )
    outcome = trainer.run()
    assert (outcome.step, outcome.valid_loss) == (2, None)
    assert lines(tmp_path / "run", "valid") == {}


def test_prompts_are_in_lower_case_where_all_texts_are(tmp_path, capsys):
    """With the characters of the corpus alone, a capital letter could not be a prompt."""
    (tmp_path / "a.txt").write_text("One day. Two days.\n\n" * 60)
    trainer = begin(
        tmp_path / "run",
        f"data.source=text:{tmp_path}/a.txt",
        "data.separator='\n\n'",
        "data.tokenizer=char",
        "data.lowercase=True",
        "sample.max_tokens=4",
        "sample.prompts=('One Day',)",
    )
    [sample] = trainer.run().samples
    assert sample.startswith("one day")
    capsys.readouterr()
    assert generate.main([f"--workdir={tmp_path}/run", "--prompt=Two", "--max_tokens=3"]) == 0
    assert capsys.readouterr().out.startswith("two")


def test_a_workdir_that_can_not_be_written_is_not_taken_for_one_that_is_not_shared(
    tmp_path, monkeypatch
):
    # As for a process that leaves no mark there; permissions don't hold root back.
    monkeypatch.setattr(start, "is_shared", lambda _: False)
    monkeypatch.setattr(start.os, "access", lambda *_: False)
    with pytest.raises(StorageError, match=r"--workdir=.* can't be written by this user"):
        start.check_shared("--workdir", tmp_path)
    assert tmp_path.exists()
