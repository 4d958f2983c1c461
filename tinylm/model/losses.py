"""Losses as a sum and a count.

A mean of means is wrong where micro-batches, devices or hosts hold different numbers of target tokens. So a loss is
always the pair (sum in nats, number of target tokens); pairs add up exactly, and are divided once at the end.
"""

from typing import Any

import jax
import jax.numpy as jnp

Sums = tuple[jax.Array, jax.Array, jax.Array]


def next_token_loss(model: Any, batch: dict[str, jax.Array], row_keys_B: jax.Array | None = None) -> Sums:
    """Return the `cross_entropy` of a model on `batch`: tokens, targets, weights [B, T], if packed segments, positions.

    With `model.loss_chunks` above 1 logits are made for one piece of the sequence at a time, and again in the backward
    pass, so that [B, T, V] is never whole.
    """
    x_BTD = model.features(
        batch["tokens"], segments_BT=batch.get("segments"), positions_BT=batch.get("positions"), row_keys_B=row_keys_B
    )
    parts, num = (x_BTD, batch["targets"], batch["weights"]), model.config.loss_chunks
    if num == 1:
        return cross_entropy(model.logits(x_BTD), *parts[1:])

    @jax.checkpoint
    def piece(sums, part):
        return jax.tree.map(jnp.add, sums, cross_entropy(model.logits(part[0]), *part[1:])), None

    pieces = [jnp.moveaxis(x.reshape(len(x), num, -1, *x.shape[2:]), 1, 0) for x in parts]
    return jax.lax.scan(piece, (jnp.zeros(()),) * 3, tuple(pieces))[0]


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> Sums:
    """Return weighted sums of -log p(target) in nats, of 1, and of the squared log normalizer (for z-loss).

    The target's logit is picked by comparison, not by index, so its gradient needs no scatter, and a vocabulary that
    is split over the mesh is never gathered.
    """
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    picked_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    nats = jnp.sum((log_z_BT - picked_BT) * weights_BT)
    return nats, jnp.sum(weights_BT), jnp.sum(jnp.square(log_z_BT) * weights_BT)
