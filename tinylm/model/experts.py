"""Experts: many mlps in a layer, of which a router picks a few a token (Shazeer et al. 2017).

The router gives each token a score for each expert, in float32: a softmax over all of them, or a
sigmoid of each. The token goes to the experts of the highest scores, and their outputs are added
up, weighted with the scores. Shared experts are one mlp that all tokens go through as well
(DeepSeekMoE, Dai et al. 2024).

No token is ever dropped (`grouped`), so a token's output depends on nothing but its own features,
and the loss is the same on every mesh. What that leaves to wish for is that experts have equal
loads, since devices wait for the busiest. Two things even them out:

- a bias of each expert, added to its score for the choice alone, not for the weights
  (`model.router_bias_rate`; Wang et al. 2024, DeepSeek-V3). No gradient trains it: after each step
  it grows by the rate where the expert's load in the whole batch was below the mean, and falls by
  it where it was above. Loads are counts, so it is the same on any mesh.
- a loss (`model.router_balance_loss`). It is taken row by row (DeepSeek-V3, equations 17 to 20), so
  that it adds up exactly over micro-batches and devices: of a row of n counted tokens it is

      n X / C * sum over experts of (choices of it / n) (sum of its scores / n)

  in which a token's scores sum to 1. Over the tokens of all rows it is 1 where loads are even.

Tokens count by the weight of their target, so that padding counts for nothing.

Axes: B batch, T positions, D embed, F mlp, X experts, C experts of a token (chosen), L layers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from tinylm.core.expert_shards import Choice, weighted_experts
from tinylm.core.mesh import constrain
from tinylm.model import layers
from tinylm.model.config import ModelConfig
from tinylm.model.grouped import from_slots, grouped_matmul, lay_out, to_slots
from tinylm.model.mlp import Mlp, MlpResult
from tinylm.model.rowwise import softmax
from tinylm.model.visibility import EVERYTHING, Visibility

# What a rematerialized layer keeps besides its input: which experts its tokens chose.
CHOICE = "chosen experts"

# The matrices of all experts, by their logical axes.
_INNER = ("experts", "embed", "mlp")
_OUTER = ("experts", "mlp", "embed")


class RouterSums(NamedTuple):
    """What a router did, summed over the counted tokens of each row."""

    load_BX: jax.Array  # how often each expert was chosen
    score_BX: jax.Array  # the scores of each expert, those of a token summing to 1
    squared_log_z_B: jax.Array  # the squared log normalizers of its logits
    tokens_B: jax.Array  # the counted tokens


class Routing(NamedTuple):
    """Where tokens go."""

    choice: Choice
    sums: RouterSums | None  # None where nobody asks


class Router(nnx.Module):
    """Picks the experts of each token."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Build the map to logits, and the bias where there is one."""
        c = config
        self.config = c
        self.kernel = layers.weight(
            rngs, (c.embed_dim, c.num_experts), ("embed", "experts"), c.init_std
        )
        self.bias = (
            layers.constant(0.0, (c.num_experts,), ("experts",)) if c.router_bias_rate else None
        )

    def __call__(self, x_BTD: jax.Array, counted_BT: jax.Array | None) -> Routing:
        """Return where tokens go, and sums over those that count; None: no sums are needed."""
        c = self.config
        # TPUs multiply float32 as bfloat16 unless they are told.
        logits_BTX = jnp.einsum(
            "BTD,DX->BTX",
            x_BTD.astype(jnp.float32),
            self.kernel[...],
            precision=jax.lax.Precision.HIGHEST,
        )
        logits_BTX = constrain(logits_BTX, "batch", "positions", None)
        # Scores may be too small for a division by their sum, and more so for its gradient, so
        # whatever adds up to 1 is made of their logarithms, up to a constant of each token.
        is_softmax = c.router == "softmax"
        log_scores_BTX = logits_BTX if is_softmax else jax.nn.log_sigmoid(logits_BTX)
        shares_BTX = softmax(log_scores_BTX)
        scores_BTX = shares_BTX if is_softmax else jax.nn.sigmoid(logits_BTX)
        order_BTX = scores_BTX if self.bias is None else scores_BTX + self.bias[...]
        _, experts_BTC = jax.lax.top_k(jax.lax.stop_gradient(order_BTX), c.experts_per_token)
        # The backward pass must not choose again: scores that are computed again may differ in
        # their last bit.
        experts_BTC = checkpoint_name(experts_BTC, CHOICE)

        # Scores are picked by comparison, not by index, so their gradient needs no scatter.
        is_chosen_BTCX = experts_BTC[..., None] == jnp.arange(c.num_experts)
        weighed_BTX = log_scores_BTX if c.router_normalize else scores_BTX
        weights_BTC = jnp.sum(jnp.where(is_chosen_BTCX, weighed_BTX[:, :, None], 0.0), axis=-1)
        if c.router_normalize:
            weights_BTC = softmax(weights_BTC)
        choice = Choice(experts_BTC, weights_BTC)
        if counted_BT is None:
            return Routing(choice, None)

        counted_BT1 = counted_BT[..., None]
        squared_log_z_BT = jnp.square(jax.nn.logsumexp(logits_BTX, axis=-1))
        sums = RouterSums(
            load_BX=jnp.sum(jnp.sum(is_chosen_BTCX, axis=2) * counted_BT1, axis=1),
            score_BX=jnp.sum(shares_BTX * counted_BT1, axis=1),
            squared_log_z_B=jnp.sum(squared_log_z_BT * counted_BT, axis=1),
            tokens_B=jnp.sum(counted_BT, axis=1),
        )
        return Routing(choice, sums)


class Experts(nnx.Module):
    """The experts of a layer, in the place of its mlp."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Build router, experts and shared experts."""
        c = config
        self.kind = c.mlp
        self.by_exchange = c.expert_parallel
        self.conv = layers.ShortConv(c.embed_dim, c.conv_taps)
        self.router = Router(c, rngs=rngs)
        inner_shape = (c.num_experts, c.embed_dim, c.expert_dim)
        outer_shape = (c.num_experts, c.expert_dim, c.embed_dim)
        self.up = layers.weight(rngs, inner_shape, _INNER, c.init_std)
        self.gate = (
            layers.weight(rngs, inner_shape, _INNER, c.init_std) if c.mlp in layers.GATED else None
        )
        self.down = layers.weight(rngs, outer_shape, _OUTER, c.output_std)
        self.shared = _shared_mlp(c, rngs) if c.shared_experts else None

    def __call__(
        self,
        x_BTD: jax.Array,
        visibility: Visibility = EVERYTHING,
        earlier_BCD: jax.Array | None = None,
        counted_BT: jax.Array | None = None,
    ) -> MlpResult:
        """Send each position through its experts; see `Mlp` for the other arguments.

        Args:
          counted_BT: how much each position counts in the router's sums; None: nobody asks for
            them.
        """
        x_BTD, last_BCD = self.conv(x_BTD, visibility, earlier_BCD)
        routing = self.router(x_BTD, counted_BT)
        matrices = [(self.down[...].astype(x_BTD.dtype), _OUTER)]
        for inner in (self.up, self.gate):
            if inner is not None:
                matrices.append((inner[...].astype(x_BTD.dtype), _INNER))
        y_BTD = weighted_experts(
            functools.partial(_mlps_of_rows, self.kind),
            x_BTD,
            routing.choice,
            matrices,
            by_exchange=self.by_exchange,
        )
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD).y_BTD
        return MlpResult(y_BTD, last_BCD, routing.sums)


def _shared_mlp(config: ModelConfig, rngs: nnx.Rngs) -> Mlp:
    """Return the shared experts, as one mlp. Its input has been through the convolution."""
    shared = config.editable_copy()
    shared.mlp_dim = config.shared_experts * config.expert_dim
    shared.conv_taps = 0
    return Mlp(shared, rngs=rngs)


def _mlps_of_rows(
    kind: str, x_TD: jax.Array, group_M: jax.Array, down_XFD: jax.Array, *inner_XDF: jax.Array
) -> jax.Array:
    """Return y_MD: what the mlp of each row's expert makes of its token.

    Args:
      kind: model.mlp.
      x_TD: features of tokens.
      group_M: the expert of each row, where row m is of token m // C; X for a row of none.
      down_XFD: the maps to the outputs.
      inner_XDF: the maps to the hidden features: up, and gate where there is one.
    """
    layout = lay_out(group_M, len(down_XFD))
    x_SD = to_slots(x_TD, layout)
    h_SF = grouped_matmul(x_SD, inner_XDF[0], layout)
    if len(inner_XDF) == 1:
        h_SF = layers.activate(kind, h_SF)
    else:
        h_SF = layers.activate(kind, grouped_matmul(x_SD, inner_XDF[1], layout)) * h_SF
    return from_slots(grouped_matmul(h_SF, down_XFD, layout), layout)


class RouterTotals(NamedTuple):
    """What the routers of a model did in some rows; those of several batches are added up."""

    load_LX: jax.Array  # how often each expert was chosen, in the layers that have experts
    balance: jax.Array  # the loss that evens out loads, summed over layers and counted tokens
    squared_log_z: jax.Array  # of the routers' logits, summed likewise


def totals(sums: RouterSums, config: ModelConfig) -> RouterTotals:
    """Add up what the routers of all layers did; each leaf of `sums` begins with L."""
    load_LBX = jax.lax.stop_gradient(sums.load_BX)
    product_LB = jnp.sum(load_LBX * sums.score_BX, axis=-1)
    row_LB = config.num_experts / config.experts_per_token * product_LB
    balance_LB = row_LB / jnp.maximum(sums.tokens_B, 1.0)
    return RouterTotals(
        load_LX=jnp.sum(load_LBX, axis=1),
        balance=jnp.sum(balance_LB),
        squared_log_z=jnp.sum(sums.squared_log_z_B),
    )


def router_loss(routers: RouterTotals, config: ModelConfig) -> jax.Array:
    """Return what the routers add to the trained loss, summed like it over the target tokens."""
    loss = config.router_balance_loss * routers.balance
    return loss + config.router_z_loss * routers.squared_log_z


def bias_of_experts(params: dict, config: ModelConfig) -> jax.Array | None:
    """Return the bias of each expert in each layer, [L, X]; None where there is none."""
    has_bias = config.num_experts > 0 and config.router_bias_rate > 0
    return params["blocks"]["mlp"]["router"]["bias"] if has_bias else None


def with_bias_of_experts(params: dict, bias_LX: jax.Array) -> dict:
    """Return parameters with another bias of each expert."""
    blocks = params["blocks"]
    router = {**blocks["mlp"]["router"], "bias": bias_LX}
    return {**params, "blocks": {**blocks, "mlp": {**blocks["mlp"], "router": router}}}


def even_out(params: dict, load_LX: jax.Array, config: ModelConfig) -> dict:
    """Return parameters with the bias of each expert moved towards an even load.

    Args:
      params: of the model.
      load_LX: of the whole batch.
      config: of the model.
    """
    bias_LX = bias_of_experts(params, config)
    if bias_LX is None:
        return params
    excess_LX = load_LX - jnp.mean(load_LX, axis=-1, keepdims=True)
    return with_bias_of_experts(params, bias_LX - config.router_bias_rate * jnp.sign(excess_LX))


def load_metrics(load_LX: jax.Array) -> dict[str, jax.Array]:
    """Return how even the loads of a step are; all are 1 where they are even.

    - `router/busiest`: the load of the busiest expert of any layer over the mean load
    - `router/idlest`: that of the idlest
    - `router/entropy`: the entropy of the loads of a layer over the greatest possible, of the layer
      in which it is least
    """
    num_experts = load_LX.shape[-1]
    total_L1 = jnp.maximum(jnp.sum(load_LX, axis=-1, keepdims=True), 1.0)
    share_LX = load_LX / total_L1
    entropy_L = -jnp.sum(jax.scipy.special.xlogy(share_LX, share_LX), axis=-1)
    return {
        "router/busiest": num_experts * jnp.max(share_LX),
        "router/idlest": num_experts * jnp.min(share_LX),
        "router/entropy": jnp.min(entropy_L) / jnp.log(max(num_experts, 2)),
    }


LOAD_METRICS = ("router/busiest", "router/idlest", "router/entropy")
