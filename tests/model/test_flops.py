"""FLOPs by formula are those of the operations of the forward pass, whatever the options."""

import collections
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import tiny_model
from jax.extend.core import jaxprs_in_params

from tinylm.model.flops import forward_flops_per_token
from tinylm.model.transformer import abstract_transformer

LENGTH = 16
OPTIONS = {
    "default": {},
    "untied": {"tie_embeddings": False},
    "gated": {"mlp": "swiglu"},
    "wide": {"mlp_dim": 96, "head_dim": 16},
    "grouped": {"num_kv_heads": 2},
    "one kv head": {"num_kv_heads": 1, "qk_norm": True},
    "parallel": {"parallel_residual": True, "bias": True, "qkv_bias": True, "norm": "layernorm"},
    "windows": {"attention_window": (0, 4)},
    "local heads": {"attention_window": (4,), "local_heads": 2},
    "learned": {"position": "learned", "logit_softcap": 5.0, "attention_softcap": 5.0},
    "bfloat16": {"compute_dtype": "bfloat16"},
    "deep": {"num_layers": 5},
    "convolved": {"conv_taps": 4},
}


def counts_of(jaxpr) -> collections.Counter:
    """Return FLOPs of products, and the elements that are multiplied and added, of a program."""
    counts = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[axis] for axis in contracted)
            counts["products"] += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name in ("mul", "add"):
            counts[equation.primitive.name] += math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1)
        for inner in jaxprs_in_params(equation.params):
            for name, count in counts_of(inner).items():
                counts[name] += times * count
    return counts


def counts_of_forward(config) -> collections.Counter:
    """Return the counts of a row of LENGTH tokens."""
    graph, params, _ = abstract_transformer(config)
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    program = jax.make_jaxpr(lambda params, tokens: nnx.merge(graph, params)(tokens))
    return counts_of(program(params, tokens).jaxpr)


def resolved(**options):
    # The vocabulary needs no padding, of which the formula knows nothing.
    config = tiny_model(**options).editable_copy()
    config.vocab_size = 128
    return config.resolve(128, LENGTH)


@pytest.mark.parametrize("name", OPTIONS)
def test_products_are_those_of_the_program(name):
    """A row of fewer than 64 tokens is one block, in which each query meets every key."""
    config = resolved(**OPTIONS[name])
    one_key = config.num_layers * 4 * config.num_heads * config.head_dim
    convolutions = config.num_layers * 4 * config.conv_taps * config.embed_dim
    maps = forward_flops_per_token(config, 1) - one_key - convolutions
    assert counts_of_forward(config)["products"] == LENGTH * (maps + LENGTH * one_key)


def test_taps_of_convolutions_are_counted():
    with_taps, without = resolved(conv_taps=4), resolved()
    formula = forward_flops_per_token(with_taps, LENGTH) - forward_flops_per_token(without, LENGTH)
    more = counts_of_forward(with_taps) - counts_of_forward(without)
    assert more["mul"] + more["add"] == LENGTH * formula > 0
