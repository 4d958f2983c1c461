"""Properties of the model: causality, the cache, scan, remat, padding, tied weights."""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_model

from tinylm.model import layers
from tinylm.model.transformer import abstract_transformer, init_parameters

VARIANTS = {
    "default": {},
    "gpt2": {"position": "learned", "norm": "layernorm", "bias": True, "qkv_bias": True},
    "llama": {"mlp": "swiglu", "num_kv_heads": 2, "tie_embeddings": False},
    "neox": {"rotary_fraction": 0.25, "parallel_residual": True, "norm": "layernorm", "bias": True},
    "neo": {
        "attention_window": (0, 3),
        "attention_scale": 1.0,
        "position": "learned",
        "bias": True,
    },
    "mixed_heads": {"attention_window": (4,), "local_heads": 2, "qk_norm": True, "mlp": "relu2"},
    "capped": {
        "attention_softcap": 5.0,
        "logit_softcap": 10.0,
        "mlp": "geglu",
        "residual_scale": 0.5,
    },
    "experts": {"num_experts": 4, "expert_dim": 24, "shared_experts": 1, "dense_layers": 1},
    "convolved": {"conv_taps": 4, "attention_window": (0, 3), "mlp": "relu2"},
}
CPU = "".join(path.read_text() for path in pathlib.Path("/proc").glob("cpuinfo"))
DTYPES = (jnp.bfloat16, jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 65, (2, 16)))


@functools.cache
def build(name: str, **changes):
    """Return (graph, parameters) of a variant with weights large enough to make differences
    seen.
    """
    config = tiny_model(init_std=0.3, **VARIANTS[name], **changes)
    params = jax.jit(lambda: init_parameters(config, 0))()
    for part in ("attention", "mlp") if config.conv_taps else ():  # they begin at 0
        taps = params["blocks"][part]["conv"]["taps"]
        params["blocks"][part]["conv"]["taps"] = taps + np.random.default_rng(0).normal(
            size=taps.shape
        )
    return abstract_transformer(config)[0], params


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
            if model.head is None:
                # Their squares would not do: the last norm makes them add up to a constant.
                return (x_BTD * jnp.arange(x_BTD.shape[-1])).sum()
            return (x_BTD @ params["head"]).sum()

        return jnp.abs(jax.grad(logit)(params["embedding"])).sum(-1)[:16]

    for t in (0, 7, 15):
        per_token = sensitivity(t)
        assert per_token[t] > 0
        np.testing.assert_array_equal(per_token[t + 1 :], 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_cached_decoding_equals_the_full_forward(name):
    """Prompts of 6 and 2 tokens, padded on the left to 8, then token by token; then the second row
    alone.
    """
    graph, params = build(name)
    whole = logits_of(graph, params, TOKENS)

    @jax.jit
    def prefill(tokens, lengths):
        model = nnx.merge(graph, params)
        x, cache = model.prefill(tokens, jnp.arange(8) - (8 - lengths)[:, None], 18)
        return model.logits(x[:, -1:])[:, 0], cache

    @jax.jit
    def decode(tokens, positions, slot, cache):
        model = nnx.merge(graph, params)
        x, cache = model.decode(tokens, positions, slot, cache, model.unstacked_blocks())
        return model.logits(x[:, None])[:, 0], cache

    for rows in ([0, 1], [1]):
        lengths = np.array([6, 2])[rows]
        prompts = np.stack(
            [np.r_[[9] * (8 - n), TOKENS[row, :n]] for row, n in zip(rows, lengths, strict=True)]
        )
        logits, cache = prefill(prompts, lengths)
        for t in range(10):
            np.testing.assert_allclose(logits, whole[rows, lengths + t - 1], atol=2e-4)
            tokens = np.asarray(TOKENS)[rows, lengths + t]
            logits, cache = decode(tokens, lengths + t, 8 + t, cache)
    config = tiny_model(**VARIANTS[name])
    kept = [
        window if window and not config.local_heads else 18
        for window in config.attention_window * 2
    ]
    assert [k.shape[-2] for k, *_ in cache] == kept[: len(cache)]


def loss_and_grads(config):
    graph = abstract_transformer(config)[0]
    params = jax.jit(lambda: init_parameters(config, 0))()
    loss = jax.jit(
        jax.value_and_grad(lambda p: jnp.square(nnx.merge(graph, p)(TOKENS)[..., :65]).mean())
    )
    return loss(params)


@pytest.mark.parametrize(
    "changes", [{"unroll": 2}, {"unroll": 0}, {"remat": "full"}, {"remat": "dots"}]
)
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
    differs = jnp.any(
        logits_of(graph, params, TOKENS)[0] != logits_of(graph, params, changed)[0], axis=-1
    )
    np.testing.assert_array_equal(np.flatnonzero(differs), [3, 4, 5, 6])


@pytest.mark.parametrize("name", ["default", "convolved"])
def test_packed_documents_equal_separate_ones(name):
    graph, params = build(name)
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


def gradients_of_a_product(dtype):
    """Return the lowered gradient of a linear map's input and kernel, and its arguments in
    `dtype`.
    """
    linear = layers.Linear(
        {"embed": 128}, {"mlp": 512}, std=0.1, bias=False, rngs=nnx.Rngs(params=0)
    )
    graph, params = nnx.split(linear)
    rng = np.random.default_rng(0)
    x, dy = (
        jnp.asarray(rng.normal(size=(4, 64, size)), jnp.bfloat16).astype(dtype)
        for size in (128, 512)
    )
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    backward = jax.jit(
        jax.grad(lambda p, x: (nnx.merge(graph, p)(x) * dy).sum(dtype=jnp.float32), argnums=(0, 1))
    )
    return backward.lower(params, x), (params, x)


def test_bfloat16_products_have_the_gradients_of_their_rounded_operands():
    rough, exact = (
        jax.tree.leaves(low.compile()(*args)) for low, args in map(gradients_of_a_product, DTYPES)
    )
    for ours, theirs in zip(rough, exact, strict=True):
        np.testing.assert_allclose(
            ours, theirs, rtol=0.005, atol=0.005 * float(jnp.abs(theirs).max())
        )


@pytest.mark.skipif("avx512_bf16" not in CPU, reason="needs bfloat16 on the CPU")
def test_a_cpu_that_has_bfloat16_multiplies_in_it():
    text = gradients_of_a_product(jnp.bfloat16)[0].compile().as_text()
    operands = dict(re.findall(r"(%\S+) = (\w+)\[", text))
    products = re.findall(r" dot\((%\S+), (%\S+)\)", text)
    assert len(products) == 2 and {operands[name] for pair in products for name in pair} == {"bf16"}
