"""Properties of the model: causality, the cache, scan, remat, padding, tied weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_model

from tinylm.model.transformer import abstract_transformer, init_parameters

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


@functools.cache
def build(name: str, **changes):
    """Return (graph, parameters) of a variant with weights large enough to make differences seen."""
    config = tiny_model(init_std=0.3, **VARIANTS[name], **changes)
    return abstract_transformer(config)[0], jax.jit(lambda: init_parameters(config, 0))()


def logits_of(graph, params, tokens):
    return jax.jit(lambda p, t: nnx.merge(graph, p)(t))(params, tokens)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_depend_on_no_later_token(name):
    """By gradient: d logits[t] / d embedding of token s is zero for s > t, and not for s = t."""
    graph, params = build(name)
    distinct = jnp.arange(16)[None]  # each position has a row of the embedding to itself

    @jax.jit
    def sensitivity(t):
        def logit(table):
            model = nnx.merge(graph, {**params, "embedding": table})
            x_BTD = model.features(distinct)
            x_BTD = x_BTD[:, t]
            return jnp.square(x_BTD).sum() if model.head is None else (x_BTD @ params["head"]).sum()

        return jnp.abs(jax.grad(logit)(params["embedding"])).sum(-1)[:16]

    for t in (0, 7, 15):
        per_token = sensitivity(t)
        assert per_token[t] > 0
        np.testing.assert_array_equal(per_token[t + 1 :], 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_equals_the_full_forward(name):
    """A prefill of 6 tokens, then token by token."""
    graph, params = build(name)

    @jax.jit
    def decode(cache, tokens, start):
        model = nnx.merge(graph, params)
        positions = jnp.broadcast_to(start + jnp.arange(tokens.shape[1]), tokens.shape)
        x, cache = model.decode(tokens, positions, cache)
        return model.logits(x), cache

    first, cache = decode(nnx.merge(graph, params).init_cache(2, 16), TOKENS[:, :6], 0)
    got = [first]
    for t in range(6, 16):
        logits, cache = decode(cache, TOKENS[:, t : t + 1], t)
        got.append(logits)
    np.testing.assert_allclose(jnp.concatenate(got, 1), logits_of(graph, params, TOKENS), atol=2e-4)


def loss_and_grads(config):
    graph = abstract_transformer(config)[0]
    params = jax.jit(lambda: init_parameters(config, 0))()
    loss = jax.jit(jax.value_and_grad(lambda p: jnp.square(nnx.merge(graph, p)(TOKENS)[..., :65]).mean()))
    return loss(params)


@pytest.mark.parametrize("changes", [{"unroll": 2}, {"unroll": 0}, {"remat": "full"}, {"remat": "dots"}])
def test_scan_unrolled_and_rematerialized_layers_agree(changes):
    plain = tiny_model(num_layers=4)
    loss, grads = loss_and_grads(plain)
    other_loss, other_grads = loss_and_grads(dataclasses.replace(plain, **changes))
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_remat_is_on():
    """The backward pass of a rematerialized model computes the forward's tanh again."""

    def count(remat):
        graph, shapes, _ = abstract_transformer(tiny_model(remat=remat))
        text = str(jax.make_jaxpr(jax.grad(lambda p: nnx.merge(graph, p)(TOKENS).sum()))(shapes))
        return text.count(" tanh ")

    assert count("full") > count("none")


def test_padded_ids_have_no_probability():
    logits = logits_of(*build("default"), TOKENS)
    assert logits.shape[-1] == 128
    np.testing.assert_array_equal(jax.nn.softmax(logits, -1)[..., 65:], 0)


def test_the_tied_embedding_is_one_leaf():
    tied = abstract_transformer(tiny_model())[1]
    untied = abstract_transformer(tiny_model(tie_embeddings=False))[1]
    assert "head" not in tied
    assert untied["head"].shape == (32, 128)
    assert len(jax.tree.leaves(untied)) == len(jax.tree.leaves(tied)) + 1


def test_a_window_hides_what_is_farther():
    graph, params = build("default", num_layers=1, attention_window=(4,))
    changed = TOKENS.at[0, 3].set((TOKENS[0, 3] + 1) % 65)
    differs = jnp.any(logits_of(graph, params, TOKENS)[0] != logits_of(graph, params, changed)[0], axis=-1)
    np.testing.assert_array_equal(np.flatnonzero(differs), [3, 4, 5, 6])


def test_packed_documents_equal_separate_ones():
    graph, params = build("default")
    separate = logits_of(graph, params, TOKENS[:1, :6]), logits_of(graph, params, TOKENS[:1, 6:])
    segments = jnp.asarray([[1] * 6 + [2] * 10])
    positions = jnp.asarray([[*range(6), *range(10)]])
    packed = nnx.merge(graph, params)(TOKENS[:1], segments_BT=segments, positions_BT=positions)
    np.testing.assert_allclose(packed, jnp.concatenate(separate, 1), atol=2e-4)


def test_bfloat16_computes_near_float32():
    exact = logits_of(*build("default"), TOKENS)[..., :65]
    rough = logits_of(*build("default", compute_dtype="bfloat16"), TOKENS)[..., :65]
    assert rough.dtype == jnp.float32
    assert 0 < float(jnp.abs(exact - rough).max()) < 0.1 * float(jnp.abs(exact).max())
