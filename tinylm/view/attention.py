"""The attention weights of a model over a text.

A head's output is its weights times its values. So with an identity matrix for values the output is
the weights, by the production code itself, whatever its windows, positions, grouped heads and soft
limits.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.core.errors import UserError
from tinylm.model.transformer import LayerInputs, Transformer, abstract_transformer
from tinylm.model.visibility import Visibility
from tinylm.run.open_run import Run

MOST_TOKENS = 64


def attention_of(run: Run, text: str) -> tuple[list[str], np.ndarray]:
    """Return the first tokens of `text` after its begin, as strings, and the weights of every head
    over them.
    """
    ids = [run.start_id, *run.tokenizer.encode(text)][: min(MOST_TOKENS, run.model_config.context)]
    if len(ids) < 2:
        raise UserError("--attention_text has no tokens; give a sentence.")
    config = dataclasses.replace(run.model_config, attention="xla", compute_dtype="float32")
    model = nnx.merge(abstract_transformer(config)[0], run.params)
    with jax.set_mesh(run.mesh):
        weights = np.asarray(
            jax.jit(lambda tokens: attention_weights(model, tokens))(jnp.asarray([ids]))
        )
    return ["⏎", *(run.tokenizer.decode([token]) for token in ids[1:])], weights


def attention_weights(model: Transformer, tokens_1T: jax.Array) -> jax.Array:
    """Return weights_LNTS of one row of tokens."""
    positions_1T = jnp.arange(tokens_1T.shape[1])[None]
    inputs = model.layer_inputs(positions_1T, Visibility())
    x_BTD = model.embed(tokens_1T, positions_1T)
    weights = []
    for layer, (block, copy) in enumerate(
        zip(model.unstacked_blocks(), model.unstacked_blocks(), strict=True)
    ):
        layer_inputs = inputs.of_layer(layer, model.window_of_layer(layer))
        weights.append(_weights(copy, x_BTD, layer_inputs)[0])
        x_BTD = block(x_BTD, layer_inputs)[0]
    return jnp.stack(weights)


def _weights(block: Any, x_BTD: jax.Array, inputs: LayerInputs) -> jax.Array:
    """Return weights_BNTS of a block whose values become the identity; the block is spoiled."""
    num_tokens = x_BTD.shape[1]
    num_kv_heads = block.attention.config.num_kv_heads
    identity_TS = jnp.eye(num_tokens)[None, :, None]
    identity_1TKS = jnp.broadcast_to(identity_TS, (1, num_tokens, num_kv_heads, num_tokens))
    block.attention.value = lambda x_BTD: identity_1TKS
    block.attention.out = lambda o_BTNS: o_BTNS
    weights_BTNS, _ = block.attention(block.attention_norm(x_BTD), inputs)
    return weights_BTNS.swapaxes(1, 2)
