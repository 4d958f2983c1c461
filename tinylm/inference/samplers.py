"""Drawing the next token: temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), greedy.

Filters act in this order: temperature, then top-k, then top-p over what is left. Their values are traced, so that one
compiled program serves all; whether a filter is used at all is static, since it costs a sort.
"""

import dataclasses

import jax
import jax.numpy as jnp

_FAR_BELOW = -1e30


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to draw: temperature 0 is greedy, top_k 0 and top_p 1 keep all tokens."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def kind(self) -> tuple[bool, bool]:
        """The static part: (greedy, filtered)."""
        return self.temperature == 0, bool(self.top_k) or self.top_p < 1

    @property
    def values(self) -> tuple[float, int, float]:
        """The traced part: temperature, top_k, top_p."""
        return float(self.temperature), int(self.top_k), float(self.top_p)


def draw(keys_B: jax.Array, logits_BV: jax.Array, kind: tuple[bool, bool], values: tuple) -> jax.Array:
    """Return one token id a row, drawn with that row's key."""
    greedy, filtered = kind
    if greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    temperature, top_k, top_p = values
    scaled_BV = logits_BV / temperature
    if filtered:
        scaled_BV = keep_likely(scaled_BV, top_k, top_p)
    return jax.vmap(jax.random.categorical)(keys_B, scaled_BV).astype(jnp.int32)


def keep_likely(logits_BV: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float) -> jax.Array:
    """Put the logits of all but the `top_k` most probable tokens, and of these but the fewest with `top_p`, far below.

    Of equally probable tokens those with the lower id are kept first, so that exactly top_k remain.
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    rank_BV = jnp.argsort(order_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    most = jnp.where(top_k > 0, top_k, logits_BV.shape[-1])
    sorted_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < most, sorted_BV, _FAR_BELOW)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    kept_BV = jnp.where((before_BV < top_p) & (sorted_BV > _FAR_BELOW), sorted_BV, _FAR_BELOW)
    return jnp.take_along_axis(kept_BV, rank_BV, axis=-1)
