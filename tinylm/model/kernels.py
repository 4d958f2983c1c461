"""The kernels of attention: plain XLA, cuDNN on GPUs, splash (Pallas) on TPUs.

All take heads-first arrays, so that the matrices of a head are contiguous: on CPU the transposing
copies of another layout cost as much as the products themselves.

Axes: B batch, T query positions, S key positions, N query heads, K kv heads, G query heads per kv
head, M rows of a kv head (its G heads times T queries), H head size, X features of a head as cuDNN
sees it (H, and those of the segments).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.core.collectives import on_shards
from tinylm.core.mesh import activation_spec
from tinylm.core.ring import order_of_parts
from tinylm.model.config import CUDNN_MOST_HEAD_DIM, ModelConfig
from tinylm.model.layers import MASKED_LOGIT, NO_DROPOUT, Dropout
from tinylm.model.rowwise import softmax
from tinylm.model.visibility import Visibility

# Features that a packed row adds to a head. cuDNN wants multiples of 8; four are used.
_SEGMENT_FEATURES = 8
# Tokens: splash takes multiples of SPLASH_BLOCK, in blocks of at most _MOST_SPLASH_BLOCK.
SPLASH_BLOCK = 128
_MOST_SPLASH_BLOCK = 512
# How far the logits of one text are put below those of the next: e^-128 adds nothing to 1.
_APART = 128.0


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """How products of queries and keys become weights."""

    scale: float  # factor on the products
    softcap: float = 0.0  # soft limit on the logits (0: none)
    dropout: Dropout = NO_DROPOUT  # of the weights


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """What decides which kernel computes a layer's attention, and what follows from it."""

    platform: str  # cpu, gpu or tpu
    kernel: str  # model.attention
    has_dropout: bool  # of the weights
    window: int  # how many keys a query sees (0: all)
    local_heads: int  # how many heads have that window (0: all)
    has_cache: bool = False  # of keys and values, at positions that only the program knows

    @classmethod
    def in_training(cls, model: ModelConfig, window: int, platform: str) -> "KernelChoice":
        """Return what decides for a model's layers with a window, in training."""
        return cls(
            platform=platform,
            kernel=model.attention,
            has_dropout=model.dropout > 0,
            window=window,
            local_heads=model.local_heads,
        )

    @property
    def two_kinds_of_heads(self) -> bool:
        """Whether some heads have a window and others none."""
        return self.window > 0 and self.local_heads > 0

    @property
    def needs_plain(self) -> bool:
        """Whether no fused kernel can do it."""
        return self.has_dropout or self.two_kinds_of_heads or self.has_cache

    def takes_splash(self, length: int) -> bool:
        """Say whether splash computes it, in blocks that divide so many positions."""
        may_splash = self.platform == "tpu" and self.kernel != "xla" and not self.needs_plain
        return may_splash and length % SPLASH_BLOCK == 0


def plain_attention(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visibility: Visibility,
    options: AttentionOptions,
) -> jax.Array:
    """Attend through XLA's own operations; any platform, any mask.

    Where the positions are known when compiling, the queries are cut into up to four blocks, and
    each attends only to the keys that it may see: 5/8 of the work of the whole square.

        queries 0-63      keys 0-63
        queries 64-127    keys 0-127
        queries 128-191   keys 0-191
        queries 192-255   keys 0-255
    """
    num_queries, num_keys = q_BNTH.shape[2], k_BKSH.shape[2]
    # The masks of dropout are drawn for whole rows.
    can_cut = visibility.query_positions_BT is None and not options.dropout.active
    if not can_cut or num_queries % 64:
        every_query, every_key = slice(0, num_queries), slice(0, num_keys)
        mask = visibility.allowed(every_query, every_key, q_BNTH.shape[1])
        return _softmax_sum(q_BNTH, k_BKSH, v_BKSH, mask, options)

    all_heads_local = visibility.window > 0 and not visibility.local_heads
    block_size = num_queries // math.gcd(4, num_queries // 64)
    blocks = []
    for start in range(0, num_queries, block_size):
        end = start + block_size
        first_key = max(start + 1 - visibility.window, 0) if all_heads_local else 0
        queries, keys = slice(start, end), slice(first_key, end)
        mask = visibility.allowed(queries, keys, q_BNTH.shape[1])
        block = _softmax_sum(
            q_BNTH[:, :, queries], k_BKSH[:, :, keys], v_BKSH[:, :, keys], mask, options
        )
        blocks.append(block)
    return jnp.concatenate(blocks, axis=2) if len(blocks) > 1 else blocks[0]


def _softmax_sum(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask: jax.Array,
    options: AttentionOptions,
) -> jax.Array:
    """Return softmax(scale q.k) v under a mask that broadcasts to [B, N, T, S]."""
    B, N, T, H = q_BNTH.shape
    K, S = k_BKSH.shape[1:3]
    # The G query heads of a kv head are rows of one product with it.
    M = N // K * T
    q_BKMH = (q_BNTH * options.scale).reshape(B, K, M, H)
    logits_BKMS = jnp.einsum("BKMH,BKSH->BKMS", q_BKMH, k_BKSH, preferred_element_type=jnp.float32)
    logits_BNTS = logits_BKMS.reshape(B, N, T, S)
    if options.softcap:
        logits_BNTS = options.softcap * jnp.tanh(logits_BNTS / options.softcap)
    logits_BNTS = jnp.where(mask, logits_BNTS, MASKED_LOGIT)
    weights_BNTS = softmax(logits_BNTS)
    weights_BNTS = options.dropout(weights_BNTS.astype(v_BKSH.dtype))
    weights_BKMS = weights_BNTS.reshape(B, K, M, S)
    o_BKMH = jnp.einsum("BKMS,BKSH->BKMH", weights_BKMS, v_BKSH)
    return o_BKMH.reshape(B, N, T, -1)


def cudnn_attention(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visibility: Visibility,
    options: AttentionOptions,
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Attend through cuDNN's flash attention, which has neither soft caps nor dropout.

    `implementation` of "xla" computes the same on any platform, with the whole square of logits.
    """
    window = (visibility.window - 1, 0) if visibility.window else None

    def on_device(
        q_BNTH: jax.Array,
        k_BKSH: jax.Array,
        v_BKSH: jax.Array,
        segments_BT: jax.Array | None,
    ) -> jax.Array:
        q_BTNX = q_BNTH.swapaxes(1, 2)
        k_BSKX = k_BKSH.swapaxes(1, 2)
        v_BSKX = v_BKSH.swapaxes(1, 2)
        head_dim = q_BTNX.shape[-1]
        mask_B1TS = None
        if segments_BT is not None:
            if head_dim + _SEGMENT_FEATURES <= CUDNN_MOST_HEAD_DIM:
                q_features_BTX, k_features_BTX = segment_features(segments_BT, options.scale)
                q_BTNX = _widened(q_BTNX, q_features_BTX)
                k_BSKX = _widened(k_BSKX, k_features_BTX)
                v_BSKX = _widened(v_BSKX, jnp.zeros_like(k_features_BTX))
            else:
                mask_B1TS = segments_BT[:, None, :, None] == segments_BT[:, None, None, :]
        o_BTNX = jax.nn.dot_product_attention(
            q_BTNX,
            k_BSKX,
            v_BSKX,
            mask=mask_B1TS,
            scale=options.scale,
            is_causal=True,
            local_window_size=window,
            implementation=implementation,
        )
        return o_BTNX[..., :head_dim].swapaxes(1, 2)

    return _on_each_device(on_device, q_BNTH, k_BKSH, v_BKSH, visibility.segments_BT)


def segment_features(segments_BT: jax.Array, scale: float) -> tuple[jax.Array, jax.Array]:
    """Return features that, appended to queries and keys, keep texts of a packed row apart.

    JAX passes no offsets of segments on to cuDNN's own packing (jax.nn.dot_product_attention of
    0.10 to 0.12 takes one length a row), and a mask would be an array [B, 1, T, T], which cuDNN
    reads as a bias and for which it makes a gradient of that size. But where the texts of a row are
    numbered in their order, a query of text i sees, by causality, keys of texts j <= i alone. So

        -APART (i - j)  =  (-i) APART + APART j

    is a product of two features of the query with two of the key, and adding it to the logits
    leaves those of the query's own text as they are and takes all others out of reach. (Where
    training breaks down, and logits of one row lie further apart than APART, it would not.)

    The numbers must be exact, or logits of one text would differ: bfloat16 knows whole numbers up
    to 256, so i is split in two (exact up to 65,536 texts), and APART/scale is a power of two. Sums
    of products are in float32, whose last place at APART * i is what the logits of text i may be
    off: 0.0005 at i = 32.

    Args:
      segments_BT: the text of each position, in runs; what the runs are called doesn't matter.
      scale: that the kernel multiplies products with.

    Returns:
      Features of queries and of keys, [B, T, _SEGMENT_FEATURES], in float32.
    """
    begins_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    # Text 0 begins where the row does.
    begins_BT = jnp.pad(begins_BT, ((0, 0), (1, 0)))
    number_BT = jnp.cumsum(begins_BT, axis=1)
    low_BT = (number_BT % 256).astype(jnp.float32)
    high_BT = (number_BT // 256 * 256).astype(jnp.float32)
    exponent = math.ceil(math.log2(_APART / scale))
    apart_BT = jnp.full_like(low_BT, 2.0**exponent)
    none_BT = jnp.zeros_like(low_BT)
    unused = [none_BT] * (_SEGMENT_FEATURES - 4)
    q_features_BTX = jnp.stack(
        [
            -low_BT,
            -high_BT,
            apart_BT,
            apart_BT,
            *unused,
        ],
        axis=-1,
    )
    k_features_BTX = jnp.stack(
        [
            apart_BT,
            apart_BT,
            low_BT,
            high_BT,
            *unused,
        ],
        axis=-1,
    )
    return q_features_BTX, k_features_BTX


def _widened(x_BTNH: jax.Array, features_BTX: jax.Array) -> jax.Array:
    """Return `x` with the same features appended to each of its heads."""
    B, T, N, _ = x_BTNH.shape
    features_BT1X = features_BTX[:, :, None].astype(x_BTNH.dtype)
    features_BTNX = jnp.broadcast_to(features_BT1X, (B, T, N, features_BTX.shape[-1]))
    return jnp.concatenate([x_BTNH, features_BTNX], axis=-1)


def splash_attention(
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    visibility: Visibility,
    options: AttentionOptions,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Attend through JAX's splash attention (Pallas), which has no dropout.

    T must be a multiple of 128. Blocks that the causal or local mask hides are skipped.
    `interpret` runs the kernel on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def on_device(
        q_BNTH: jax.Array,
        k_BKSH: jax.Array,
        v_BKSH: jax.Array,
        segments_BT: jax.Array | None,
    ) -> jax.Array:
        num_queries = q_BNTH.shape[2]
        kernel = splash.make_splash_mha(
            splash_mask(num_queries, 1, visibility.window),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=splash_block_sizes(num_queries),
            attn_logits_soft_cap=options.softcap or None,
            interpret=interpret,
        )
        # The kernel takes one row, and has no scale argument.
        scaled_BNTH = (q_BNTH * options.scale).astype(q_BNTH.dtype)
        if segments_BT is None:
            o_BNTH = jax.vmap(kernel)(scaled_BNTH, k_BKSH, v_BKSH)
        else:
            segments = splash.SegmentIds(segments_BT, segments_BT)
            o_BNTH = jax.vmap(kernel)(scaled_BNTH, k_BKSH, v_BKSH, segments)
        return o_BNTH.astype(q_BNTH.dtype)

    return _on_each_device(on_device, q_BNTH, k_BKSH, v_BKSH, visibility.segments_BT)


def splash_block_sizes(length: int) -> Any:
    """Return the sizes of splash's blocks of queries and keys, which divide a length."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = math.gcd(length, _MOST_SPLASH_BLOCK)
    return splash.BlockSizes(
        *(block, block, block),  # forward: queries, keys and values, keys computed at once
        *(block, block, block),  # gradients of keys and values
        *(block, block),  # gradients of queries
    )


@functools.cache
def splash_mask(length: int, num_parts: int, window: int) -> Any:
    """Return splash's mask of the queries of a row over its keys, which is that of all heads.

    When it compiles, splash asks for each block of the mask six times, to know whether all of it is
    allowed, some, or nothing. Its own masks compare each query of a block with each key: 27 s for a
    row of 65,536. This one looks at the ends of a block; of those that are alike it returns one
    number for all, which is all that splash looks at.

    Args:
      length: of the row, in tokens.
      num_parts: queries and keys are in the order of `core.ring.order_of_parts`.
      window: how many keys a query sees, counted from itself backwards (0: all).
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    position = order_of_parts(length, num_parts)

    def is_seen(query_ids: Any, key_ids: Any) -> Any:
        seen = query_ids >= key_ids
        if window:
            seen &= query_ids < key_ids + window
        return seen

    class RowMask(splash.Mask):
        """The mask of one head, as splash asks for it."""

        shape = (length, length)
        # In a row in its own order a key's position is its number, so the kernel can compare them.
        # Otherwise it loads the blocks that are neither empty nor full, of which few differ.
        if num_parts == 1:
            q_sequence = position
            mask_function = staticmethod(is_seen)

        def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
            """Return the mask of a block, which lies in one stretch, so it is in order."""
            queries, keys = block
            query_ids = position[queries]
            key_ids = position[keys]
            first_query, last_query = query_ids[0], query_ids[-1]
            first_key, last_key = key_ids[0], key_ids[-1]
            is_later = first_key > last_query
            is_out_of_reach = window > 0 and last_key <= first_query - window
            if is_later or is_out_of_reach:
                return np.array(False)
            is_earlier = last_key <= first_query
            is_within_reach = window == 0 or first_key > last_query - window
            if is_earlier and is_within_reach:
                return np.array(True)
            return is_seen(query_ids[:, None], key_ids[None])

    return splash.MultiHeadMask([RowMask()])


def _on_each_device(
    kernel: Callable[..., jax.Array],
    q_BNTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    segments_BT: jax.Array | None,
) -> jax.Array:
    """Run `kernel(q, k, v, segments)` on each device's rows and heads, with their kv heads."""
    k_BKSH, v_BKSH, kv_heads = with_own_kv_heads(q_BNTH, k_BKSH, v_BKSH)
    qkv = (
        (q_BNTH, heads_axes("heads")),
        (k_BKSH, heads_axes(kv_heads)),
        (v_BKSH, heads_axes(kv_heads)),
    )
    if segments_BT is None:
        return on_shards(lambda q, k, v: kernel(q, k, v, None), *qkv)
    return on_shards(kernel, *qkv, (segments_BT.astype(jnp.int32), ("batch", "positions")))


def heads_axes(heads: str) -> tuple[str, str, str, str]:
    """Return the logical axes of heads-first arrays; `heads` is "heads" or "kv_heads"."""
    return ("batch", heads, "positions", "head_dim")


def with_own_kv_heads(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array
) -> tuple[jax.Array, jax.Array, str]:
    """Return k and v such that each device has the kv heads of its query heads, and what their axis
    of heads is called.
    """
    heads_axis = 1
    of_queries = activation_spec(q_BNTH, heads_axes("heads"))[heads_axis]
    if of_queries == activation_spec(k_BKSH, heads_axes("kv_heads"))[heads_axis]:
        return k_BKSH, v_BKSH, "kv_heads"
    # The mesh splits the query heads but doesn't divide the kv heads, so a device would hold query
    # heads without their kv heads: each query head gets a copy of its own.
    group_size = q_BNTH.shape[1] // k_BKSH.shape[1]
    k_BKSH = jnp.repeat(k_BKSH, group_size, axis=1)
    v_BKSH = jnp.repeat(v_BKSH, group_size, axis=1)
    return k_BKSH, v_BKSH, "heads"
