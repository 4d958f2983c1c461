"""The attention weights of a model over a text.

A head's output is its weights times its values. So with an identity matrix for values the output is
the weights, by the production code itself, whatever its windows, positions, grouped heads and soft
limits.

Axes: B batch, T query positions, S key positions, D embed, N query heads, K kv heads, L layers.
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
    """Return how the heads of a run's model look at a text.

    Args:
      run: an opened run.
      text: its first MOST_TOKENS tokens are looked at, after the begin of a text.

    Returns:
      The tokens as strings, and weights_LNTS.
    """
    most_tokens = min(MOST_TOKENS, run.model_config.context)
    ids = [run.start_id, *run.tokenizer.encode(text)][:most_tokens]
    if len(ids) < 2:
        raise UserError("--attention_text has no tokens; give a sentence.")
    tokens = [run.tokenizer.decode([token]) for token in ids[1:]]
    # The plain kernel, since the fused ones have no weights to show.
    config = dataclasses.replace(run.model_config, attention="xla", compute_dtype="float32")
    graph, _, _ = abstract_transformer(config)

    @jax.jit
    def weights_of(params: dict, tokens_1T: jax.Array) -> jax.Array:
        return attention_weights(nnx.merge(graph, params), tokens_1T)

    with jax.set_mesh(run.mesh):
        weights_LNTS = np.asarray(weights_of(run.params, jnp.asarray([ids])))
    return ["⏎", *tokens], weights_LNTS


def attention_weights(model: Transformer, tokens_1T: jax.Array) -> jax.Array:
    """Return weights_LNTS of one row of tokens."""
    positions_1T = jnp.arange(tokens_1T.shape[1])[None]
    inputs = model.layer_inputs(positions_1T, Visibility())
    x_BTD = model.embed(tokens_1T, positions_1T)
    blocks = model.unstacked_blocks()
    # Of the second copies the values are replaced.
    copies = model.unstacked_blocks()
    weights = []
    for layer, (block, copy) in enumerate(zip(blocks, copies, strict=True)):
        layer_inputs = inputs.of_layer(layer, model.window_of_layer(layer))
        weights_BNTS = _weights(copy, x_BTD, layer_inputs)
        weights.append(weights_BNTS[0])
        x_BTD, _ = block(x_BTD, layer_inputs)
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
