"""Properties of the model: causality, the cache, scan, remat, padding, tied weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers import tiny_model
from tinylm.model.transformer import Transformer, abstract_transformer, init_parameters

VARIANTS = {
    "default": {},
    "gpt2": {"position": "learned", "norm": "layernorm", "bias": True, "qkv_bias": True},
    "llama": {"mlp": "swiglu", "num_kv_heads": 2, "tie_embeddings": False},
    "neox": {"rotary_fraction": 0.25, "parallel_residual": True, "norm": "layernorm", "bias": True},
    "neo": {"attention_window": (0, 3), "attention_scale": 1.0, "position": "learned", "bias": True},
    "mixed_heads": {"attention_window": (4,), "local_heads": 2, "qk_norm": True, "mlp": "relu2"},
    "capped": {"attention_softcap": 5.0, "logit_softcap": 10.0, "mlp": "geglu", "residual_scale": 0.5},
}
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 65, (2, 16)))


def build(**changes) -> Transformer:
    return Transformer(tiny_model(init_std=0.3, **changes), rngs=nnx.Rngs(params=0))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_depend_on_no_later_token(name):
    """By gradient: d logits[t] / d embedding of token s is zero for s > t, and not for s = t."""
    model = build(**VARIANTS[name])

    def logits_at(x_BTD, t):
        table = model.embedding[...]
        shifted = jax.tree.map(lambda p: p, model)
        shifted._embed = lambda tokens, positions: x_BTD + 0 * table.sum()
        return shifted(TOKENS)[0, t, :65].sum()

    x_BTD = model.embedding[...][TOKENS]
    for t in (0, 7, 15):
        per_token = jnp.abs(jax.grad(logits_at)(x_BTD, t)[0]).sum(-1)
        assert per_token[t] > 0
        np.testing.assert_array_equal(per_token[t + 1 :], 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_equals_the_full_forward(name):
    """A prefill of 5 tokens, one of 3, then token by token."""
    model = build(**VARIANTS[name])
    full = model(TOKENS)
    cache, start, got = model.init_cache(2, 16), 0, []
    for length in (5, 3, 1, 1, 1, 1, 1, 1, 1, 1):
        positions = jnp.broadcast_to(start + jnp.arange(length), (2, length))
        x, cache = model.decode(TOKENS[:, start : start + length], positions, cache)
        got.append(model.logits(x))
        start += length
    np.testing.assert_allclose(jnp.concatenate(got, 1), full, atol=2e-4)


def loss_and_grads(config):
    graph, _, _ = abstract_transformer(config)
    params = init_parameters(config, 0)
    return jax.value_and_grad(lambda p: jnp.square(nnx.merge(graph, p)(TOKENS)[..., :65]).mean())(params), graph, params


@pytest.mark.parametrize("changes", [{"unroll": 2}, {"unroll": 0}, {"remat": "full"}, {"remat": "dots"}])
def test_scan_unrolled_and_rematerialized_layers_agree(changes):
    plain = tiny_model(num_layers=4)
    (loss, grads), _, _ = loss_and_grads(plain)
    (other_loss, other_grads), _, _ = loss_and_grads(dataclasses.replace(plain, **changes))
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_remat_is_on():
    """The backward pass of a rematerialized model computes the forward's tanh again."""

    def count(remat):
        config = tiny_model(remat=remat)
        graph, shapes, _ = abstract_transformer(config)
        text = str(jax.make_jaxpr(jax.grad(lambda p: nnx.merge(graph, p)(TOKENS).sum()))(shapes))
        return text.count(" tanh ")

    assert count("full") > count("none")


def test_padded_ids_never_win_and_cost_nothing():
    model = build()
    logits = model(TOKENS)
    assert logits.shape[-1] == 128
    probabilities = jax.nn.softmax(logits, -1)
    np.testing.assert_array_equal(probabilities[..., 65:], 0)


def test_the_tied_embedding_is_one_leaf():
    _, tied, _ = abstract_transformer(tiny_model())
    _, untied, _ = abstract_transformer(tiny_model(tie_embeddings=False))
    assert "head" not in tied
    assert untied["head"].shape == (32, 128)
    assert len(jax.tree.leaves(untied)) == len(jax.tree.leaves(tied)) + 1


def test_a_window_hides_what_is_farther():
    model = build(num_layers=1, attention_window=(4,))
    changed = TOKENS.at[0, 3].set((TOKENS[0, 3] + 1) % 65)
    differs = jnp.any(model(TOKENS)[0] != model(changed)[0], axis=-1)
    np.testing.assert_array_equal(np.flatnonzero(differs), [3, 4, 5, 6])


def test_bfloat16_computes_near_float32():
    exact = build()(TOKENS)[..., :65]
    rough = build(compute_dtype="bfloat16")(TOKENS)[..., :65]
    assert rough.dtype == jnp.float32
    assert 0 < float(jnp.abs(exact - rough).max()) < 0.1 * float(jnp.abs(exact).max())
