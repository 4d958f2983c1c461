"""Random bits by their place: one part of a large array, drawn where it is needed.

`jax.random.bits(key, shape)` hashes a key with the number of each element, counted over the whole
shape (Salmon et al. 2011, Threefry; JAX's partitionable form, its default since 0.5). So a device
that holds some columns of an array, in whatever order, draws the bits of just those columns from
their numbers. Dropout needs this where a mesh splits rows by position: the masks are those of one
device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.random import threefry2x32_p


class _Wide(NamedTuple):
    """Whole numbers below 2^64, in two words of 32 bits."""

    high: jax.Array
    low: jax.Array


def bits_at(key_words_B2: jax.Array, places: Sequence[tuple[jax.Array, int]]) -> jax.Array:
    """Return what `jax.random.bits(key, sizes, uint16)` has at some places, for each of B keys.

    Args:
      key_words_B2: the words of each key, as `jax.random.key_data` returns them.
      places: for each dimension of the whole array, the indices wanted, and its size. The indices
        broadcast against each other.

    Returns:
      The bits, [B, ...], of the shape that the indices broadcast to.
    """
    zero = jnp.zeros((), jnp.uint32)
    number = _Wide(zero, zero)
    for index, size in places:
        number = _times_plus(number, size, index.astype(jnp.uint32))

    def of_row(words_2: jax.Array) -> jax.Array:
        # The primitive takes four arrays of one shape.
        first_word, second_word = words_2
        bits_high, bits_low = threefry2x32_p.bind(
            jnp.full_like(number.low, first_word),
            jnp.full_like(number.low, second_word),
            number.high,
            number.low,
        )
        return bits_high ^ bits_low

    return jax.vmap(of_row)(key_words_B2).astype(jnp.uint16)


def _times_plus(number: _Wide, size: int, index: jax.Array) -> _Wide:
    """Return number * size + index, for a size below 2^32."""
    size_high, size_low = divmod(size, 2**16)
    high_half = number.low >> 16
    low_half = number.low & 0xFFFF
    # By halves of 16 bits, as in long multiplication.
    middle_1 = low_half * size_high
    middle_2 = high_half * size_low
    carried = low_half * size_low >> 16
    carried += middle_1 & 0xFFFF
    carried += middle_2 & 0xFFFF
    high = number.high * jnp.uint32(size)
    high += high_half * size_high
    high += middle_1 >> 16
    high += middle_2 >> 16
    high += carried >> 16
    low = number.low * jnp.uint32(size) + index
    # A sum that goes beyond 32 bits is smaller than what was added.
    high += low < index
    low, high = jnp.broadcast_arrays(low, high)
    return _Wide(high, low)
