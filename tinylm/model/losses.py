"""Losses as a sum and a count.

A mean of means is wrong where micro-batches, devices or hosts hold different numbers of target tokens. So a loss is
always the pair (sum in nats, number of target tokens); pairs add up exactly, and are divided once at the end.
"""

import jax
import jax.numpy as jnp


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (sum of weighted -log p(target) in nats, sum of weights), both float32 scalars.

    The target's logit is picked by comparison, not by index, so its gradient needs no scatter, and a vocabulary that
    is split over the mesh is never gathered.
    """
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    picked_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    nats_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT
    return jnp.sum(nats_BT * weights_BT), jnp.sum(weights_BT)
