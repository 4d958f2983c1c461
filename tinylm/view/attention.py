"""The attention weights of a model over a text.

A head's output is its weights times its values. So with an identity matrix for values the output is the weights, by the
production code itself, whatever its windows, positions, grouped heads and soft limits.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.core.errors import UserError
from tinylm.model.attention import Visibility
from tinylm.model.layers import Dropout
from tinylm.model.transformer import Transformer, abstract_transformer
from tinylm.run.open_run import Run

MOST_TOKENS = 64


def attention_of(run: Run, text: str) -> tuple[list[str], np.ndarray]:
    """Return the first tokens of `text` after its begin, as strings, and the weights of every head over them."""
    ids = [run.start_id, *run.tokenizer.encode(text)][: min(MOST_TOKENS, run.model_config.context)]
    if len(ids) < 2:
        raise UserError("--attention_text has no tokens; give a sentence.")
    config = dataclasses.replace(run.model_config, attention="xla", compute_dtype="float32")
    model = nnx.merge(abstract_transformer(config)[0], run.params)
    with jax.set_mesh(run.mesh):
        weights = np.asarray(jax.jit(lambda tokens: attention_weights(model, tokens))(jnp.asarray([ids])))
    return ["⏎", *(run.tokenizer.decode([token]) for token in ids[1:])], weights


def attention_weights(model: Transformer, tokens_1T: jax.Array) -> jax.Array:
    """Return weights_LNTS of one row of tokens."""
    c, off = model.config, Dropout(0.0, None)
    positions = jnp.arange(tokens_1T.shape[1])[None]
    x_BTD, tables, found = model._embed(tokens_1T, positions), model._rotary(positions), []
    graph, stacked = nnx.split(model.blocks)
    for layer in range(c.num_layers):
        window = c.attention_window[layer % len(c.attention_window)]
        visible = Visibility(window=window, local_heads=c.local_heads)
        params = jax.tree.map(lambda p: p[layer], stacked)
        found.append(_weights(nnx.merge(graph, params), x_BTD, visible, tables)[0])
        x_BTD = nnx.merge(graph, params)(x_BTD, visible, tables, off)[0]
    return jnp.stack(found)


def _weights(block: Any, x_BTD: jax.Array, visible: Visibility, tables: tuple | None) -> jax.Array:
    """Return weights_BNTS of one block, whose values become the identity and whose output map is left out."""
    num_tokens, kv_heads = x_BTD.shape[1], block.attention.config.num_kv_heads
    eye_1TKS = jnp.broadcast_to(jnp.eye(num_tokens)[None, :, None], (1, num_tokens, kv_heads, num_tokens))
    block.attention.value, block.attention.out = (lambda x: eye_1TKS), (lambda o_BTNS: o_BTNS)
    return block.attention(block.attention_norm(x_BTD), visible, tables, Dropout(0.0, None))[0].swapaxes(1, 2)
