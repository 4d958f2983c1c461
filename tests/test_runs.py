"""A run as a user sees it: train, kill, resume, write, score; one process or two."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import (
    ROOT,
    SMALL,
    call_command,
    finished,
    lines,
    made_once,
    png_of,
    run_command,
    session_folder,
    state_digest,
)

from tinylm.config import load_config
from tinylm.inference.text import numbered
from tinylm.run.folder import RunFolder
from tinylm.train.start import start_run
from tinylm.view.history import gather
from tinylm.view.plot import figure_of_curves


def command(workdir, *extra):
    return [sys.executable, "-m", "tinylm.main", *SMALL, f"--workdir={workdir}", *extra]


def train(workdir, *extra):
    return run_command("tinylm.main", *SMALL, f"--workdir={workdir}", *extra)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbed, and what it printed."""

    def make(folder):
        done = train(folder / "run")
        assert done.returncode == 0, done.stderr
        (folder / "printed.json").write_text(json.dumps([done.stdout, done.stderr]))

    folder = made_once(session_folder(tmp_path_factory) / "undisturbed", make)
    stdout, stderr = json.loads((folder / "printed.json").read_text())
    return folder / "run", subprocess.CompletedProcess([], 0, stdout, stderr)


def test_a_run_leaves_what_it_promises(whole):
    workdir, done = whole
    assert sorted(lines(workdir)) == list(range(1, 41))
    assert sorted(lines(workdir, "valid")) == [20, 40]
    assert lines(workdir)[40] < lines(workdir)[1]
    figure = figure_of_curves([gather(str(workdir))], ["loss"])
    drawn = [line.get_xydata() for line in figure.axes[0].get_lines()]
    np.testing.assert_allclose(drawn[0], sorted(lines(workdir).items()), rtol=1e-5)
    np.testing.assert_allclose(drawn[1], sorted(lines(workdir, "valid").items()), rtol=1e-5)
    assert (workdir / "loss.png").read_bytes() == png_of(figure)
    assert (workdir / "samples.txt").read_text().startswith("--- step 40 ---\na")
    record = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert {"grad_norm", "learning_rate", "tokens_per_sec", "mfu"} <= set(record)
    assert "tinylm.generate" in done.stdout
    assert "Traceback" not in done.stderr
    assert "warning" not in done.stderr.lower()
    config = json.loads((workdir / "config.json").read_text())["config"]
    assert config["model"]["vocab_size"] == 257


@pytest.mark.parametrize(
    ("saved", "flags"),
    [
        pytest.param(10, [], id="the workdir alone"),
        pytest.param(30, SMALL, id="the same", marks=pytest.mark.slow),
    ],
)
def test_kill_and_resume_is_bitwise_equal(whole, tmp_path, saved, flags):
    workdir = tmp_path / "killed"
    process = subprocess.Popen(
        command(workdir), cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    while not finished(workdir, saved):
        assert process.poll() is None, "the run ended before it was killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = run_command("tinylm.main", *flags, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert f"resuming from step {saved}" in done.stderr
    assert lines(workdir) == lines(whole[0])
    assert lines(workdir, "valid") == lines(whole[0], "valid")
    assert state_digest(workdir, 40) == state_digest(whole[0], 40)


def test_sigterm_saves_and_the_same_command_goes_on(whole, tmp_path):
    workdir = tmp_path / "preempted"
    process = subprocess.Popen(
        command(workdir),
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (workdir / "metrics.jsonl").exists():
        time.sleep(0.001)
    process.terminate()
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 75, error
    reached = max(lines(workdir))
    assert f"step {reached} is saved" in error
    done = train(workdir)
    assert f"resuming from step {reached}" in done.stderr
    assert lines(workdir) == lines(whole[0])


def test_stop_and_go_on_on_another_mesh(whole, tmp_path):
    """Stopped at step 12 on one device, gone on with on 2 x 4: the same batches, so the same losses
    but rounding.
    """
    assert train(tmp_path / "run", "--config.train.stop_step=12").returncode == 0
    done = train(
        tmp_path / "run",
        "--cpu_devices=8",
        "--config.mesh.model=4",
        "--config.mesh.fsdp=true",
        "--config.train.stop_step=22",
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = lines(tmp_path / "run"), lines(whole[0])
    assert sorted(ours) == list(range(1, 23))
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], rel=1e-5)


EXPERTS = [
    *(flag.removeprefix("--config.") for flag in SMALL[1:]),
    "model.num_layers=3",
    "model.num_experts=8",
    "model.expert_dim=16",
    "model.shared_experts=1",
    "model.dense_layers=1",
    "model.router_bias_rate=0.01",
    "eval.every_steps=0",
    "sample.max_tokens=0",
    "writers.plot=False",
]
SENT = ["mesh.data=4", "mesh.model=2", "mesh.fsdp=True", "model.expert_parallel=True"]


def trainer_of_experts(workdir, *overrides):
    return start_run(load_config("tales", [*EXPERTS, *overrides]), str(workdir))


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A run whose tokens are sent to its experts, the same run stopped at step 6, and its state."""
    whole = tmp_path_factory.mktemp("whole")
    trainer_of_experts(whole, *SENT, "train.stop_step=16").run()
    stopped = tmp_path_factory.mktemp("stopped")
    trainer_of_experts(stopped, *SENT, "train.stop_step=6").run()
    again = shutil.copytree(stopped, tmp_path_factory.mktemp("again") / "run")
    trainer = trainer_of_experts(again, *SENT, "train.stop_step=16")
    state = jax.device_get(trainer.restore_or_init())
    trainer.run()
    return whole, stopped, again, state


@pytest.mark.slow
def test_a_run_with_experts_goes_on_bit_for_bit(experts):
    whole, _, again, _ = experts
    assert lines(again) == lines(whole)
    assert state_digest(again, 16) == state_digest(whole, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        ["mesh.data=1"],
        ["mesh.data=8"],
        ["mesh.data=8", "mesh.fsdp=True"],
        ["mesh.data=1", "mesh.model=8"],
        ["mesh.data=2", "mesh.context=2", "mesh.model=2", "mesh.fsdp=True"],
        ["mesh.replica=2", "mesh.data=4", "mesh.fsdp=True", "model.expert_parallel=True"],
    ],
    ids=" ".join,
)
def test_a_run_with_experts_goes_on_on_another_mesh(experts, tmp_path, mesh):
    """From the same state to the last bit, the routers' biases too, and with the same losses."""
    whole, stopped, _, state = experts
    trainer = trainer_of_experts(
        shutil.copytree(stopped, tmp_path / "run"), *mesh, "train.stop_step=16"
    )
    restored = jax.device_get(trainer.restore_or_init())
    assert np.any(state.params["blocks"]["mlp"]["router"]["bias"])
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    trainer.run()
    ours, theirs = lines(tmp_path / "run"), lines(whole)
    assert sorted(ours) == list(range(1, 17))
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], rel=1e-5)


def test_two_processes_give_what_one_gives(whole, tmp_path):
    """By the launcher for one machine, which gives each process its number and the address of the
    first.
    """
    flags = [
        *SMALL,
        "--config.mesh.model=2",
        "--config.train.stop_step=12",
        f"--workdir={tmp_path}/run",
    ]
    done = subprocess.run(
        [
            sys.executable,
            "launch/local.py",
            "--processes=2",
            "--devices=2",
            "--restarts=0",
            "--",
            *flags,
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = lines(tmp_path / "run"), lines(whole[0])
    assert sorted(ours) == list(range(1, 13))
    for step in range(1, 13):
        assert ours[step] == pytest.approx(theirs[step], rel=1e-5)

    assert "Slowest of 2 processes: " in done.stdout
    by_step = {line["step"]: line for line in RunFolder(str(tmp_path / "run")).lines()}
    last = by_step[11]
    assert 0 < last["input_wait_secs"] <= last["host_secs"]
    assert last["host_secs_on"].endswith(("(process 0)", "(process 1)"))


def test_patience_ends_a_run_that_no_longer_learns(tmp_path):
    """At a learning rate that float32 can't see, the second and third evaluation are not better
    than the first.
    """
    done = train(
        tmp_path / "run",
        "--config.optimizer.learning_rate=1e-30",
        "--config.eval.every_steps=4",
        "--config.eval.patience=2",
    )
    assert done.returncode == 0, done.stderr
    assert sorted(lines(tmp_path / "run", "valid")) == [4, 8, 12]
    assert "no better validation loss in 2 evaluations" in done.stdout


def test_another_config_in_the_same_workdir_is_refused(whole):
    done = train(whole[0], "--config.model.embed_dim=64", "--config.seed=3")
    assert done.returncode == 2
    assert "seed (there 0, here 3)" in done.stderr
    assert "model.embed_dim (there 32, here 64)" in done.stderr


def test_generate_writes_text_alone_and_the_same_for_a_seed(whole):
    arguments = [
        f"--workdir={whole[0]}",
        "--prompt=Once",
        "--num_samples=2",
        "--max_tokens=40",
        "--seed=5",
    ]
    first = call_command("tinylm.generate", *arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("--- sample 1 of 2 ---\nOnce")
    again = json.loads(call_command("tinylm.generate", *arguments, "--json").stdout)
    assert (
        numbered(again["texts"]) + "\n"
    ).splitlines() == first.stdout.splitlines()  # \r was read as \n
    assert again["step"] in (20, 40)


def test_a_prompt_is_read_from_a_file(whole, tmp_path):
    """Its byte order mark and its last line break are no part of it."""
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfTwo lines,\r\nend.\r\n")
    arguments = [
        f"--workdir={whole[0]}",
        f"--prompt_file={tmp_path}/prompt.txt",
        "--max_tokens=3",
        "--json",
    ]
    done = call_command("tinylm.generate", *arguments)
    assert done.returncode == 0, done.stderr
    from_file = json.loads(done.stdout)
    arguments[1] = "--prompt=Two lines,\r\nend."
    assert json.loads(call_command("tinylm.generate", *arguments).stdout) == from_file


def test_evaluate_gives_the_loss_that_training_logged(whole):
    done = call_command(
        "tinylm.evaluate", f"--workdir={whole[0]}", "--json", "--max_batches=4", "--step=latest"
    )
    result = json.loads(done.stdout)
    assert result["loss"] == pytest.approx(lines(whole[0], "valid")[40], rel=1e-6)
    assert result["perplexity"] > 1
    assert result["tokens"] == 4 * 8 * 32


@pytest.mark.parametrize(("trained_on", "parts"), [(4, 4), (-1, 8), (3, 1)])
def test_rows_are_split_as_in_training_where_the_devices_allow(whole, tmp_path, trained_on, parts):
    import tinylm

    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    record = json.loads((run / "config.json").read_text())
    record["config"]["mesh"]["context"] = trained_on
    (run / "config.json").write_text(json.dumps(record))
    assert tinylm.open_run(str(run)).mesh.shape["context"] == parts
    if parts == 4:
        done = call_command("tinylm.evaluate", f"--workdir={run}", "--max_batches=4", "--json")
        assert done.returncode == 0, done.stderr
        loss = lines(whole[0], "valid")[40]
        assert json.loads(done.stdout)["loss"] == pytest.approx(loss, rel=1e-5)


def test_evaluate_scores_any_text(whole, tmp_path):
    """The loss by hand: one row of bytes and the end of the text."""
    import tinylm

    text = "A fox that nobody has ever seen"
    (tmp_path / "a.txt").write_text(text)
    done = call_command(
        "tinylm.evaluate", f"--workdir={whole[0]}", "--json", f"--source=text:{tmp_path}/a.txt"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    run = tinylm.open_run(str(whole[0]))
    ids = np.array([256, *text.encode(), 256])
    logits = np.asarray(run.model(ids[None, :-1]))[0, :, :257].astype(np.float64)
    scores = logits[np.arange(32), ids[1:]] - np.log(np.exp(logits).sum(-1))
    assert result["loss"] == pytest.approx(-scores.mean(), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(-scores.sum() / np.log(2) / 31, rel=1e-4)
    assert result["tokens"] == 32
    assert result["source"] == f"text:{tmp_path}/a.txt"


def test_pairs_of_a_text_are_answered_after_training(whole, tmp_path):
    pairs = [{"q": f"{i}", "a": "so #### 5"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = [
        f"--workdir={whole[0]}",
        "--json",
        f"--source=jsonl:{tmp_path}/a.jsonl",
        "--exact_match",
        "--data=prompt_field=q",
        "--data=completion_field=a",
        "--data=loss_on=answer",
    ]
    done = call_command("tinylm.evaluate", *flags, "--answer_pattern=#### ([0-9]+)")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["exact_match"], result["pairs"], result["tokens"]) == (0.0, 3, 3 * 10)
    assert (result["loss_on"], result["answer_pattern"]) == ("answer", "#### ([0-9]+)")
    done = call_command("tinylm.evaluate", *flags, "--answer_pattern=(")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--answer_pattern=( must be a regular expression" in done.stderr


def test_an_imported_model_is_not_scored_on_a_text_that_nobody_named(whole, tmp_path):
    shutil.copytree(whole[0], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(
        json.dumps({**record, "imported_from": "elsewhere"})
    )
    done = call_command("tinylm.evaluate", f"--workdir={tmp_path}/run")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "no text of its own to be scored on; give one: --source=text:FILE" in done.stderr


@pytest.mark.parametrize(
    ("mistake", "wanted"),
    [
        ("--step=7", "--step=7 must be best, latest or one of"),
        ("--stop=", "--stop must not be empty"),
        ("--prompt_file=/no/such/file", "--prompt_file=/no/such/file can't be read: No such file"),
        (f"--prompt={'long ' * 20}", "must be shorter than the context"),
    ],
)
def test_a_mistake_in_what_to_write_is_one_line(whole, mistake, wanted):
    done = call_command("tinylm.generate", f"--workdir={whole[0]}", mistake)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert wanted in done.stderr


def test_a_terminal_that_lacks_a_character_gets_a_question_mark(whole):
    arguments = [f"--workdir={whole[0]}", "--prompt=schön", "--max_tokens=1"]
    done = run_command("tinylm.generate", *arguments, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sch?n")


def test_open_run_gives_what_the_commands_have(whole):
    import tinylm

    run = tinylm.open_run(str(whole[0]), step="latest")
    assert run.step == 40
    ids = run.tokenizer.encode("Once upon")
    logits = run.model(np.asarray([ids]))
    assert logits.shape == (1, len(ids), 384)
