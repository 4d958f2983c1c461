"""How a training ends: asked to stop at any moment it is 75, a save under way is finished, and what
is secondary ends nothing.
"""

import os
import pty
import signal
import sys
import time

import matplotlib
import pytest
from helpers import png_of

from tinylm.config import load_config
from tinylm.core.errors import Preempted
from tinylm.core.preemption import StopRequest
from tinylm.run import checksums
from tinylm.train import feed, loop, start
from tinylm.train.progress import Progress
from tinylm.view import plot
from tinylm.view.history import gather
from tinylm.view.plot import figure_of_curves

SMALL = [
    "data.source=tales:200",
    "data.tokenizer=byte",
    "data.seq_len=16",
    "data.batch_size=8",
    "model.embed_dim=16",
    "model.num_layers=1",
    "train.num_steps=2",
    "train.steps_per_dispatch=1",
    "eval.every_steps=0",
    "eval.max_batches=2",
    "sample.max_tokens=0",
    "writers.plot=False",
    "mesh.data=1",
]


@pytest.fixture(autouse=True)
def handlers():
    """Put back what a run does with signals."""
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def begin(workdir, *overrides):
    return start.start_run(load_config("tales", [*SMALL, *overrides]), str(workdir))


def steps(workdir, split):
    return [line["step"] for line in begin(workdir).folder.lines() if line["split"] == split]


def signalled(function, number):
    """Return `function`, before which this process is sent a signal."""

    def first(*arguments, **kwargs):
        signal.raise_signal(number)
        return function(*arguments, **kwargs)

    return first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop_during_the_last_evaluation_it_is_taken_when_the_run_goes_on(
    tmp_path, number
):
    flags = ["eval.every_steps=2"]
    trainer = begin(tmp_path, *flags)
    trainer.evaluator.evaluate = signalled(trainer.evaluator.evaluate, number)
    with pytest.raises(Preempted, match="step 2 is saved") as caught:
        trainer.run()
    assert caught.value.exit_code == 75
    assert "valid" not in [line["split"] for line in trainer.folder.lines()]
    outcome = begin(tmp_path, *flags).run()
    assert outcome.reason == "all steps done"
    assert outcome.valid_loss is not None


def test_asked_to_stop_during_the_last_samples_they_are_written_when_the_run_goes_on(tmp_path):
    flags = ["sample.max_tokens=4", "sample.prompts=('a',)"]
    trainer = begin(tmp_path, *flags)
    trainer.evaluator.samples = signalled(trainer.evaluator.samples, signal.SIGTERM)
    with pytest.raises(Preempted, match="step 2 is saved"):
        trainer.run()
    assert not trainer.folder.samples_file.exists()
    begin(tmp_path, *flags).run()
    assert "--- step 2 ---" in trainer.folder.samples_file.read_text()


def test_asked_to_stop_while_it_waits_for_data_it_is_saved(tmp_path, monkeypatch):
    trainer = begin(tmp_path, "train.num_steps=20")
    load = feed.Feed.load

    def stuck_at_the_third(self, first_batch, count):
        if first_batch == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            pytest.fail("the wait was not interrupted")
        return load(self, first_batch, count)

    monkeypatch.setattr(feed.Feed, "load", stuck_at_the_third)
    with pytest.raises(Preempted, match="step 2 is saved"):
        trainer.run()
    assert trainer.checkpoints.newest() == 2


def test_a_save_under_way_is_finished_whatever_the_end_is_for(tmp_path, monkeypatch):
    trainer = begin(tmp_path, "train.num_steps=20", "checkpoint.every_steps=2")
    write = checksums.write

    def slow(*arguments, **kwargs):
        time.sleep(1)
        return write(*arguments, **kwargs)

    load = feed.Feed.load

    def fails_at_the_third(self, first_batch, count):
        if first_batch == 2:
            raise ZeroDivisionError("a bug")
        return load(self, first_batch, count)

    monkeypatch.setattr(checksums, "write", slow)
    monkeypatch.setattr(feed.Feed, "load", fails_at_the_third)
    with pytest.raises(ZeroDivisionError):
        trainer.run()
    assert trainer.checkpoints.steps() == [2]
    assert not trainer.checkpoints._mark(2).exists()


def test_samples_that_fail_are_left_out_with_one_line(tmp_path, monkeypatch):
    said = []
    trainer = begin(
        tmp_path, "sample.max_tokens=4", "sample.every_steps=1", "sample.prompts=('a',)"
    )
    monkeypatch.setattr("tinylm.train.progress.say", said.append)
    monkeypatch.setattr(trainer.evaluator.decoder, "write", lambda *_, **__: 1 / 0)
    assert trainer.run().step == 2
    warnings = [line for line in said if line.startswith("warning")]
    assert warnings[0] == "warning: the samples of step 1 are left out: division by zero"
    assert trainer.checkpoints.newest() == 2


def test_a_plot_without_the_latex_that_the_users_settings_ask_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with matplotlib.rc_context({"text.usetex": True}):
        trainer = begin(tmp_path / "run", "writers.plot=True", "train.log_every_steps=1")
        assert trainer.run().step == 2
        figure = figure_of_curves([gather(str(trainer.folder.path))], ["loss"])
        (line,) = figure.axes[0].get_lines()
        assert list(line.get_xdata()) == [1, 2]
        assert trainer.folder.plot_file.read_bytes() == png_of(figure)


def test_a_plot_that_fails_ends_nothing(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(plot, "say", said.append)
    trainer = begin(tmp_path, "writers.plot=True")
    with matplotlib.rc_context({"savefig.dpi": 100}):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
        assert trainer.run().step == 2
    assert [line.partition(" cannot")[2] for line in said] == [" be written: division by zero"]


def test_a_bar_goes_on_without_its_terminal(monkeypatch):
    ours, theirs = pty.openpty()
    terminal = os.fdopen(theirs, "w")
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(0, 10)
    assert progress._bar is not None
    os.close(ours)
    for step in range(10):
        progress.show(step, "loss 1.0", 5.0, None)
        progress.note("a line")
    progress.close()


def test_a_launcher_is_told_of_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("TINYLM_FIRST_STEP_FILE", str(tmp_path / "first_step"))
    trainer = begin(tmp_path / "run")
    seen = []

    def seen_when_compiled(*_):
        seen.append((tmp_path / "first_step").exists())

    monkeypatch.setattr(loop, "barrier", seen_when_compiled)
    trainer.run(StopRequest())
    assert seen == [False]
    assert (tmp_path / "first_step").exists()
