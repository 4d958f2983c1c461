"""The production block is the one written over named axes."""

import jax
import numpy as np
import pytest
from flax import nnx, traverse_util
from helpers import tiny_model

from tinylm.model.transformer import abstract_transformer, init_parameters
from tinylm.model.visibility import Visibility

pytest.importorskip("penzai", reason="penzai is not installed (the test extra)")

import named_block

GPT2 = {"position": "learned", "norm": "layernorm", "bias": True, "qkv_bias": True}
LLAMA = {"mlp": "swiglu", "num_kv_heads": 2, "rotary_fraction": 0.5}


@pytest.mark.parametrize("changes", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("window", [0, 3])
def test_the_block_over_named_axes_is_the_production_block(changes, window):
    config = tiny_model(init_std=0.3, num_layers=1, **changes)
    graph, _, axes = abstract_transformer(config)
    params = jax.jit(lambda: init_parameters(config, 0))()
    params = jax.tree.map(
        lambda p: p + 0.1 * np.random.default_rng(p.size).normal(size=p.shape), params
    )
    flat = traverse_util.flatten_dict(params["blocks"], sep="/")
    named = {path: named_block.name(p[0], *axes[f"blocks/{path}"][1:]) for path, p in flat.items()}
    x = np.random.default_rng(0).normal(size=(2, 16, config.embed_dim)).astype(np.float32)

    model = nnx.merge(graph, params)
    positions = np.broadcast_to(np.arange(16), (2, 16))
    layer_inputs = model.layer_inputs(positions, Visibility(window=window))
    ours = jax.jit(lambda x: model.unstacked_blocks()[0](x, layer_inputs)[0])(x)
    weights = traverse_util.unflatten_dict(named, sep="/")
    inputs = named_block.name(x, "batch", "seq", "embed")
    theirs = jax.jit(lambda weights, x: named_block.block(x, weights, config, window))(
        weights, inputs
    )
    np.testing.assert_allclose(ours, theirs.unwrap("batch", "seq", "embed"), atol=2e-5)
