"""Drawing a token: temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p
(Nguyen et al. 2024).

The repetition penalty (Keskar et al. 2019, section 4.1) acts on the logits first; filters follow in
this order: temperature, top-k, top-p over what is left, min-p over what is left. Their values are
traced, so that one compiled program serves all; which of them are used at all is static, since
candidates cost a sort.
"""

import dataclasses

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


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to draw: temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1
    change nothing.
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
        """The static part: 0 greedy, -1 all tokens as they are, else how many are sorted (top_k in
        powers of two).
        """
        if self.temperature == 0:
            return 0
        if self.top_k:
            return max(16, 1 << (self.top_k - 1).bit_length())
        return -1 if self.top_p == 1 and self.min_p == 0 else 2**31

    @property
    def values(self) -> tuple[float, int, float, float]:
        """The traced part: temperature, top_k, top_p, min_p."""
        return (
            float(self.temperature),
            min(self.top_k, 2**31 - 1),
            float(self.top_p),
            float(self.min_p),
        )


def draw(uniform_B: jax.Array, logits_BV: jax.Array, candidates: int, values: tuple) -> jax.Array:
    """Return one token id a row, drawn by inverting the distribution at that row's number in [0,
    1).
    """
    if candidates == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    temperature, top_k, top_p, min_p = values
    scaled_BV = logits_BV / temperature
    if candidates < 0:
        return _invert(uniform_B, jax.nn.softmax(scaled_BV))
    sorted_BC, ids_BC = jax.lax.top_k(scaled_BV, min(candidates, logits_BV.shape[-1]))
    chosen_B = _invert(uniform_B, jax.nn.softmax(keep_likely(sorted_BC, top_k, top_p, min_p)))
    return jnp.take_along_axis(ids_BC, chosen_B[:, None], axis=1)[:, 0].astype(jnp.int32)


def _invert(uniform_B: jax.Array, probability_BC: jax.Array) -> jax.Array:
    """Return the first index up to which the probabilities add up to more than `uniform_B`, never
    one of 0.
    """
    sum_BC = cumulate(probability_BC)
    above_BC = sum_BC > uniform_B[:, None] * jnp.max(sum_BC, axis=-1, keepdims=True)
    return jnp.argmax(above_BC & (probability_BC > 0), axis=-1).astype(jnp.int32)


def cumulate(x_BC: jax.Array, side: int = 128) -> jax.Array:
    """Return sums of the first 1, 2, ... elements as two products with triangles, which is faster
    than a scan.
    """
    size = x_BC.shape[-1]
    side = min(side, size)
    x_BnC = jnp.pad(x_BC, ((0, 0), (0, -size % side))).reshape(len(x_BC), -1, side)
    inner_BnC = x_BnC @ jnp.triu(jnp.ones((side, side), x_BC.dtype))
    blocks = x_BnC.shape[1]
    before_Bn = inner_BnC[..., -1] @ jnp.triu(jnp.ones((blocks, blocks), x_BC.dtype), 1)
    return (inner_BnC + before_Bn[..., None]).reshape(len(x_BC), -1)[:, :size]


def keep_likely(sorted_BC: jax.Array, top_k, top_p, min_p) -> jax.Array:
    """Put far below: all but the first `top_k` (0: all) of logits in falling order, of the rest all
    but the fewest that have `top_p` together, and of these all less probable than `min_p` times the
    first.
    """
    ranks_C = jnp.arange(sorted_BC.shape[-1])
    kept_BC = jnp.where((ranks_C < top_k) | (top_k == 0), sorted_BC, MASKED_LOGIT)
    probability_BC = jax.nn.softmax(kept_BC, axis=-1)
    before_BC = cumulate(probability_BC) - probability_BC
    likely_BC = (before_BC < top_p) & (kept_BC >= kept_BC[:, :1] + jnp.log(min_p))
    return jnp.where(likely_BC | (ranks_C == 0), kept_BC, MASKED_LOGIT)


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty) -> jax.Array:
    """Divide the positive logits of seen tokens by `penalty`, multiply the negative ones."""
    return jnp.where(
        seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV
    )
