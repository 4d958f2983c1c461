"""The table of a model's parameters, and the true size of every config that states its
vocabulary.
"""

import dataclasses
import json
import math

import jax
import pytest
from helpers import call_command, run_command

from tinylm.config import load_config, shipped_configs
from tinylm.core.mesh import MeshConfig, make_mesh, parameter_sharding
from tinylm.core.placement import describe_parameter
from tinylm.core.settings import to_dict
from tinylm.run.folder import RunFolder
from tinylm.view.parameters import describe, table_text

PARAMETERS = {
    "tinystories:1m": 3_745_984,
    "tinystories:3m": 8_278_400,
    "tinystories:8m": 19_702_528,
    "tinystories:28m": 51_987_968,
    "tinystories:33m": 68_514_048,
    "smallm_60m": 29_995_392,
    "gpt2_124m": 124_439_808,
    "llama:15m": 15_191_712,
    "llama:42m": 41_689_600,
    "llama:110m": 109_529_856,
}


def table(name, *overrides, **mesh):
    config = load_config(name, overrides)
    config.mesh = MeshConfig(**mesh)
    config = config.resolve(config.model.vocab_size)
    return describe(config.model, make_mesh(config.mesh), config.mesh.fsdp)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_config_has_the_parameters_that_its_first_lines_say(name):
    assert table(name, data=1).num_parameters == PARAMETERS[name]
    stem, _, size = name.partition(":")
    opening = (shipped_configs() / f"{stem}.py").read_text().split('"""')[1]
    count = f"{PARAMETERS[name]:,}"
    if size:
        [line] = [line for line in opening.splitlines() if line.split()[:1] == [size]]
        assert line.split()[-1] == count
    else:
        assert f"{count} parameters" in opening.replace("\n", " ")


def test_smallm_is_sixty_million_by_name_alone():
    untied = table("smallm_60m", "model.tie_embeddings=False", data=1)
    assert untied.num_parameters == 49_294_080
    assert f"{untied.num_parameters:,}" in (shipped_configs() / "smallm_60m.py").read_text()


def test_the_published_shapes():
    """Sizes by hand: a TinyStories layer is 12 D^2 + 10 D; two embeddings and a last norm come on
    top.
    """
    D, L = 64, 8
    assert PARAMETERS["tinystories:1m"] == (50_257 + 2048) * D + L * (12 * D * D + 10 * D) + 2 * D
    D, L = 768, 12
    assert PARAMETERS["gpt2_124m"] == (50_257 + 1024) * D + L * (12 * D * D + 13 * D) + 2 * D
    D, F, L = 288, 768, 6
    assert PARAMETERS["llama:15m"] == 32_000 * D + L * (4 * D * D + 3 * D * F + 2 * D) + D


def test_bytes_are_those_of_the_shards():
    shown = table("tinystories:1m", data=4, model=2, fsdp=True)
    mesh = make_mesh(MeshConfig(data=4, model=2, fsdp=True))
    for row in shown.parameters:
        sharding = parameter_sharding(mesh, True, row.axes, row.shape)
        assert row.bytes_per_device == 4 * math.prod(sharding.shard_shape(row.shape))
        assert row.bytes == 4 * math.prod(row.shape)
        assert row.notes == ()
    assert shown.bytes == 4 * (PARAMETERS["tinystories:1m"] + 47 * 64)
    assert shown.bytes_per_device < 1.05 * shown.bytes / 8
    assert "3,745,984 parameters and 47 padding rows" in table_text(shown)


@pytest.mark.parametrize(
    ("axes", "shape", "split_by", "note"),
    [
        (
            ("embed", "heads", "head_dim"),
            (64, 3, 16),
            ("data", "", ""),
            "model (2) does not divide heads (3), leaves it whole on every device",
        ),
        (
            ("heads", "head_dim", "embed"),
            (4, 6, 30),
            ("model", "", ""),
            "data (4) does not divide embed (30), leaves it whole on every device",
        ),
        (
            ("vocab", "embed"),
            (128, 30),
            ("model", ""),
            "data (4) does not divide embed (30), leaves it whole on every device",
        ),
        (
            ("mlp", "embed"),
            (9, 30),
            ("", ""),
            "model (2) does not divide mlp (9), leaves it whole on every device",
        ),
        (
            ("heads", "head_dim", "embed"),
            (3, 8, 30),
            ("", "data", ""),
            "data (4) does not divide embed (30), splits head_dim instead",
        ),
    ],
)
def test_a_dimension_that_does_not_divide_is_told(axes, shape, split_by, note):
    place = describe_parameter(make_mesh(MeshConfig(data=4, model=2, fsdp=True)), True, axes, shape)
    assert place.split_by == split_by
    assert note in place.notes


def test_the_command_needs_no_data():
    done = run_command(
        "tinylm.show",
        "--config=tinystories:33m",
        "--cpu_devices=4",
        "--config.mesh.model=3",
        "--json",
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    done = run_command(
        "tinylm.show",
        "--config=tinystories:33m",
        "--cpu_devices=4",
        "--config.mesh.model=4",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["num_parameters"] == PARAMETERS["tinystories:33m"]
    assert shown["mesh"] == {"replica": 1, "data": 1, "context": 1, "model": 4}
    assert jax.device_count() == 8


def test_a_run_is_shown_as_it_ran(tmp_path):
    """On its own mesh, of four devices here, with no device but the one of this machine."""
    config = load_config("tales", ["model.embed_dim=64", "model.num_layers=2"]).resolve(1024)
    folder = RunFolder(str(tmp_path))
    folder.write_config(
        {"config": to_dict(config), "versions": {"mesh": {"replica": 1, "data": 2, "model": 2}}}
    )
    done = call_command("tinylm.show", f"--workdir={tmp_path}", "--json")
    assert done.returncode == 0, done.stderr
    mesh = make_mesh(MeshConfig(data=2, model=2))
    expected = dataclasses.asdict(describe(config.model, mesh, config.mesh.fsdp))
    assert json.loads(done.stdout) == json.loads(json.dumps(expected))


@pytest.mark.parametrize("flags", [[], ["--config=tales", "--workdir=x"]])
def test_either_a_config_or_a_run_is_shown(flags):
    done = call_command("tinylm.show", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: give either --config=NAME or --workdir=RUN.\n"


def test_the_command_takes_the_vocabulary_from_the_tokenizer():
    done = call_command("tinylm.show", "--config=tales")
    assert done.returncode == 0, done.stderr
    assert "vocabulary of 1,024 ids: data.tokenizer=bpe:1024" in done.stderr
    assert "embedding " in done.stdout
