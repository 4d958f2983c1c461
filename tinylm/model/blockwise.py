"""Softmax over some keys at a time, of which attention over a row in parts is made.

The softmax over all keys follows from those over parts of them and the logarithms of their sums
(Milakov and Gimelshein 2018), and its gradients from the logarithm of the whole sum (Dao et al.
2022, "FlashAttention", appendix B.4). So no more than a block of logits exists at a time, here in
XLA's own operations: any platform, any mask, dropout. Statistics and sums are in float32.

Axes: B batch, T query positions, S key positions, K kv heads, G query heads per kv head, H head
size.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tinylm.model.layers import MASKED_LOGIT
from tinylm.model.random_bits import bits_at

# The most logits that a device makes at once: 64 MiB in float32.
MOST_LOGITS = 2**24


class Weighing(NamedTuple):
    """How logits become weights: constants of the program."""

    softcap: float  # soft limit on the logits (0: none)
    threshold: int  # bits below it drop a weight (0: no dropout)
    factor: float  # on the weights that are kept, with dropout
    num_heads: int  # of the model
    row_length: int


class Queries(NamedTuple):
    """Queries, scaled, with what their masks need; None: no mask needs it."""

    q_BKGTH: jax.Array
    position_T: jax.Array  # in the row
    segments_BT: jax.Array | None = None
    window_KG: jax.Array | None = None  # how many keys a head sees, from the query's backwards
    head_KG: jax.Array | None = None  # the number of a head in the model, for dropout
    key_words_B2: jax.Array | None = None  # the random key of a row, for dropout

    def cut(self, start: jax.Array | int, length: int) -> "Queries":
        """Return some of the queries."""
        segments_BT = self.segments_BT
        if segments_BT is not None:
            segments_BT = jax.lax.dynamic_slice_in_dim(segments_BT, start, length, 1)
        return self._replace(
            q_BKGTH=jax.lax.dynamic_slice_in_dim(self.q_BKGTH, start, length, 3),
            position_T=jax.lax.dynamic_slice_in_dim(self.position_T, start, length, 0),
            segments_BT=segments_BT,
        )


class Keys(NamedTuple):
    """Keys and values, with what masks need."""

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    position_S: jax.Array  # in the row; below 0: the row has none there
    segments_BS: jax.Array | None = None

    def mapped(self, function: Callable[[jax.Array, int], jax.Array]) -> "Keys":
        """Return `function(array, its axis of positions)` of each array."""
        segments_BS = self.segments_BS
        if segments_BS is not None:
            segments_BS = function(segments_BS, 1)
        return Keys(
            k_BKSH=function(self.k_BKSH, 2),
            v_BKSH=function(self.v_BKSH, 2),
            position_S=function(self.position_S, 0),
            segments_BS=segments_BS,
        )

    def cut(self, start: jax.Array | int, length: int) -> "Keys":
        """Return some of the keys."""
        return self.mapped(lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, length, axis))


class Sums(NamedTuple):
    """The softmax over some keys."""

    o_BKGTH: jax.Array  # the mean of their values by weight
    log_z_BKGT: jax.Array  # the logarithm of the sum of their exponentials


class Answers(NamedTuple):
    """What the backward pass knows of the softmax over all keys."""

    do_BKGTH: jax.Array  # the gradient of o, in the type of the model
    log_z_BKGT: jax.Array
    delta_BKGT: jax.Array  # the sum of do * o over features

    def cut(self, start: jax.Array | int, length: int) -> "Answers":
        """Return those of some queries."""
        return Answers(*(jax.lax.dynamic_slice_in_dim(x, start, length, 3) for x in self))


class Gradients(NamedTuple):
    """Of queries, keys and values, in float32."""

    dq_BKGTH: jax.Array
    dk_BKSH: jax.Array
    dv_BKSH: jax.Array


def merge(one: Sums, other: Sums) -> Sums:
    """Return the softmax over the keys of both."""
    log_z_BKGT = jnp.logaddexp(one.log_z_BKGT, other.log_z_BKGT)
    share_of_one = jnp.exp(one.log_z_BKGT - log_z_BKGT)
    share_of_other = jnp.exp(other.log_z_BKGT - log_z_BKGT)
    o_BKGTH = share_of_one[..., None] * one.o_BKGTH
    o_BKGTH += share_of_other[..., None] * other.o_BKGTH
    return Sums(o_BKGTH, log_z_BKGT)


def attend_to(
    weighing: Weighing, queries: Queries, keys: Keys, *, all_earlier: bool = False
) -> Sums:
    """Return the softmax of queries over keys.

    A query that sees none of the keys gets a log_z so low that it adds nothing where sums are
    merged. `all_earlier` says that no key is after a query.
    """

    def of_block(start: jax.Array | int, length: int) -> Sums:
        part = queries.cut(start, length)
        logits_BKGTS = _masked(_logits(weighing, part, keys), part, keys, all_earlier)
        log_z_BKGT = jax.nn.logsumexp(logits_BKGTS, axis=-1)
        log_z_BKGT1 = log_z_BKGT[..., None]
        weights_BKGTS = jnp.exp(logits_BKGTS - log_z_BKGT1)
        if weighing.threshold:
            weights_BKGTS = weights_BKGTS * _kept(weighing, part, keys)
        o_BKGTH = jnp.einsum(
            "BKGTS,BKSH->BKGTH",
            weights_BKGTS.astype(keys.v_BKSH.dtype),
            keys.v_BKSH,
            preferred_element_type=jnp.float32,
        )
        return Sums(o_BKGTH, log_z_BKGT)

    length = len(queries.position_T)
    block = _block_length(queries, keys)
    if block == length:
        return of_block(0, length)

    starts = jnp.arange(0, length, block)
    blocks = jax.lax.map(lambda start: of_block(start, block), starts)
    return Sums(
        o_BKGTH=join_blocks(blocks.o_BKGTH),
        log_z_BKGT=join_blocks(blocks.log_z_BKGT),
    )


def gradients_of(
    weighing: Weighing,
    queries: Queries,
    keys: Keys,
    answers: Answers,
    *,
    all_earlier: bool = False,
) -> Gradients:
    """Return what some keys add to the gradients, given the softmax over all of them."""
    k_BKSH = keys.k_BKSH
    v_BKSH = keys.v_BKSH
    dtype = k_BKSH.dtype

    def of_block(start: jax.Array | int, length: int) -> Gradients:
        part = queries.cut(start, length)
        do_BKGTH, log_z_BKGT, delta_BKGT = answers.cut(start, length)
        logits_BKGTS = _logits(weighing, part, keys)
        slope_BKGTS: jax.Array | float = 1.0
        if weighing.softcap:
            slope_BKGTS = 1 - jnp.square(logits_BKGTS / weighing.softcap)
        masked_BKGTS = _masked(logits_BKGTS, part, keys, all_earlier)
        log_z_BKGT1 = log_z_BKGT[..., None]
        weights_BKGTS = jnp.exp(masked_BKGTS - log_z_BKGT1)
        dweights_BKGTS = _product("BKGTH,BKSH->BKGTS", do_BKGTH, v_BKSH)
        used_BKGTS = weights_BKGTS
        if weighing.threshold:
            kept_BKGTS = _kept(weighing, part, keys)
            used_BKGTS = weights_BKGTS * kept_BKGTS
            dweights_BKGTS = dweights_BKGTS * kept_BKGTS
        delta_BKGT1 = delta_BKGT[..., None]
        dlogits_BKGTS = weights_BKGTS * (dweights_BKGTS - delta_BKGT1)
        dlogits_BKGTS = (dlogits_BKGTS * slope_BKGTS).astype(dtype)
        return Gradients(
            dq_BKGTH=_product("BKGTS,BKSH->BKGTH", dlogits_BKGTS, k_BKSH),
            dk_BKSH=_product("BKGTS,BKGTH->BKSH", dlogits_BKGTS, part.q_BKGTH),
            dv_BKSH=_product("BKGTS,BKGTH->BKSH", used_BKGTS.astype(dtype), do_BKGTH),
        )

    length = len(queries.position_T)
    block = _block_length(queries, keys)
    if block == length:
        return of_block(0, length)

    def add_block(total: tuple, start: jax.Array) -> tuple[tuple, jax.Array]:
        dk_BKSH, dv_BKSH = total
        more = of_block(start, block)
        total = (dk_BKSH + more.dk_BKSH, dv_BKSH + more.dv_BKSH)
        return total, more.dq_BKGTH

    zeros = (
        jnp.zeros(k_BKSH.shape, jnp.float32),
        jnp.zeros(v_BKSH.shape, jnp.float32),
    )
    starts = jnp.arange(0, length, block)
    (dk_BKSH, dv_BKSH), dq_blocks = jax.lax.scan(add_block, zeros, starts)
    return Gradients(join_blocks(dq_blocks), dk_BKSH, dv_BKSH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_in_blocks(weighing: Weighing, queries: Queries, keys: Keys) -> jax.Array:
    """Return o_BKGTH over keys that are all here, keeping no logits for the backward pass."""
    return _attend_forward(weighing, queries, keys)[0]


def _attend_forward(weighing: Weighing, queries: Queries, keys: Keys) -> tuple[jax.Array, tuple]:
    o_BKGTH, log_z_BKGT = attend_to(weighing, queries, keys)
    o_BKGTH = o_BKGTH.astype(queries.q_BKGTH.dtype)
    return o_BKGTH, (queries, keys, o_BKGTH, log_z_BKGT)


def _attend_backward(weighing: Weighing, kept: tuple, do_BKGTH: jax.Array) -> tuple[Queries, Keys]:
    queries, keys, o_BKGTH, log_z_BKGT = kept
    answers = make_answers(do_BKGTH, o_BKGTH, log_z_BKGT)
    return as_cotangents(queries, keys, gradients_of(weighing, queries, keys, answers))


attend_in_blocks.defvjp(_attend_forward, _attend_backward)


def make_answers(do_BKGTH: jax.Array, o_BKGTH: jax.Array, log_z_BKGT: jax.Array) -> Answers:
    """Return what the backward pass needs of the softmax over all keys."""
    wide_o_BKGTH = o_BKGTH.astype(jnp.float32)
    delta_BKGT = jnp.sum(do_BKGTH * wide_o_BKGTH, axis=-1)
    return Answers(do_BKGTH, log_z_BKGT, delta_BKGT)


def as_cotangents(queries: Queries, keys: Keys, gradients: Gradients) -> tuple[Queries, Keys]:
    """Return gradients as the backward pass of a `jax.custom_vjp` does; whole numbers have none."""
    dtype = keys.k_BKSH.dtype
    none: Any = None
    dqueries = Queries(
        q_BKGTH=gradients.dq_BKGTH.astype(dtype),
        position_T=none,
    )
    dkeys = Keys(
        k_BKSH=gradients.dk_BKSH.astype(dtype),
        v_BKSH=gradients.dv_BKSH.astype(dtype),
        position_S=none,
    )
    return dqueries, dkeys


def _logits(weighing: Weighing, queries: Queries, keys: Keys) -> jax.Array:
    """Return capped logits_BKGTS, not yet masked."""
    logits_BKGTS = _product("BKGTH,BKSH->BKGTS", queries.q_BKGTH, keys.k_BKSH)
    if weighing.softcap:
        logits_BKGTS = weighing.softcap * jnp.tanh(logits_BKGTS / weighing.softcap)
    return logits_BKGTS


def _masked(logits_BKGTS: jax.Array, queries: Queries, keys: Keys, all_earlier: bool) -> jax.Array:
    """Return the logits, those of keys that a query doesn't see far below all others."""
    distance_TS = queries.position_T[:, None] - keys.position_S
    if not all_earlier:
        is_earlier_TS = (distance_TS >= 0) & (keys.position_S >= 0)
        logits_BKGTS = jnp.where(is_earlier_TS, logits_BKGTS, MASKED_LOGIT)
    if queries.window_KG is not None:
        window_KG11 = queries.window_KG[..., None, None]
        logits_BKGTS = jnp.where(distance_TS < window_KG11, logits_BKGTS, MASKED_LOGIT)
    if queries.segments_BT is not None and keys.segments_BS is not None:
        of_queries_B11T1 = queries.segments_BT[:, None, None, :, None]
        of_keys_B111S = keys.segments_BS[:, None, None, None, :]
        is_same_B11TS = of_queries_B11T1 == of_keys_B111S
        logits_BKGTS = jnp.where(
            is_same_B11TS,
            logits_BKGTS,
            MASKED_LOGIT,
        )
    return logits_BKGTS


def _kept(weighing: Weighing, queries: Queries, keys: Keys) -> jax.Array:
    """Return what dropout multiplies the weights with: 0, or the factor of those that are kept.

    The bits are those that `layers.Dropout` draws for a whole row, [N, T, S].
    """
    assert queries.head_KG is not None, "dropout is drawn by head"
    assert queries.key_words_B2 is not None, "dropout is drawn by row"
    head_KG11 = queries.head_KG[:, :, None, None]
    position_T1 = queries.position_T[:, None]
    places = (
        (head_KG11, weighing.num_heads),
        (position_T1, weighing.row_length),
        (keys.position_S, weighing.row_length),
    )
    bits_BKGTS = bits_at(queries.key_words_B2, places)
    return jnp.where(bits_BKGTS >= weighing.threshold, weighing.factor, 0.0)


def _block_length(queries: Queries, keys: Keys) -> int:
    """Return how many queries meet the keys at a time."""
    B, K, G, T, _ = queries.q_BKGTH.shape
    S = keys.k_BKSH.shape[2]
    logits_of_query = B * K * G * S
    return largest_divisor(T, MOST_LOGITS // logits_of_query)


def largest_divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is at most `most`, or 1."""
    for divisor in range(min(number, most), 1, -1):
        if number % divisor == 0:
            return divisor
    return 1


def join_blocks(blocks: jax.Array) -> jax.Array:
    """Return [blocks, B, K, G, T, ...] as [B, K, G, all T, ...]."""
    joined = jnp.moveaxis(blocks, 0, 3)
    return joined.reshape(*joined.shape[:3], -1, *joined.shape[5:])


def joined_keys(before: Keys, after: Keys) -> Keys:
    """Return some keys, and then others."""
    segments_BS = None
    if before.segments_BS is not None and after.segments_BS is not None:
        segments_BS = jnp.concatenate([before.segments_BS, after.segments_BS], axis=1)
    return Keys(
        k_BKSH=jnp.concatenate([before.k_BKSH, after.k_BKSH], axis=2),
        v_BKSH=jnp.concatenate([before.v_BKSH, after.v_BKSH], axis=2),
        position_S=jnp.concatenate([before.position_S, after.position_S]),
        segments_BS=segments_BS,
    )


def _product(equation: str, one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.einsum(equation, one, other, preferred_element_type=jnp.float32)
