"""Rows of 2^20 tokens, by their shapes alone: what is made of them grows with their length, never
with its square.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tinylm.model import transformer
from tinylm.model.config import ModelConfig
from tinylm.model.losses import next_token_loss
from tinylm.model.transformer import abstract_transformer

LENGTH = 2**20
WIDEST = 128  # features of a token: the padded vocabulary, and the mlp
VARIANTS = {
    "rotary": {"rotary_scaling": "yarn", "rotary_factor": 32.0},
    "learned": {"position": "learned"},
    "windows": {"attention_window": (0, 1024)},
    "convolved": {"conv_taps": 4},
    "dropout": {"dropout": 0.1},
    "pieces": {"loss_chunks": 1024, "remat": "full"},
}


def model_of(name):
    sizes = {"embed_dim": 32, "num_layers": 2, "num_heads": 2}
    config = ModelConfig(**{**sizes, **VARIANTS[name]}).resolve(65, LENGTH)
    config.check()
    return abstract_transformer(config)[:2]


def arrays_in(jaxpr) -> Iterator[jax.core.ShapedArray]:
    """Yield what each operation makes, those inside of loops and functions too."""
    for equation in jaxpr.eqns:
        yield from (out.aval for out in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "jaxpr"):
                inner = inner.jaxpr
            if hasattr(inner, "eqns"):
                yield from arrays_in(inner)


def largest(function, *arguments) -> float:
    """Return the numbers in the largest array that a function makes, for each token of a row."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return max(array.size for array in arrays_in(jaxpr)) / LENGTH


@pytest.fixture
def free_attention(monkeypatch):
    """Attention that costs nothing: kernels have tests of their own."""
    monkeypatch.setattr(transformer, "attend", lambda q_BNTH, *_, **__: q_BNTH)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_of_a_long_row_makes_no_square(name, free_attention):
    graph, params = model_of(name)
    whole, part = (1, LENGTH), jnp.int32
    batch = {
        "tokens": jax.ShapeDtypeStruct(whole, part),
        "targets": jax.ShapeDtypeStruct(whole, part),
        "weights": jax.ShapeDtypeStruct(whole, jnp.float32),
        "segments": jax.ShapeDtypeStruct(whole, part),
        "positions": jax.ShapeDtypeStruct(whole, part),
    }

    def loss(params, batch):
        keys = jax.random.split(jax.random.key(0), 1)
        return next_token_loss(nnx.merge(graph, params), batch, keys)[0]

    # What the layers keep for the backward pass is stacked.
    assert largest(jax.grad(loss), params, batch) <= 2 * WIDEST


def test_generation_from_a_long_prompt_makes_no_square(free_attention):
    graph, params = model_of("rotary")
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)

    def read(params, tokens, positions):
        return nnx.merge(graph, params).prefill(tokens, positions, LENGTH)

    assert largest(read, params, tokens, tokens) <= 2 * WIDEST


def test_a_token_after_a_long_prompt_costs_its_cache(monkeypatch):
    graph, params = model_of("rotary")
    shapes = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    with monkeypatch.context() as patch:
        patch.setattr(transformer, "attend", lambda q_BNTH, *_, **__: q_BNTH)
        _, cache = jax.eval_shape(
            lambda params, x: nnx.merge(graph, params).prefill(x, x, LENGTH), params, shapes
        )

    def write(params, cache, token_B, slot):
        model = nnx.merge(graph, params)
        return model.decode(token_B, token_B, slot, cache, model.unstacked_blocks())

    token_B = jax.ShapeDtypeStruct((1,), jnp.int32)
    slot = jax.ShapeDtypeStruct((), jnp.int32)
    # Keys of 16 features in each of two heads.
    assert largest(write, params, cache, token_B, slot) <= 2 * 16
