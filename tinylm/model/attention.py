"""Attention behind one interface: which kernel computes it.

Axes: B batch, T query positions, S key positions, N query heads, K kv heads, G query heads per kv
head, H head size.
"""

import jax
import jax.numpy as jnp

from tinylm.core.collectives import is_partly_manual
from tinylm.core.errors import UserError
from tinylm.core.log import say_once
from tinylm.core.mesh import target_platform
from tinylm.core.ring import parts_of_rows, splits_rows
from tinylm.model.config import CUDNN_MOST_HEAD_DIM
from tinylm.model.context import context_attention
from tinylm.model.kernels import (
    AttentionOptions,
    KernelChoice,
    cudnn_attention,
    plain_attention,
    splash_attention,
)
from tinylm.model.visibility import Visibility


def attend(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visibility: Visibility,
    options: AttentionOptions,
    *,
    kernel: str = "auto",
    context_form: str = "auto",
) -> jax.Array:
    """Return softmax(scale q.k) v over the visible keys, as o_BNTH (Vaswani et al. 2017, eq. 1).

    Query head n reads kv head n // G.

    Args:
      q_BNTH, k_BKSH, v_BKSH: queries, keys and values.
      visibility: which keys a query sees.
      options: scale, soft cap and dropout of the weights.
      kernel: model.attention: auto, xla, cudnn or splash.
      context_form: model.context_attention: auto, ring or gather.

    Raises:
      UserError: for a kernel of other hardware than the mesh in use consists of.
    """
    platform = target_platform()
    needed = {"cudnn": "gpu", "splash": "tpu"}.get(kernel, platform)
    if needed != platform:
        raise UserError(
            f"model.attention={kernel} needs a {needed.upper()}; set model.attention=auto."
        )
    if options.dropout.active and kernel in ("cudnn", "splash"):
        say_once("attention dropout takes the plain attention kernel: fused ones have none.")

    choice = KernelChoice(
        platform=platform,
        kernel=kernel,
        has_dropout=options.dropout.active,
        window=visibility.window,
        local_heads=visibility.local_heads,
        has_cache=visibility.query_positions_BT is not None,
    )
    if parts_of_rows(q_BNTH.shape[2]) > 1:
        return context_attention(
            q_BNTH, k_BKSH, v_BKSH, visibility, options, wanted=context_form, choice=choice
        )
    if kernel == "xla" or choice.needs_plain:
        return plain_attention(q_BNTH, k_BKSH, v_BKSH, visibility, options)

    num_queries, head_dim = q_BNTH.shape[2:]
    if platform == "gpu" and not options.softcap:
        fits_cudnn = (
            q_BNTH.dtype == jnp.bfloat16
            and head_dim % 8 == 0
            and head_dim <= CUDNN_MOST_HEAD_DIM
            and num_queries % 2 == 0
        )
        if kernel == "cudnn" or fits_cudnn:
            return cudnn_attention(q_BNTH, k_BKSH, v_BKSH, visibility, options)
    if choice.takes_splash(num_queries):
        return splash_attention(q_BNTH, k_BKSH, v_BKSH, visibility, options)
    return plain_attention(q_BNTH, k_BKSH, v_BKSH, visibility, options)


def can_be_unrolled(kernel: str) -> bool:
    """Say whether the layers of a scan may be unrolled here, given the `kernel` of the config.

    A fused kernel runs in a shard_map of its own, and so does attention over rows that the mesh
    splits. Where that lies inside another one, which leaves axes of the mesh to the partitioner, it
    has to be in a loop: JAX lowers unrolled layers to one function that each of them calls, Shardy
    loses the outer axes in it, and XLA aborts the process ("IsManualSubgroup", jaxlib 0.10.2 with
    libtpu 0.0.42).
    """
    has_own_shard_map = kernel != "xla" or splits_rows()
    return not has_own_shard_map or target_platform() == "cpu" or not is_partly_manual()
