"""Attention behind one interface: who may look at whom, and the kernels that compute it.

Axes: B batch, T query positions, S key positions, N query heads, K kv heads, G query heads per kv head, H head size.

Arrays are heads-first, so that each head's matrices are contiguous: on CPU the transposing copies of another layout
cost as much as the products themselves. Masks are described (`Visibility`), not made, until a kernel needs them.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from tinylm.core.errors import UserError
from tinylm.core.log import say_once
from tinylm.core.mesh import is_partly_manual, layout, on_shards, target_platform
from tinylm.model.kernels import MASKED_LOGIT
from tinylm.model.layers import Dropout

_SPLASH_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Which keys a query sees: those not after it, within `window` (0: all), and of its own segment.

    Positions are absolute; None means 0, 1, 2, ... for queries and keys alike. No query sees a key at a position below
    0. The window counts the query itself.
    """

    query_positions_BT: jax.Array | None = None
    key_positions_BS: jax.Array | None = None
    segments_BT: jax.Array | None = None
    window: int = 0
    local_heads: int = 0

    def allowed(self, queries: slice, keys: slice, num_heads: int) -> jax.Array:
        """Return the mask of some queries and keys as booleans that broadcast to [B, N, T, S]."""
        q, s = self.query_positions_BT, self.key_positions_BS
        q = jnp.arange(queries.start, queries.stop)[None] if q is None else q
        s = jnp.arange(keys.start, keys.stop)[None] if s is None else s
        distance = q[:, None, :, None] - s[:, None, None, :]
        allowed = (distance >= 0) & (s >= 0)[:, None, None, :]
        if self.window:
            near = distance < self.window
            if self.local_heads:
                near = near | (jnp.arange(num_heads) >= self.local_heads)[None, :, None, None]
            allowed = allowed & near
        if self.segments_BT is not None:
            q, s = self.segments_BT[:, queries], self.segments_BT[:, keys]
            allowed = allowed & (q[:, None, :, None] == s[:, None, None, :])
        return allowed


def attend(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
    softcap: float = 0.0,
    dropout: Dropout | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Return softmax(scale q.k) v over the visible keys, as o_BNTH (Vaswani et al. 2017, eq. 1).

    Query head n reads kv head n // G. `dropout` acts on the weights, and takes the plain kernel: fused ones have none.
    """
    dropping = dropout is not None and dropout.active
    platform = target_platform()
    needed = {"cudnn": "gpu", "splash": "tpu"}.get(kernel, platform)
    if needed != platform:
        raise UserError(f"model.attention={kernel} needs a {needed.upper()}; set model.attention=auto.")
    if dropping and kernel in ("cudnn", "splash"):
        say_once("attention dropout takes the plain attention kernel: fused ones have none.")
    T, H = q_BNTH.shape[2:]
    some_heads = visibility.window and visibility.local_heads
    if kernel == "xla" or dropping or some_heads or visibility.query_positions_BT is not None:
        return _plain(q_BNTH, k_BKSH, v_BKSH, visibility, scale, softcap, dropout)
    half = q_BNTH.dtype == jnp.bfloat16
    if platform == "gpu" and not softcap and (kernel == "cudnn" or (half and H % 8 == 0 and H <= 128 and T % 2 == 0)):
        return _fused(q_BNTH, k_BKSH, v_BKSH, visibility, scale)
    if platform == "tpu" and T % _SPLASH_BLOCK == 0:
        return splash(q_BNTH, k_BKSH, v_BKSH, visibility, scale, softcap)
    return _plain(q_BNTH, k_BKSH, v_BKSH, visibility, scale, softcap, dropout)


def can_be_unrolled(kernel: str) -> bool:
    """Say whether the layers of a scan may be unrolled here, given the `kernel` of the config.

    A fused kernel runs in a shard_map of its own. Where that lies inside another one, which leaves
    axes of the mesh to the partitioner, it has to be in a loop: JAX lowers unrolled layers to one
    function that each of them calls, Shardy loses the outer axes in it, and XLA aborts the process
    ("IsManualSubgroup", jaxlib 0.10.2 with libtpu 0.0.42).
    """
    return kernel == "xla" or target_platform() == "cpu" or not is_partly_manual()


def _plain(q_BNTH, k_BKSH, v_BKSH, visibility, scale, softcap, dropout):
    """Attend by up to four blocks of queries, each to the keys that it may see: 5/8 of the work of the whole square."""
    T, S = q_BNTH.shape[2], k_BKSH.shape[2]
    known = visibility.query_positions_BT is None and not (dropout is not None and dropout.active)
    block = T // math.gcd(4, T // 64) if known and T % 64 == 0 else T
    parts = []
    for start in range(0, T, block):
        first = start + 1 - visibility.window if visibility.window and not visibility.local_heads else 0
        queries, keys = (
            slice(start, start + block),
            slice(max(first, 0), start + block) if block < T else slice(0, S),
        )
        mask = visibility.allowed(queries, keys, q_BNTH.shape[1])
        rows = (q_BNTH[:, :, queries], k_BKSH[:, :, keys], v_BKSH[:, :, keys])
        parts.append(_softmax_sum(*rows, mask, scale, softcap, dropout))
    return jnp.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def _softmax_sum(q_BNTH, k_BKSH, v_BKSH, mask, scale, softcap, dropout):
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    rows_BKMH = (q_BNTH * scale).reshape(B, K, N // K * T, H)
    logits = jnp.einsum("BKMH,BKSH->BKMS", rows_BKMH, k_BKSH, preferred_element_type=jnp.float32)
    logits_BNTS = logits.reshape(B, N, T, S)
    if softcap:
        logits_BNTS = softcap * jnp.tanh(logits_BNTS / softcap)
    weights_BNTS = jax.nn.softmax(jnp.where(mask, logits_BNTS, MASKED_LOGIT), axis=-1).astype(v_BKSH.dtype)
    if dropout is not None:
        weights_BNTS = dropout(weights_BNTS)
    rows_BKMS = weights_BNTS.reshape(B, K, N // K * T, S)
    return jnp.einsum("BKMS,BKSH->BKMH", rows_BKMS, v_BKSH).reshape(B, N, T, -1)


def _fused(q_BNTH, k_BKSH, v_BKSH, visibility, scale):
    """Use cuDNN's flash attention through `jax.nn.dot_product_attention`, which wants sequence before heads."""

    def on_device(q_BNTH, k_BKSH, v_BKSH, *segments_BT):
        q, k, v = (x.swapaxes(1, 2) for x in (q_BNTH, k_BKSH, v_BKSH))
        mask = next((ids[:, None, :, None] == ids[:, None, None, :] for ids in segments_BT), None)
        window = (visibility.window - 1, 0) if visibility.window else None
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            scale=scale,
            is_causal=True,
            local_window_size=window,
            implementation="cudnn",
        )
        return out.swapaxes(1, 2)

    return _on_each_device(on_device, q_BNTH, k_BKSH, v_BKSH, visibility.segments_BT)


def splash(q_BNTH, k_BKSH, v_BKSH, visibility, scale, softcap, interpret=False):
    """Use JAX's splash attention (Pallas, TPU), on each device's rows and heads; T must be a multiple of 128.

    Blocks that the causal or local mask hides are skipped. `interpret` runs it anywhere, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as lib

    def on_device(q_BNTH, k_BKSH, v_BKSH, *segments_BT):
        N, T = q_BNTH.shape[1:3]
        side = (T, T)
        mask = lib.LocalMask(side, (visibility.window - 1, 0), 0) if visibility.window else lib.CausalMask(side)
        block = math.gcd(T, 512)
        sizes = lib.BlockSizes(block, block, block, block, block, block, block, block)
        kernel = lib.make_splash_mha(
            lib.MultiHeadMask([mask] * N), head_shards=1, q_seq_shards=1, block_sizes=sizes,
            attn_logits_soft_cap=softcap or None, interpret=interpret,
        )  # fmt: skip
        rows = jax.vmap(lambda q, k, v, *ids: kernel(q, k, v, *(lib.SegmentIds(x, x) for x in ids)))
        return rows((q_BNTH * scale).astype(q_BNTH.dtype), k_BKSH, v_BKSH, *segments_BT).astype(q_BNTH.dtype)

    return _on_each_device(on_device, q_BNTH, k_BKSH, v_BKSH, visibility.segments_BT)


def _on_each_device(kernel, q_BNTH, k_BKSH, v_BKSH, segments_BT):
    """Run a kernel on each device's rows and heads, with the kv heads that these need."""
    q_axes, kv_axes = (("batch", heads, None, "head_dim") for heads in ("heads", "kv_heads"))
    if layout(q_BNTH, q_axes)[1] != layout(k_BKSH, kv_axes)[1]:  # a device's heads would lack their kv heads
        k_BKSH, v_BKSH = (jnp.repeat(x, q_BNTH.shape[1] // x.shape[1], axis=1) for x in (k_BKSH, v_BKSH))
        kv_axes = q_axes
    segments = () if segments_BT is None else ((segments_BT.astype(jnp.int32), ("batch", None)),)
    return on_shards(kernel, (q_BNTH, q_axes), (k_BKSH, kv_axes), (v_BKSH, kv_axes), *segments)
