"""Splash attention where the mesh splits rows: a device's queries over the whole row's keys.

The keys and values of a row are gathered; splash (JAX's Pallas kernel for TPUs) then skips the
blocks of them that a device's queries don't see, so that in the balanced order of `core.ring` all
devices have the same work, forward and backward. Going round a ring it can't be used: its backward
pass knows only a softmax over all keys that it is given.

Which blocks each device skips is worked out once, when compiling, and split over the devices.

Axes: B batch, T query positions, S key positions, N query heads, K kv heads, H head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.core.collectives import on_shards
from tinylm.core.ring import gather_row, parts_of_rows
from tinylm.model.kernels import (
    AttentionOptions,
    heads_axes,
    splash_block_sizes,
    splash_mask,
    with_own_kv_heads,
)
from tinylm.model.visibility import Visibility


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
        k_BKSH, v_BKSH = gather_row(jnp.stack([k_BKTH, v_BKTH]), 3)
        arguments: list[Any] = [q_BNTH, k_BKSH, v_BKSH]
        if has_segments:
            segments_BT = rest[-1]
            segments_BS = gather_row(segments_BT, 1)
            arguments.append(splash.SegmentIds(segments_BT, segments_BS))
        return jax.vmap(kernel_here)(*arguments).astype(q_BNTH.dtype)

    # The kernel has no scale argument.
    scaled_BNTH = (q_BNTH * options.scale).astype(q_BNTH.dtype)
    k_BKSH, v_BKSH, kv_heads = with_own_kv_heads(q_BNTH, k_BKSH, v_BKSH)
    parts: list[tuple[jax.Array, tuple]] = [
        (scaled_BNTH, heads_axes("heads")),
        (k_BKSH, heads_axes(kv_heads)),
        (v_BKSH, heads_axes(kv_heads)),
    ]
    for leaf in leaves:
        # The positions of all queries, or one number for each block: [1, queries, keys].
        parts.append((leaf, ("positions",) if leaf.ndim == 1 else (None, "positions", None)))
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
        interpret=interpret,
    )
