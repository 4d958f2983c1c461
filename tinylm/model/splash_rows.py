"""Splash attention where the mesh splits rows: a device's queries over the whole row's keys.

The keys and values of a row are gathered, and stay in the balanced order of `core.ring`: putting
them into their own order would copy the row several times. Splash (JAX's Pallas kernel for TPUs)
then skips the blocks of them that a device's queries don't see, so that all devices have the same
work, forward and backward. Going round a ring it can't be used: its backward pass knows only a
softmax over all keys that it is given.

They are gathered for one kv head after the other, and again for the backward pass. So a device
never holds more of whole rows than the keys and values of one head, and their gradients; all heads
at once would be as much as the rest of its activations where sixteen devices share a row.

Which blocks each device skips is worked out once, when compiling, and split over the devices.

Axes: B batch, T query positions, S key positions, N query heads, K kv heads, G query heads per kv
head, H head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.core.collectives import on_shards
from tinylm.core.ring import gather_ring, parts_of_rows
from tinylm.model.kernels import (
    AttentionOptions,
    heads_axes,
    splash_block_sizes,
    splash_mask,
    with_own_kv_heads,
)
from tinylm.model.visibility import Visibility

# The name of what the kernel keeps for its backward pass: its outputs and log-normalizers.
_KEPT = "splash_rows"


def splash_over_gathered(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visibility: Visibility,
    options: AttentionOptions,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attend where the mesh splits rows and columns lie in the balanced order; no dropout.

    `interpret` runs the kernel on any platform, slowly.
    """
    length = q_BNTH.shape[2]
    kernel = _make_kernel(length, parts_of_rows(length), visibility.window, options, interpret)
    # The kernel is a tree of arrays: what each block of queries looks at.
    leaves, tree = jax.tree.flatten(kernel)
    has_segments = visibility.segments_BT is not None

    def on_device(q_BNTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, *rest: jax.Array) -> Any:
        from jax.experimental.pallas.ops.tpu import splash_attention as splash

        kernel_here = jax.tree.unflatten(tree, rest[: len(leaves)])
        segments: tuple = ()
        if has_segments:
            segments_BT = rest[-1]
            segments = (splash.SegmentIds(segments_BT, gather_ring(segments_BT, 1)),)

        def attend_to_head(head: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            q_BGTH, k_B1TH, v_B1TH = head
            k_B1SH = gather_ring(k_B1TH, 2)
            v_B1SH = gather_ring(v_B1TH, 2)
            return jax.vmap(kernel_here)(q_BGTH, k_B1SH, v_B1SH, *segments)

        # Otherwise the scan would keep what it gathers, which is the row of each head.
        attend_to_head = jax.checkpoint(
            attend_to_head,
            policy=jax.checkpoint_policies.save_only_these_names(_KEPT),
            prevent_cse=False,
        )
        B, N, T, H = q_BNTH.shape
        K = k_BKTH.shape[1]
        by_kv_head = []
        for x_BNTH in (q_BNTH, k_BKTH, v_BKTH):
            x_BKGTH = x_BNTH.reshape(B, K, -1, T, H)
            by_kv_head.append(jnp.moveaxis(x_BKGTH, 1, 0))
        o_KBGTH = jax.lax.map(attend_to_head, tuple(by_kv_head))
        o_BKGTH = jnp.moveaxis(o_KBGTH, 0, 1)
        return o_BKGTH.reshape(B, N, T, H).astype(q_BNTH.dtype)

    # The kernel has no scale argument.
    scaled_BNTH = (q_BNTH * options.scale).astype(q_BNTH.dtype)
    k_BKSH, v_BKSH, kv_heads = with_own_kv_heads(q_BNTH, k_BKSH, v_BKSH)
    parts: list[tuple[jax.Array, tuple]] = [
        (scaled_BNTH, heads_axes("heads")),
        (k_BKSH, heads_axes(kv_heads)),
        (v_BKSH, heads_axes(kv_heads)),
    ]
    for leaf in leaves:
        # The masks of some blocks, or a number for each block of queries and keys.
        is_mask = leaf.dtype == bool
        parts.append((leaf, (None, None if is_mask else "positions", None)))
    if visibility.segments_BT is not None:
        segments_BT = visibility.segments_BT.astype(np.int32)
        parts.append((segments_BT, ("batch", "positions")))
    return on_shards(on_device, *parts)


def _make_kernel(
    length: int, num_parts: int, window: int, options: AttentionOptions, interpret: bool
) -> Any:
    """Return splash for the columns of all devices of a row."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    stretch = length // (2 * num_parts)
    return splash.make_splash_mha(
        splash_mask(length, num_parts, window),
        head_shards=1,
        q_seq_shards=num_parts,
        block_sizes=splash_block_sizes(stretch),
        attn_logits_soft_cap=options.softcap or None,
        residual_checkpoint_name=_KEPT,
        interpret=interpret,
    )
