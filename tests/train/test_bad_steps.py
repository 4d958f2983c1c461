"""Bad batches by each policy: parameters untouched, the batch named, counts in the state, no bad
checkpoint.
"""

import hashlib
import json
import math
import os
import signal
import sys

import jax
import numpy as np
import pytest
from helpers import SMALL, lines, state_digest

from tinylm.config import load_config
from tinylm.core.errors import HangError, NumericError, Preempted, StorageError, UserError
from tinylm.data import pipeline
from tinylm.train import feed, loop
from tinylm.train.start import start_run

FLAGS = [flag.removeprefix("--config.") for flag in SMALL[1:]]
FEW = [
    "train.num_steps=12",
    "eval.every_steps=4",
    "checkpoint.every_steps=4",
    "sample.max_tokens=0",
    "mesh.data=1",
    "writers.plot=False",
    "model.num_layers=1",
]


def poison(monkeypatch, bad: dict[int, float], interrupt_at: int = -1):
    """Make each batch of `bad` give that value times its loss; send this process SIGTERM before a
    batch.
    """

    def batches(*arguments, **kwargs):
        for index, batch in pipeline.train_batches(*arguments, **kwargs):
            if index == interrupt_at:
                signal.raise_signal(signal.SIGTERM)
            if index in bad:
                # As (sum, count) are of the weights, a target that is off the vocabulary's end
                # can't do this.
                batch = {**batch, "weights": batch["weights"] * np.float32(bad[index])}
            yield index, batch

    monkeypatch.setattr(feed, "train_batches", batches)


def run(workdir, *overrides):
    trainer = start_run(load_config("tales", [*FLAGS, *FEW, *overrides]), str(workdir))
    try:
        return trainer.run()
    finally:
        trainer.checkpoints.check(wait=True)


def bad_lines(workdir):
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [
        (line["step"], line["batch"], line["loss"]) for line in records if line["split"] == "bad"
    ]


def test_halt_names_the_batch_and_saves_nothing_bad(tmp_path, monkeypatch):
    poison(monkeypatch, {5: math.nan})
    with pytest.raises(
        NumericError, match=r"step 6 is bad: batch 5 has loss nan .* Set train.on_bad_step"
    ) as caught:
        run(tmp_path)
    assert caught.value.exit_code == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4"]
    assert bad_lines(tmp_path) == [(5, 5, None)]
    poison(monkeypatch, {5: math.nan})
    assert run(tmp_path, "train.on_bad_step=skip").step == 12, (
        "the same run goes on with another policy"
    )


@pytest.fixture(scope="module")
def skipped(tmp_path_factory):
    """A run that skipped the batches 5, 6 and 9, one step a dispatch."""
    workdir = tmp_path_factory.mktemp("skipped")
    with pytest.MonkeyPatch.context() as monkeypatch:
        poison(monkeypatch, {5: math.nan, 6: math.inf, 9: math.nan})
        run(workdir, "train.on_bad_step=skip", "train.steps_per_dispatch=1")
    return workdir


def test_skip_leaves_a_batch_out_and_every_step_is_taken(skipped, tmp_path, monkeypatch):
    assert bad_lines(skipped) == [(5, 5, None), (5, 6, None), (7, 9, None)]
    assert sorted(lines(skipped)) == list(range(1, 13))
    assert sorted(lines(skipped, "valid")) == [4, 8, 12]

    def without(
        *arguments, start, **kwargs
    ):  # the same batches, numbered as if the bad ones had never been
        good = (
            batch
            for batch in pipeline.train_batches(*arguments, start=0, **kwargs)
            if batch[0] not in (5, 6, 9)
        )
        return (batch for place, batch in enumerate(good) if place >= start)

    monkeypatch.setattr(feed, "train_batches", lambda *a, **k: Closing(without(*a, **k)))
    run(tmp_path / "without", "train.steps_per_dispatch=1")
    assert lines(skipped) == lines(tmp_path / "without")


class Closing:
    """An iterator with the `close` of a generator."""

    def __init__(self, iterator):
        self.iterator = iterator

    def __next__(self):
        return next(self.iterator)

    def close(self):
        pass


@pytest.mark.parametrize("interrupt_at", [7, 10])
def test_skipping_is_bitwise_the_same_for_many_steps_a_dispatch_and_after_a_stop(
    skipped, tmp_path, monkeypatch, interrupt_at
):
    bad = {5: math.nan, 6: math.inf, 9: math.nan}
    poison(monkeypatch, bad, interrupt_at)
    flags = ["train.on_bad_step=skip", "train.steps_per_dispatch=4"]
    with pytest.raises(Preempted):
        run(tmp_path, *flags)
    poison(monkeypatch, bad)
    run(tmp_path, *flags)
    assert lines(tmp_path) == lines(skipped)
    assert state_digest(tmp_path, 12) == state_digest(skipped, 12)


@pytest.mark.parametrize("per_dispatch", [1, 10**8])
def test_rollback_goes_on_from_the_last_checkpoint_past_the_bad_batch(
    tmp_path, monkeypatch, per_dispatch
):
    poison(monkeypatch, {6: math.nan})
    outcome = run(
        tmp_path, "train.on_bad_step=rollback", f"train.steps_per_dispatch={per_dispatch}"
    )
    assert outcome.step == 12
    assert bad_lines(tmp_path) == [(6, 6, None)]
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert all(record["tokens_per_sec"] > 0 for record in records if record["split"] == "train")
    restored = loop.Checkpoints(loop.RunFolder(str(tmp_path)).checkpoints)
    assert restored.newest() == 12

    def past(
        *arguments, start, **kwargs
    ):  # batches 4, 5 and 6 are left out, as if they had never been
        for index, batch in pipeline.train_batches(
            *arguments, start=start if start < 4 else start + 3, **kwargs
        ):
            yield from ((index, batch),) if index < 4 or index > 6 else ()

    monkeypatch.setattr(feed, "train_batches", past)
    # Under the same policy, which is a part of the program: another program may round otherwise.
    run(tmp_path / "past", "train.on_bad_step=rollback", f"train.steps_per_dispatch={per_dispatch}")
    assert lines(tmp_path) == lines(tmp_path / "past")


def test_too_many_in_a_row_end_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, dict.fromkeys(range(2, 20), math.nan))
    with pytest.raises(NumericError, match=r"batch 4 .* the 3th in a row \(train.max_bad_steps\)"):
        run(tmp_path, "train.on_bad_step=skip", "train.max_bad_steps=3")
    assert not (tmp_path / "checkpoints").exists()
    poison(monkeypatch, dict.fromkeys(range(2, 20), math.nan))
    with pytest.raises(NumericError, match=r"batch 4 .* the 3th in a row"):
        run(tmp_path / "back", "train.on_bad_step=rollback", "train.max_bad_steps=3")


def test_a_spike_is_bad_and_what_it_would_have_taught_is_left_out(tmp_path):
    from tinylm.train.bad_steps import judge, new_guard

    guard, rng = new_guard(), np.random.default_rng(0)
    step = jax.jit(lambda guard, loss: judge(guard, loss, 1.0, False, sigmas=6.0, forgive=True))
    for _ in range(50):
        bad, guard = step(guard, np.float32(2 + rng.normal() / 10))
        assert not bad
    mean = float(guard.loss_mean)
    assert mean == pytest.approx(2, abs=0.1)
    bad, guard = step(guard, np.float32(3.5))
    assert bad
    assert (int(guard.skipped), int(guard.bad_in_row), float(guard.loss_mean)) == (
        1,
        1,
        mean,
    )
    bad, guard = step(guard, np.float32(2.1))
    assert (bool(bad), int(guard.bad_in_row), int(guard.skipped)) == (False, 0, 1)


def before_batch(monkeypatch, index, fault):
    """Do something when the loop asks for the batch of this index, while threads read ahead."""

    def batches(*arguments, **kwargs):
        for number, batch in pipeline.train_batches(*arguments, **kwargs):
            if number == index:
                fault()
            yield number, batch

    monkeypatch.setattr(feed, "train_batches", batches)


@pytest.mark.parametrize(
    "how",
    ["cut", *(pytest.param(how, marks=pytest.mark.slow) for how in ("altered", "thread ends"))],
)
def test_data_that_fails_under_a_run_is_one_line_and_no_batch_is_lost_or_repeated(
    tmp_path, monkeypatch, how
):
    flags = [f"data.store_dir={tmp_path / 'stores'}", "train.num_steps=24"]
    run(tmp_path / "whole", *flags)
    shard = next((tmp_path / "stores").glob("*/tokens-*.bin"))
    content = shard.read_bytes()
    wanted = (
        (HangError, "thread")
        if how == "thread ends"
        else (StorageError, "was changed while it was read")
    )
    with monkeypatch.context() as patched:
        if how == "thread ends":
            read = pipeline._Runs.__getitem__  # of eight batches
            patched.setattr(
                pipeline._Runs,
                "__getitem__",
                lambda *args: sys.exit() if args[1] == 2 else read(*args),
            )
        else:
            change = {
                "cut": lambda: os.truncate(shard, 1000),
                "altered": lambda: shard.write_bytes(content[::-1]),
            }
            before_batch(patched, 5, change[how])
        with pytest.raises(wanted[0], match=wanted[1]):
            run(tmp_path / "run", *flags)
    assert max(lines(tmp_path / "run")) < 24
    shard.write_bytes(content)
    run(tmp_path / "run", *flags)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert state_digest(tmp_path / "run", 24) == state_digest(tmp_path / "whole", 24)


@pytest.mark.slow
def test_another_mesh_goes_on_with_the_same_state_batches_and_losses(tmp_path, monkeypatch):
    """From 8 x 1 x 1 to 2 x 2 x 2 to 1 x 1 x 8 devices, against one device."""
    read: dict = {}

    def batches(*arguments, **kwargs):
        for index, batch in pipeline.train_batches(*arguments, **kwargs):
            read.setdefault(index, set()).add(hashlib.sha256(batch["tokens"].tobytes()).hexdigest())
            yield index, batch

    monkeypatch.setattr(feed, "train_batches", batches)
    run(tmp_path / "one")
    shapes = ((8, 1, 1), (2, 2, 2), (1, 1, 8))
    for stop, (data, context, model) in zip((4, 8, 12), shapes, strict=True):
        mesh = [
            f"mesh.data={data}",
            f"mesh.context={context}",
            f"mesh.model={model}",
            "mesh.fsdp=True",
            f"train.stop_step={stop}",
        ]
        trainer = start_run(load_config("tales", [*FLAGS, *FEW, *mesh]), str(tmp_path / "run"))
        if stop > 4:
            digest = state_digest(tmp_path / "run", stop - 4)
            again = loop.Checkpoints(loop.RunFolder(str(tmp_path / f"again{stop}")).checkpoints)
            again.save(trainer.restore_or_init(), None)
            again.close()
            assert state_digest(tmp_path / f"again{stop}", stop - 4) == digest
        trainer.run()
    assert [len(read[index]) for index in range(12)] == [1] * 12
    ours, theirs = lines(tmp_path / "run"), lines(tmp_path / "one")
    assert sorted(ours) == list(range(1, 13))
    for step, loss in ours.items():
        assert loss == pytest.approx(theirs[step], rel=1e-5)


@pytest.mark.parametrize("how", ["altered", "cut", "another"])
def test_a_store_that_changed_is_refused_when_the_run_goes_on(tmp_path, how):
    config = load_config("tales", [*FLAGS, *FEW, f"data.store_dir={tmp_path / 'stores'}"])
    start_run(config, str(tmp_path / "run")).lock.close()
    shard = next((tmp_path / "stores").glob("*/tokens-*.bin"))
    content = bytearray(shard.read_bytes())
    before = hashlib.sha256(content).hexdigest()
    content[100] ^= 1
    shard.write_bytes(content[:-1] if how == "cut" else content)
    if how == "another":  # whole by itself, but of other tokens
        manifest = shard.parent / "manifest.json"
        manifest.write_text(
            manifest.read_text().replace(before, hashlib.sha256(content).hexdigest())
        )
    wanted = {
        "altered": "differs from its checksum",
        "cut": "bytes",
        "another": "doesn't give the tokens that",
    }[how]
    with pytest.raises(UserError, match=wanted):
        start_run(config, str(tmp_path / "run"))
