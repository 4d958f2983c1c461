"""A run that starts from another: its parameters, a fresh schedule, and refusals where the two don't mean the same."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import optax
import pytest

from tinylm.config import load_config
from tinylm.core.errors import UserError
from tinylm.data.bpe import BpeTokenizer
from tinylm.data.vocabularies import read_vocabulary
from tinylm.run.folder import RunFolder
from tinylm.train import init_from
from tinylm.train.start import start_run

SMALL = [
    "data.source=tales:200", "data.tokenizer=byte", "data.packing=stream", "data.seq_len=16", "data.batch_size=8",
    "model.embed_dim=16", "model.num_layers=1", "optimizer.name=adamw", "optimizer.warmup_steps=0", "train.num_steps=3",
    "train.log_every_steps=1", "eval.every_steps=0", "sample.max_tokens=0", "writers.plot=False",
    "mesh.data=1", "sample.prompts=('a',)",
]  # fmt: skip


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Three steps of a byte model."""
    workdir = tmp_path_factory.mktemp("first") / "run"
    start_run(load_config("tales", SMALL), str(workdir)).run()
    return workdir


def trainer(tmp_path, first, *overrides):
    return start_run(load_config("tales", [*SMALL, f"train.init_from={first}", *overrides]), str(tmp_path / "next"))


def state_of(workdir):
    there = start_run(load_config("tales", SMALL), str(workdir))
    with there.lock:
        return there.restore_or_init()


def test_parameters_are_taken_over_and_the_rest_is_new(first, tmp_path):
    state = trainer(tmp_path, first, "model.dropout=0.1", "model.z_loss=0.0001", "mesh.fsdp=True").restore_or_init()
    theirs = state_of(first)
    assert int(state.step) == 0 and int(theirs.step) == 3
    assert np.isinf(float(state.guard["best_loss"]))
    assert all(map(np.array_equal, jax.tree.leaves(state.params), jax.tree.leaves(theirs.params)))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_the_optimizer_comes_along_when_asked(first, tmp_path):
    begun = trainer(tmp_path, first, "train.init_optimizer=True")
    state = begun.restore_or_init()
    theirs = state_of(first)

    def schedule_counts(tree):
        is_schedule = lambda node: isinstance(node, optax.ScaleByScheduleState)  # noqa: E731
        return [int(n.count) for n in jax.tree.leaves(tree, is_leaf=is_schedule) if is_schedule(n)]

    assert (schedule_counts(state.opt_state), schedule_counts(theirs.opt_state)) == ([0], [3])
    assert optax.tree_utils.tree_get(state.opt_state, "mu")["embedding"].any()
    rest = [optax.tree_utils.tree_get(s.opt_state, "nu") for s in (state, theirs)]
    assert all(map(np.array_equal, *map(jax.tree.leaves, rest)))
    outcome = begun.run()
    assert outcome.step == 3 and outcome.loss < 6


def test_a_run_goes_on_from_itself_not_from_its_origin(first, tmp_path):
    trainer(tmp_path, first).run()
    state = trainer(tmp_path, first).restore_or_init()
    assert int(state.step) == 3


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["data.tokenizer=char"], r"another tokenizer \(there byte of 257 ids, here char.*set data.tokenizer=byte"),
        (["model.embed_dim=32"], r"model.embed_dim \(there 16, here 32\).*set them alike"),
        (["train.init_optimizer=True", "optimizer.name=muon"], "another optimizer \\(adamw\\)"),
        (["train.init_from=nowhere"], "train.init_from=nowhere holds no run"),
        (["train.init_from=", "train.init_optimizer=True"], "needs train.init_from"),
    ],
)
def test_what_does_not_fit_is_one_line(first, tmp_path, overrides, wanted):
    with pytest.raises(UserError, match=wanted) as caught:
        trainer(tmp_path, first, *overrides)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "next").exists()


def test_a_bpe_read_from_its_file_is_the_same_tokenizer(tmp_path):
    learned = BpeTokenizer.train(["once upon a time there was a time"], 270)
    folder = RunFolder(str(tmp_path))
    learned.save(str(folder.tokenizer))
    init_from.check_tokenizer("here", folder, read_vocabulary(f"hf:{tmp_path}/tokenizer/tokenizer.json"), "bpe:270")
    with pytest.raises(UserError, match=rf"set data.tokenizer=hf:{tmp_path}/tokenizer/tokenizer.json"):
        init_from.check_tokenizer("here", folder, BpeTokenizer.train(["another text"], 270), "bpe:270")


def test_an_imported_model_is_not_trained_in_place(first, tmp_path):
    copy = tmp_path / "imported"
    copy.mkdir()
    record = json.loads((pathlib.Path(first) / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(record | {"imported_from": "a folder"}))
    with pytest.raises(UserError, match=r"holds an imported model.*set train.init_from"):
        start_run(load_config("tales", SMALL), str(copy))


def test_init_from_is_an_identity_setting():
    fields = {field.name: field for field in dataclasses.fields(load_config("tales").train)}
    assert not fields["init_from"].metadata["free"]
