"""Losses as a sum and a count.

A mean of means is wrong where micro-batches, devices or hosts hold different numbers of target
tokens. So a loss is always a sum in nats with the number of target tokens that it runs over; such
pairs add up exactly, and are divided once, at the end.

Axes: B batch, T positions, D embed, V vocab, P pieces of a sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tinylm.core.collectives import sum_with_whole
from tinylm.core.mesh import constrain
from tinylm.core.ring import balanced_order, parts_of_rows
from tinylm.model.experts import RouterTotals
from tinylm.model.transformer import Transformer


class LossSums(NamedTuple):
    """Sums over the target tokens of some rows; those of several batches are added elementwise."""

    nats: jax.Array  # of -log p(target)
    num_targets: jax.Array  # weights of the target tokens
    squared_log_z: jax.Array  # of the squared log normalizer, which z-loss keeps small
    routers: RouterTotals | None = None  # where the model has experts, and they are asked for


def next_token_loss(
    model: Transformer,
    batch: dict[str, jax.Array],
    row_keys_B: jax.Array | None = None,
    *,
    with_routers: bool = False,
) -> LossSums:
    """Return the summed loss of a model on a batch.

    With `model.loss_chunks` above 1 the logits of one piece of the sequence are made at a time,
    and again in the backward pass, so that [B, T, V] never exists whole.

    Args:
      model: in any compute type; the loss is computed in float32.
      batch: `tokens`, `targets` and `weights` [B, T]; packed rows also have `segments` and
        `positions`.
      row_keys_B: one random key a row; turns dropout on.
      with_routers: whether to add up what the routers of experts did with the target tokens.
    """
    batch, order_T = _balanced(batch, reach=model.config.conv_taps - 1)
    x_BTD, routers = model.features_and_routing(
        batch["tokens"],
        segments_BT=batch.get("segments"),
        positions_BT=batch.get("positions"),
        row_keys_B=row_keys_B,
        counted_BT=batch["weights"] if with_routers else None,
        order_T=order_T,
    )
    num_pieces = model.config.loss_chunks
    if num_pieces == 1:
        sums = cross_entropy(model.logits(x_BTD), batch["targets"], batch["weights"])
        return sums._replace(routers=routers)

    # Of each device's part of the rows, so that all have a part of each piece.
    length = x_BTD.shape[1]
    num_parts = parts_of_rows(length)
    if length % (num_parts * num_pieces):
        num_parts = 1

    def in_pieces(x_BT: jax.Array) -> jax.Array:
        B, T, *rest = x_BT.shape
        x_BNPT = x_BT.reshape(B, num_parts, num_pieces, -1, *rest)
        x_PBNT = jnp.moveaxis(x_BNPT, 2, 0)
        return x_PBNT.reshape(num_pieces, B, T // num_pieces, *rest)

    def sum_of_pieces(matrix: jax.Array, *pieces: jax.Array) -> LossSums:
        @jax.checkpoint
        def add_piece(
            total: LossSums, piece: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[LossSums, None]:
            x_BTD, targets_BT, weights_BT = piece
            sums = cross_entropy(model.logits(x_BTD, matrix), targets_BT, weights_BT)
            return jax.tree.map(jnp.add, total, sums), None

        zero = LossSums(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))
        return jax.lax.scan(add_piece, zero, pieces)[0]

    pieces = (in_pieces(x_BTD), in_pieces(batch["targets"]), in_pieces(batch["weights"]))
    sums = sum_with_whole(
        sum_of_pieces, model.output_matrix, model.output_axes, pieces, sent_as=x_BTD.dtype
    )
    return sums._replace(routers=routers)


def _balanced(
    batch: dict[str, jax.Array], reach: int
) -> tuple[dict[str, jax.Array], jax.Array | None]:
    """Return a batch with its columns as `core.ring.balanced_order` has them, and their positions.

    These are None where the mesh in use doesn't split rows. Each device has whole rows of these
    small arrays, so nothing is sent.
    """
    order = balanced_order(batch["tokens"].shape[1], reach)
    if order is None:
        return batch, None
    in_order = {}
    for name, x_BT in batch.items():
        in_order[name] = constrain(x_BT[:, order], "batch", "positions")
    return in_order, constrain(jnp.asarray(order), "positions")


def cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> LossSums:
    """Return the weighted sums of the cross-entropy of targets.

    The target's logit is picked by comparison, not by index, so its gradient needs no scatter, and
    a vocabulary that is split over the mesh is never gathered.
    """
    is_target_BTV = jnp.arange(logits_BTV.shape[-1]) == targets_BT[..., None]
    target_logit_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0.0), axis=-1)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    return LossSums(
        nats=jnp.sum((log_z_BT - target_logit_BT) * weights_BT),
        num_targets=jnp.sum(weights_BT),
        squared_log_z=jnp.sum(jnp.square(log_z_BT) * weights_BT),
    )
