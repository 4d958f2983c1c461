"""What formulas say of rows that the mesh splits is near to what the compiler does."""

import jax
import pytest

from tinylm.config import load_config
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.tools.plan import make_plan
from tinylm.tools.search import activation_bytes, search

SMALL = [
    "model.vocab_size=256",
    "model.embed_dim=64",
    "model.num_layers=2",
    "model.num_heads=4",
    "model.num_kv_heads=2",
    "model.mlp_dim=128",
    "model.unroll=1",
    "model.compute_dtype=float32",
    "model.tie_embeddings=false",
    "optimizer.name=adamw",
    "train.accumulation_steps=1",
    "data.batch_size=4",
]


def plan(*settings):
    config = load_config("llama:110m", [*SMALL, *settings]).resolve(0)
    return make_plan(config, make_mesh(config.mesh, jax.devices()[:4]))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(("model.remat=none",), id="ring"),
        pytest.param(("model.remat=full",), id="ring again", marks=pytest.mark.slow),
        pytest.param(("model.context_attention=gather",), id="gather", marks=pytest.mark.slow),
        pytest.param(("model.attention_window=(33,)", "model.remat=none"), id="neighbours"),
    ],
)
def test_a_step_sends_and_keeps_what_the_formulas_say(settings):
    settings = ("data.seq_len=512", "mesh.context=4", *settings)
    found = plan(*settings)
    assert {row.axis for row in found.collectives} == {"context"}
    sent = sum(row.bytes_per_step for row in found.collectives)
    needed = sum(row.minimum_bytes for row in found.collectives)
    assert sent == pytest.approx(needed, rel=0.15)
    config = load_config("llama:110m", [*SMALL, *settings]).resolve(0)
    row_bytes = activation_bytes(config.model, 1, config.data.seq_len, context_ways=4)
    kept_bytes = found.per_device_bytes["activations"]
    assert kept_bytes == pytest.approx(config.data.batch_size * row_bytes, rel=0.25)


def test_activations_of_a_device_are_its_part_of_all():
    """With windows, since blocks of logits don't shrink in proportion."""
    settings = ("data.seq_len=4096", "model.remat=full", "model.attention_window=(17,)")
    two, four = (
        plan(*settings, "mesh.data=1", f"mesh.context={n}").per_device_bytes["activations"]
        for n in (2, 4)
    )
    assert four == pytest.approx(two / 2, rel=0.05)


def test_a_search_splits_long_rows_alone():
    for length, contexts in ((1024, {1}), (8192, {1, 2, 4})):
        config = load_config("llama:110m", [*SMALL, f"data.seq_len={length}"]).resolve(0)
        rows = search(config, jax.devices()[:4], compiled=0)
        assert {row.mesh["context"] for row in rows} == contexts
        one = MeshConfig(**rows[0].mesh)
        assert one.sizes(4) == (1, one.data, one.context, one.model)
