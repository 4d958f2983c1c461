"""A run that starts from another: its parameters, a fresh schedule, and refusals where the two
don't mean the same.
"""

import dataclasses
import json
import math
import pathlib
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from helpers import call_command

from tinylm.config import load_config
from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig
from tinylm.core.settings import from_dict, to_dict
from tinylm.data.tokenizers import BpeTokenizer, read_vocabulary
from tinylm.interop import models, weights
from tinylm.model.config import ModelConfig
from tinylm.run.open_run import open_run
from tinylm.tools.score import ScoreRequest, score_text
from tinylm.train import init_from
from tinylm.train.config import OptimizerConfig, TrainConfig
from tinylm.train.start import start_run

SMALL = [
    "data.source=tales:200",
    "data.tokenizer=byte",
    "data.packing=stream",
    "data.seq_len=16",
    "data.batch_size=8",
    "model.embed_dim=16",
    "model.num_layers=1",
    "optimizer.name=adamw",
    "optimizer.warmup_steps=0",
    "train.num_steps=3",
    "train.log_every_steps=1",
    "eval.every_steps=0",
    "sample.max_tokens=0",
    "writers.plot=False",
    "mesh.data=1",
    "sample.prompts=('a',)",
]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Three steps of a byte model."""
    workdir = tmp_path_factory.mktemp("first") / "run"
    start_run(load_config("tales", SMALL), str(workdir)).run()
    return workdir


def trainer(tmp_path, first, *overrides):
    return start_run(
        load_config("tales", [*SMALL, f"train.init_from={first}", *overrides]),
        str(tmp_path / "next"),
    )


def state_of(workdir):
    there = start_run(load_config("tales", SMALL), str(workdir))
    with there.lock:
        return there.restore_or_init()


def test_parameters_are_taken_over_and_the_rest_is_new(first, tmp_path):
    state = trainer(
        tmp_path, first, "model.dropout=0.1", "model.z_loss=0.0001", "mesh.fsdp=True"
    ).restore_or_init()
    theirs = state_of(first)
    assert int(state.step) == 0 and int(theirs.step) == 3
    assert np.isinf(float(state.guard.best_loss))
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
        (
            ["data.tokenizer=char"],
            r"another tokenizer \(there byte of 257 ids, here char.*set data.tokenizer=byte",
        ),
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
    learned.save(str(tmp_path))
    spec = f"hf:{tmp_path}/tokenizer.json"
    origin = init_from.Origin("here", ModelConfig(), learned, spec)
    init_from.check_tokenizer(origin, read_vocabulary(spec))
    with pytest.raises(
        UserError, match=rf"set data.tokenizer={spec}, or take it with --config=finetune"
    ):
        init_from.check_tokenizer(origin, BpeTokenizer.train(["another text"], 270))


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


# What a fine-tuning takes seconds with.
TUNED = [
    "data.source=tales:100",
    "data.batch_size=8",
    "train.num_steps=2",
    "train.log_every_steps=1",
    "eval.every_steps=0",
    "optimizer.warmup_steps=0",
    "sample.max_tokens=0",
    "writers.plot=False",
    "mesh.data=1",
]


def tuning(origin, *overrides):
    return load_config("finetune", [*TUNED, f"train.init_from={origin}", *overrides])


def test_fine_tuning_takes_model_and_tokenizer_from_a_run(first, tmp_path):
    """No setting of the model is typed again; those that weights don't depend on stay the config's
    own.
    """
    begun = start_run(
        tuning(first, "model.dropout=0.1", "model.remat=dots"), str(tmp_path / "next")
    )
    theirs = state_of(first)
    with begun.lock:
        state = begun.restore_or_init()
    assert all(map(np.array_equal, jax.tree.leaves(state.params), jax.tree.leaves(theirs.params)))
    origin = from_dict(
        ModelConfig, json.loads((first / "config.json").read_text())["config"]["model"]
    )
    assert begun.config.model == dataclasses.replace(origin, dropout=0.1, remat="dots", unroll=1)
    assert (begun.config.data.seq_len, begun.config.data.tokenizer) == (16, "byte")


def test_a_tokenizer_that_no_setting_names_comes_along_and_the_origin_may_go(tmp_path):
    """Characters of another text than the one that is fine-tuned on."""
    (tmp_path / "broad.txt").write_text("abcdefghijklmnopqrstuvwxyz .,\n" * 40)
    (tmp_path / "narrow.txt").write_text("a bad cab. " * 80)
    broad = [
        *SMALL,
        f"data.source=text:{tmp_path}/broad.txt",
        "data.tokenizer=char",
        "train.num_steps=1",
    ]
    start_run(load_config("tales", broad), str(tmp_path / "origin")).run()
    config = tuning(tmp_path / "origin", f"data.source=text:{tmp_path}/narrow.txt")
    outcome = start_run(config, str(tmp_path / "next")).run()
    assert outcome.step == 2
    tuned = open_run(str(tmp_path / "next"), mesh_config=MeshConfig(data=1))
    assert tuned.tokenizer.fingerprint == open_run(str(tmp_path / "origin")).tokenizer.fingerprint
    shutil.rmtree(tmp_path / "origin")
    with jax.set_mesh(tuned.mesh):
        assert score_text(tuned, ScoreRequest(max_batches=1))["loss"] > 0
    again = start_run(config, str(tmp_path / "next"))
    assert int(again.restore_or_init().step) == 2
    again.lock.close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder of Hugging Face, of a Llama that took a step."""
    folder = tmp_path_factory.mktemp("exported")
    llama = [
        *SMALL,
        "model.qk_norm=False",
        "model.mlp=swiglu",
        "model.tie_embeddings=False",
        "train.num_steps=1",
    ]
    start_run(load_config("tales", llama), str(folder / "run")).run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "transformers_logits", lambda folder, tokens: None)
        models.export_hf(
            open_run(str(folder / "run"), mesh_config=MeshConfig(data=1)), str(folder / "hf")
        )
    (folder / "hf" / "tinylm_tokenizer.json").unlink()  # as a folder of others has its tokenizer
    return folder / "hf"


def test_fine_tuning_starts_from_a_folder_of_hugging_face(exported, tmp_path):
    """On a mesh that splits parameters; longer texts than before, as rotary positions allow."""
    config = tuning(
        f"hf:{exported}",
        "mesh.data=2",
        "mesh.model=2",
        "mesh.fsdp=True",
        "model.context=32",
        "data.seq_len=32",
    )
    begun = start_run(config, str(tmp_path / "next"))
    state = begun.restore_or_init()
    theirs = models.import_hf(str(exported)).params
    assert all(map(np.array_equal, jax.tree.leaves(state.params), jax.tree.leaves(theirs)))
    assert begun.config.model.context == begun.config.data.seq_len == 32
    assert begun.config.data.tokenizer == f"hf:{exported}/tokenizer.json"
    assert begun.run().step == 2
    assert (
        open_run(str(tmp_path / "next")).tokenizer.fingerprint == begun.data.tokenizer.fingerprint
    )


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (
            ["train.init_from="],
            r"train.init_model needs train.init_from: the folder of a run, or hf:DIR",
        ),
        (["train.init_from=nowhere"], r"train.init_from=nowhere holds no run.*hf:DIR"),
        (
            ["train.init_from=hf:nowhere"],
            r"train.init_from=hf:nowhere is not a folder; download the model first",
        ),
        (
            ["model.embed_dim=64", "model.mlp=swiglu"],
            r"model.embed_dim \(there 16, here 64\), model.mlp \(there 'relu2'",
        ),
        (["data.tokenizer=char"], r"takes the tokenizer from.*leave out data.tokenizer=char"),
        (["data.vocab_top_k=100"], r"leave out data.vocab_top_k=100"),
        (["model.router_z_loss=0.001"], r"model.router_z_loss=0.001 is for models with experts"),
    ],
)
def test_what_fine_tuning_cannot_take_over_is_one_line(first, tmp_path, overrides, wanted):
    with pytest.raises(UserError, match=wanted) as caught:
        start_run(tuning(first, *overrides), str(tmp_path / "next"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "next").exists()


def test_a_folder_of_hugging_face_has_no_optimizer_and_may_have_another_tokenizer(
    exported, tmp_path
):
    for overrides, wanted in {
        ("train.init_optimizer=True",): r"is an imported model, which has no optimizer",
        ("train.init_model=False", f"data.tokenizer=hf:{exported}/tokenizer.json"): (
            r"model of other settings: model.embed_dim.*take all with --config=finetune"
        ),
        (
            "train.init_model=False",
            "data.tokenizer=bpe:300",
        ): r"another tokenizer.*take it with --config=finetune",
    }.items():
        with pytest.raises(UserError, match=wanted) as caught:
            start_run(
                tuning(f"hf:{exported}", "data.seq_len=16", *overrides), str(tmp_path / "next")
            )
        assert "\n" not in str(caught.value)


def test_commands_that_train_nothing_know_the_model_that_would_be_trained(exported, tmp_path):
    """`show` and `prepare` take the vocabulary and the tokenizer from the origin as well."""
    flags = [f"--config.train.init_from=hf:{exported}", "--config.data.source=tales:100", "--json"]
    shown = call_command("tinylm.show", "--config=finetune", *flags)
    assert shown.returncode == 0, shown.stderr
    imported = models.import_hf(str(exported))
    sizes = weights.unpadded_shapes(imported.model)
    assert json.loads(shown.stdout)["num_parameters"] == sum(map(math.prod, sizes.values()))
    prepared = call_command("tinylm.prepare", "--config=finetune", *flags)
    assert prepared.returncode == 0, prepared.stderr
    assert json.loads(prepared.stdout)["vocab_size"] == imported.tokenizer.vocab_size


def test_another_kind_of_muon_is_another_optimizer():
    muon = OptimizerConfig(name="muon")
    config = {"optimizer": to_dict(muon), "train": to_dict(TrainConfig())}
    origin = SimpleNamespace(where="there", record={"config": config})
    init_from._check_optimizer(origin, muon)
    with pytest.raises(UserError, match="muon_beta2 alike"):
        init_from._check_optimizer(origin, OptimizerConfig(name="muon", muon_beta2=0.95))


def test_positions_stretch_where_the_config_says_so_and_stay_otherwise():
    scaled = {"rotary_scaling": "llama3", "rotary_factor": 8.0}
    theirs = ModelConfig(embed_dim=16, **scaled).resolve(65, 64)
    origin = init_from.Origin("there", theirs, None, "byte")
    taken = ModelConfig()
    init_from._take_model(taken, origin)
    assert taken == theirs

    # Four times as long texts by YaRN, of a model that was trained without scaling.
    origin = init_from.Origin("there", ModelConfig(embed_dim=16).resolve(65, 64), None, "byte")
    stretched = ModelConfig(rotary_scaling="yarn", rotary_factor=4.0, context=256)
    init_from._take_model(stretched, origin)
    assert (stretched.rotary_scaling, stretched.embed_dim, stretched.context) == ("yarn", 16, 256)
    assert stretched.resolve(65, 256).rotary_original_context == 64
