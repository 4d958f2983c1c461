"""Drawing a token: temperature, top-k, top-p, min-p and the repetition penalty.

Sources: top-k, Fan et al. 2018; top-p, Holtzman et al. 2020; min-p, Nguyen et al. 2024; the
repetition penalty, Keskar et al. 2019, section 4.1.

The penalty acts on the logits first. Filters follow in this order: temperature, top-k, top-p over
what is left, min-p over what is left. Their values are traced, so one compiled program serves all;
which of them are used at all is static, since candidates cost a sort.

Axes: B batch, V vocab, C candidates, n blocks of candidates.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tinylm.core.errors import UserError
from tinylm.core.settings import Bounds
from tinylm.model.layers import MASKED_LOGIT

# The temperature and the penalty: what float32 can hold once a logit, or MASKED_LOGIT, is divided
# by it.
BOUNDS = {
    "temperature": Bounds(least=1e-6, most=1e6, also=(0,)),
    "top_k": Bounds(least=0),
    "top_p": Bounds(above=0, most=1),
    "min_p": Bounds(least=0, below=1),
    "repetition_penalty": Bounds(least=1e-6, most=1e6),
}

# As numbers of candidates: all tokens, unsorted; and more than any vocabulary has.
_ALL = -1
_MOST = 2**31


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to draw a token.

    A temperature of 0 is greedy. What changes nothing: top_k 0, top_p 1, min_p 0, and
    repetition_penalty 1.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def check(self, prefix: str) -> None:
        """Raise UserError where a value is out of range; `prefix` names where it was given."""
        for name, bounds in BOUNDS.items():
            value = getattr(self, name)
            if not bounds.admits(value):
                raise UserError(f"{prefix}{name}={value} must be {bounds}.")

    @property
    def penalizes(self) -> bool:
        """Whether tokens that a text has already count less."""
        return self.repetition_penalty != 1

    @property
    def candidates(self) -> int:
        """The static part: how many of the most probable tokens are sorted.

        0 is greedy, and _ALL draws from all tokens as they are. top_k is rounded up to a power of
        two, so that few programs are compiled.
        """
        if self.temperature == 0:
            return 0
        if self.top_k:
            return max(16, 1 << (self.top_k - 1).bit_length())
        if self.top_p == 1 and self.min_p == 0:
            return _ALL
        return _MOST

    @property
    def filters(self) -> "Filters":
        """The traced part."""
        return Filters(
            temperature=float(self.temperature),
            top_k=min(self.top_k, _MOST - 1),
            top_p=float(self.top_p),
            min_p=float(self.min_p),
        )


class Filters(NamedTuple):
    """Values of a sampler that one compiled program takes as they come."""

    temperature: jax.Array | float
    top_k: jax.Array | int
    top_p: jax.Array | float
    min_p: jax.Array | float


def draw(
    uniform_B: jax.Array, logits_BV: jax.Array, candidates: int, filters: Filters
) -> jax.Array:
    """Return one token id a row, drawn by inverting its distribution.

    Args:
      uniform_B: for each row the number in [0, 1) at which its distribution is inverted.
      logits_BV: of the next token.
      candidates, filters: those of a sampler.
    """
    if candidates == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled_BV = logits_BV / filters.temperature
    if candidates == _ALL:
        return _invert(uniform_B, jax.nn.softmax(scaled_BV))
    num_candidates = min(candidates, logits_BV.shape[-1])
    sorted_BC, ids_BC = jax.lax.top_k(scaled_BV, num_candidates)
    likely_BC = keep_likely(sorted_BC, filters.top_k, filters.top_p, filters.min_p)
    chosen_B = _invert(uniform_B, jax.nn.softmax(likely_BC))
    id_B1 = jnp.take_along_axis(ids_BC, chosen_B[:, None], axis=1)
    return id_B1[:, 0].astype(jnp.int32)


def _invert(uniform_B: jax.Array, probability_BC: jax.Array) -> jax.Array:
    """Return the first index up to which the probabilities add up to more than `uniform_B`.

    It is never one of probability 0.
    """
    sum_BC = cumulate(probability_BC)
    # Rounded probabilities don't add up to 1.
    total_B1 = jnp.max(sum_BC, axis=-1, keepdims=True)
    is_above_BC = sum_BC > uniform_B[:, None] * total_B1
    return jnp.argmax(is_above_BC & (probability_BC > 0), axis=-1).astype(jnp.int32)


def cumulate(x_BC: jax.Array, side: int = 128) -> jax.Array:
    """Return sums of the first 1, 2, ... elements, as two products with triangles.

    That is faster than a scan. Elements are cut into n blocks of `side`: the first product sums
    within blocks, the second over whole blocks.
    """
    batch_size, size = x_BC.shape
    side = min(side, size)
    padded_BC = jnp.pad(x_BC, ((0, 0), (0, -size % side)))
    x_BnC = padded_BC.reshape(batch_size, -1, side)
    within_CC = jnp.triu(jnp.ones((side, side), x_BC.dtype))
    inner_BnC = x_BnC @ within_CC
    num_blocks = x_BnC.shape[1]
    before_nn = jnp.triu(jnp.ones((num_blocks, num_blocks), x_BC.dtype), 1)
    before_Bn = inner_BnC[..., -1] @ before_nn
    sum_BnC = inner_BnC + before_Bn[..., None]
    return sum_BnC.reshape(batch_size, -1)[:, :size]


def keep_likely(
    sorted_BC: jax.Array,
    top_k: jax.Array | int,
    top_p: jax.Array | float,
    min_p: jax.Array | float,
) -> jax.Array:
    """Return logits of which those that may not be drawn are far below the others.

    Args:
      sorted_BC: logits in falling order.
      top_k: the first so many are kept (0: all).
      top_p: of these, the fewest that have this probability together.
      min_p: of these, those that are at least this many times as probable as the first.
    """
    ranks_C = jnp.arange(sorted_BC.shape[-1])
    in_top_k_C = (ranks_C < top_k) | (top_k == 0)
    kept_BC = jnp.where(in_top_k_C, sorted_BC, MASKED_LOGIT)
    probability_BC = jax.nn.softmax(kept_BC, axis=-1)
    before_BC = cumulate(probability_BC) - probability_BC
    in_top_p_BC = before_BC < top_p
    in_min_p_BC = kept_BC >= kept_BC[:, :1] + jnp.log(min_p)
    # Rounding must not take the first away.
    is_likely_BC = (in_top_p_BC & in_min_p_BC) | (ranks_C == 0)
    return jnp.where(is_likely_BC, kept_BC, MASKED_LOGIT)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array | float) -> jax.Array:
    """Divide the positive logits of seen tokens by `penalty`, multiply the negative ones."""
    penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
    return jnp.where(seen_BV, penalized_BV, logits_BV)
