"""The attention weights of a model over a text.

A head's output is its weights times its values. So with an identity matrix for values the output is
the weights, by the production code itself, whatever its windows, positions, grouped heads and soft
limits.

Axes: B batch, T query positions, S key positions, D embed, N query heads, K kv heads, L layers.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.core.errors import UserError
from tinylm.model.transformer import LayerInputs, Transformer, abstract_transformer
from tinylm.model.visibility import Visibility
from tinylm.run.open_run import Run

MOST_TOKENS = 64


class Attention(NamedTuple):
    """How the heads of a model look at a text.

    Attributes:
      tokens: as strings, the begin of the text among them.
      weights_LNTS: how much each query takes from each key; a row sums to one.
    """

    tokens: list[str]
    weights_LNTS: np.ndarray


def attention_of(run: Run, text: str) -> Attention:
    """Return how the heads of a run's model look at a text.

    Args:
      run: an opened run.
      text: its first MOST_TOKENS tokens are looked at, after the begin of a text.

    Raises:
      UserError: where the text has no tokens, or some that the run doesn't know.
    """
    text_ids = run.tokenizer.encode(text)
    most_tokens = min(MOST_TOKENS, run.model_config.context)
    ids = [run.start_id, *text_ids][:most_tokens]
    if len(ids) < 2:
        raise UserError("--attention_text has no tokens; give a sentence.")
    # The plain kernel, since the fused ones have no weights to show.
    config = dataclasses.replace(run.model_config, attention="xla", compute_dtype="float32")
    graph, _, _ = abstract_transformer(config)

    @jax.jit
    def weights_of(params: dict, tokens_1T: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        return attention_weights(model, tokens_1T)

    with jax.set_mesh(run.mesh):
        # Made under the run's mesh: under another one, the tokens would lie on other devices than
        # the parameters.
        tokens_1T = jnp.asarray([ids])
        weights_LNTS = np.asarray(weights_of(run.params, tokens_1T))
    tokens = [run.tokenizer.decode([token]) for token in ids[1:]]
    return Attention(["⏎", *tokens], weights_LNTS)


def attention_weights(model: Transformer, tokens_1T: jax.Array) -> jax.Array:
    """Return weights_LNTS of one row of tokens."""
    positions_1T = jnp.arange(tokens_1T.shape[1])[None]
    inputs = model.layer_inputs(positions_1T, Visibility())
    x_1TD = model.embed(tokens_1T, positions_1T)
    blocks = model.unstacked_blocks()
    # Of the second copies the values are replaced.
    copies = model.unstacked_blocks()
    weights = []
    for layer, (block, copy) in enumerate(zip(blocks, copies, strict=True)):
        layer_inputs = inputs.of_layer(layer, model.window_of_layer(layer))
        weights_1NTS = _weights(copy, x_1TD, layer_inputs)
        weights.append(weights_1NTS[0])
        x_1TD, _ = block(x_1TD, layer_inputs)
    return jnp.stack(weights)


def _weights(block: Any, x_1TD: jax.Array, inputs: LayerInputs) -> jax.Array:
    """Return weights_1NTS of a block whose values become the identity; the block is spoiled."""
    num_tokens = x_1TD.shape[1]
    num_kv_heads = block.attention.config.num_kv_heads
    # The value of a key is the unit vector of its place, for each head alike.
    identity_SS = jnp.eye(num_tokens)
    identity_1SKS = jnp.broadcast_to(
        identity_SS[None, :, None], (1, num_tokens, num_kv_heads, num_tokens)
    )
    block.attention.value = lambda x_1TD: identity_1SKS
    block.attention.out = lambda o_1TNS: o_1TNS
    weights_1TNS, _ = block.attention(block.attention_norm(x_1TD), inputs)
    return weights_1TNS.swapaxes(1, 2)
