"""One check of types for every way a value gets into a config, bounds in one place, and a frozen
result.
"""

import copy
import dataclasses
import math

import numpy as np
import pytest

from tinylm.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    load_config,
)
from tinylm.core.errors import UserError
from tinylm.core.settings import Bounds, from_dict, nearest_setting, settings_of, to_dict

WRONG = {
    "float for int": (
        "train",
        "num_steps",
        4e1,
        r"train.num_steps=40.0 must be a whole number.*; write 40",
    ),
    "part of a number": (
        "train",
        "num_steps",
        4.5,
        r"train.num_steps=4.5 must be a whole number \(int\), not float",
    ),
    "bool for int": ("train", "num_steps", True, "train.num_steps=True must be a whole number"),
    "text for int": ("data", "batch_size", "8", "data.batch_size='8' must be a whole number"),
    "text for number": (
        "optimizer",
        "learning_rate",
        "1e-3",
        "optimizer.learning_rate='1e-3' must be a number",
    ),
    "no number": (
        "optimizer",
        "learning_rate",
        None,
        "optimizer.learning_rate=None must be a number",
    ),
    "a number beyond floats": (
        "optimizer",
        "learning_rate",
        10**400,
        "optimizer.learning_rate=10+ must be a number",
    ),
    "int for bool": ("mesh", "fsdp", 1, "mesh.fsdp=1 must be True or False"),
    "number for text": ("data", "source", 3, "data.source=3 must be a text"),
    "entry of a tuple": (
        "model",
        "attention_window",
        (0, 4.0),
        "model.attention_window=4.0 must be a whole number",
    ),
    "nested tuple": ("sample", "prompts", [["a"]], r"sample.prompts=\['a'\] must be a text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_value_of_another_type_is_refused_however_it_is_set(case, tmp_path):
    section, name, value, wanted = WRONG[case]
    with pytest.raises(UserError, match=wanted):
        setattr(getattr(Config(), section), name, value)
    with pytest.raises(UserError, match=wanted):
        type(getattr(Config(), section))(**{name: value})
    with pytest.raises(UserError, match=wanted):
        dataclasses.replace(getattr(Config(), section), **{name: value})
    record = to_dict(Config())
    record[section][name] = value
    with pytest.raises(UserError, match=f"^config.json: {wanted}"):
        from_dict(Config, record)
    file = tmp_path / "own.py"
    lines = ["import tinylm.config", "", "def get_config():", "    c = tinylm.config.Config()"]
    file.write_text("\n".join([*lines, f"    c.{section}.{name} = {value!r}", "    return c", ""]))
    with pytest.raises(UserError, match=f"^{file}:5: {wanted}") as caught:
        load_config(str(file))
    assert "\n" not in str(caught.value)


def test_what_loses_nothing_is_converted_to_one_form():
    config = Config(sample=SampleConfig(prompts="Once"), model=ModelConfig(attention_window=[0, 4]))
    assert config.sample.prompts == ("Once",)
    assert config.model.attention_window == (0, 4)
    config.sample.prompts = ["a", "b"]
    config.optimizer.learning_rate = 1
    config.data.batch_size = np.int64(8)
    config.optimizer.beta1 = np.float32(0.5)
    values = (
        config.sample.prompts,
        config.optimizer.learning_rate,
        config.data.batch_size,
        config.optimizer.beta1,
    )
    assert values == (("a", "b"), 1.0, 8, 0.5)
    assert [type(value) for value in values] == [tuple, float, int, float]
    assert from_dict(Config, to_dict(config)) == config


@pytest.mark.parametrize(
    ("value", "prompts"),
    [
        ("Once", ("Once",)),
        ("Once upon a time", ("Once upon a time",)),
        ("Once, it's 3", ("Once, it's 3",)),
        ("3", ("3",)),
        ("", ("",)),
        ("'a b'", ("a b",)),
        ("('a', 'b')", ("a", "b")),
        ("['a', 'b']", ("a", "b")),
    ],
)
def test_a_prompt_on_the_command_line_is_one_text_unless_it_is_written_as_several(value, prompts):
    assert load_config("tales", [f"sample.prompts={value}"]).sample.prompts == prompts


def test_a_whole_section_must_be_of_its_type():
    with pytest.raises(UserError, match=r"train=.* must be a TrainConfig, not dict"):
        Config(train={"num_steps": 5})
    config = Config()
    config.mesh = MeshConfig(data=2)
    assert config.mesh.data == 2


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.max_iters", "train.num_steps"),
        ("max_steps", "train.num_steps"),
        ("block_size", "data.seq_len"),
        ("model.block_size", "data.seq_len"),
        ("n_embd", "model.embed_dim"),
        ("n_layer", "model.num_layers"),
        ("n_head", "model.num_heads"),
        ("lr", "optimizer.learning_rate"),
        ("hidden_size", "model.embed_dim"),
        ("num_hidden_layers", "model.num_layers"),
        ("rope_theta", "model.rotary_base"),
        ("gradient_accumulation_steps", "train.accumulation_steps"),
        ("grad_clip", "optimizer.clip_norm"),
        ("base_emb_dim", "model.embed_dim"),
        ("max_target_length", "data.seq_len"),
        ("dcn_data_parallelism", "mesh.replica"),
        ("batch_size", "data.batch_size"),
        ("optimizer.batch_size", "data.batch_size"),
        ("evaluate.every_steps", "eval.every_steps"),
        ("model.embd_dim", "model.embed_dim"),
    ],
)
def test_an_unknown_name_leads_to_the_setting_that_is_meant(key, meant):
    assert nearest_setting(key) == f"; did you mean {meant!r}?"


def test_an_unknown_attribute_is_refused_and_names_the_nearest():
    config = Config()
    with pytest.raises(
        UserError, match=r"train.max_steps is not a setting; did you mean 'train.num_steps'"
    ):
        config.train.max_steps = 5
    with pytest.raises(
        UserError, match=r"train.max_steps is not a setting; did you mean 'train.num_steps'"
    ):
        type(config.train)(max_steps=5)
    with pytest.raises(UserError, match="evla is not a setting; did you mean 'eval'"):
        config.evla = 5
    with pytest.raises(
        AttributeError, match=r"train.nmu_steps is not a setting; did you mean 'train.num_steps'"
    ):
        _ = config.train.nmu_steps
    with pytest.raises(UserError, match=r"config.json: train.max_steps is not a setting"):
        from_dict(Config, {"train": {"max_steps": 5}})


def test_no_name_of_another_program_is_a_setting_or_stands_for_two():
    fields = {key: field for key, field, _ in settings_of(Config())}
    aliases = [alias for field in fields.values() for alias in field.metadata["aliases"]]
    assert len(aliases) == len(set(aliases))
    assert not {key.rpartition(".")[2] for key in fields} & set(aliases)


def test_every_default_is_of_its_type_and_within_its_bounds():
    Config().check()
    for key, field, value in settings_of(Config()):
        assert value == field.default, key
        assert field.metadata["bounds"].admits(value), key


@pytest.mark.parametrize(
    ("bounds", "admitted", "refused", "words"),
    [
        (Bounds(least=1), [1, 2], [0, math.nan], "at least 1"),
        (Bounds(above=0, most=1), [0.5, 1], [0, 1.1, math.nan], "above 0 and at most 1"),
        (Bounds(least=0, below=2**31), [0, 2**31 - 1], [-1, 2**31], "at least 0 and below 2^31"),
        (Bounds(least=2, also=(0,)), [0, 2], [1, -1], "at least 2, or 0"),
        (Bounds(choices=("a", "b")), ["a"], ["c", ""], "one of a, b"),
        (Bounds(least=0), [(), (0, 1)], [(0, -1)], "at least 0"),
        (Bounds(), [0, "x", ()], [], ""),
    ],
)
def test_bounds_say_what_they_hold(bounds, admitted, refused, words):
    assert all(map(bounds.admits, admitted))
    assert not any(map(bounds.admits, refused))
    assert str(bounds) == words


def test_every_bound_is_checked_in_the_whole_config():
    """Each setting with bounds, moved just outside of one of them, is refused by its key."""
    outside = 0
    for key, field, _ in settings_of(Config()):
        bounds = field.metadata["bounds"]
        wrong = [bounds.least - 1] if bounds.least is not None else []
        wrong += [limit for limit in (bounds.above, bounds.below) if limit is not None]
        wrong += [bounds.most + 1] if bounds.most is not None else []
        wrong += ["neither"] if bounds.choices else []
        for value in set(wrong) - set(bounds.also):
            config = Config()
            section, _, name = key.rpartition(".")
            setattr(getattr(config, section) if section else config, name, value)
            with pytest.raises(UserError, match=f"^{key}=.* must be "):
                config.check()
            outside += 1
    assert outside > 60


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_a_number_that_float32_cannot_hold_is_refused(value):
    with pytest.raises(UserError, match=r"optimizer.learning_rate=.* must be a finite number"):
        Config(optimizer=OptimizerConfig(learning_rate=value)).check()


def test_a_resolved_config_is_frozen_and_the_one_it_came_from_is_as_it_was():
    config = Config(data=DataConfig(seq_len=32))
    before = copy.deepcopy(config)
    resolved = config.resolve(100)
    assert config == before
    assert (resolved.model.vocab_size, resolved.model.context, resolved.model.mlp_dim) == (
        100,
        32,
        512,
    )
    for section in (
        resolved,
        resolved.model,
        resolved.optimizer,
        copy.deepcopy(resolved),
    ):
        name = dataclasses.fields(section)[0].name
        with pytest.raises(
            dataclasses.FrozenInstanceError, match="can't change: this config is resolved"
        ):
            setattr(section, name, getattr(section, name))
    config.train.num_steps = 7
    assert resolved.train.num_steps == 1000
    again = resolved.editable_copy()
    again.model.embed_dim = 64
    assert (again.model.embed_dim, resolved.model.embed_dim) == (64, 128)
    assert resolved.resolve(100) == resolved


def test_a_model_that_was_not_resolved_is_refused_where_it_is_built():
    from tinylm.model.transformer import abstract_transformer

    config = ModelConfig()
    config.resolve(65, 16)
    with pytest.raises(AssertionError, match="use what resolve"):
        abstract_transformer(config)


def test_micro_batch_rows_and_tokens_of_a_step_follow_from_the_config():
    config = load_config(
        "tales", ["data.batch_size=24", "data.seq_len=16", "train.accumulation_steps=3"]
    )
    assert (config.micro_batch_rows, config.data.tokens_per_step) == (8, 384)
