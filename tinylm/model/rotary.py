"""Rotary positions (Su et al. 2021), and three ways to stretch them over longer texts than a model
was trained on.

Each pair of features of queries and keys turns with the position, at a frequency of its own. In a
longer text slow pairs reach angles that the model has never seen, so their frequencies are divided
by `model.rotary_factor`:

    linear   those of all pairs (Chen et al. 2023, Extending Context Window of Large Language Models
             via Positional Interpolation, equation 4)
    llama3   those of slow pairs alone (Llama 3.1: `apply_scaling` of meta-llama/llama-models)
    yarn     the same with another blend (Peng et al. 2023, YaRN, section 3.2), and queries and
             keys grow a little (section 3.4)

    turns in the original context    rotary_slow_turns    rotary_fast_turns
    frequency            divided by the factor |   a blend    | as it was

Positions times frequencies are taken in whole numbers, of which 2^32 are a turn: they count turns
off by themselves. In float32 the fast pairs of a row of 2^20 tokens would be off by up to 0.03
radians, each position by another amount.

Axes: B batch, T positions, N heads, H head size, R pairs of rotating features.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.model.config import ModelConfig

_TURN = 2**32


class Rotary(NamedTuple):
    """Cosines and sines of the angles by which each position turns its pairs of features."""

    cos_B1TR: jax.Array
    sin_B1TR: jax.Array


def rotary_angles(positions_BT: jax.Array, config: ModelConfig) -> Rotary:
    """Return the angles of tokens at positions in their texts, for a resolved config.

    Angles of a position grow exactly in proportion to it, so those of two positions differ by what
    their distance alone decides.
    """
    turns_R = np.round(rotary_frequencies(config) / (2 * np.pi) * _TURN)
    turns_R = (turns_R % _TURN).astype(np.uint32)
    # Products wrap around at a whole turn, those of positions below 0 too.
    turned_B1TR = positions_BT.astype(jnp.uint32)[:, None, :, None] * turns_R
    # As signed numbers they lie half a turn to either side, where float32 is finest.
    turned_B1TR = jax.lax.bitcast_convert_type(turned_B1TR, jnp.int32)
    angle_B1TR = turned_B1TR.astype(jnp.float32) * np.float32(2 * np.pi / _TURN)
    cos_B1TR = jnp.cos(angle_B1TR)
    sin_B1TR = jnp.sin(angle_B1TR)
    if config.rotary_scaling == "yarn":
        cos_B1TR = cos_B1TR * config.rotary_attention_factor
        sin_B1TR = sin_B1TR * config.rotary_attention_factor
    return Rotary(cos_B1TR, sin_B1TR)


def rotary_frequencies(config: ModelConfig) -> np.ndarray:
    """Return the frequency of each pair of features, in radians a position, in float64: [R].

    Without scaling, that of pair i is base^(-i / R) (Su et al. 2021, equation 15).
    """
    c = config
    num_pairs = int(c.head_dim * c.rotary_fraction) // 2
    frequency_R = c.rotary_base ** (-np.arange(num_pairs) / num_pairs)
    if c.rotary_scaling == "none":
        return frequency_R
    if c.rotary_scaling == "linear":
        return frequency_R / c.rotary_factor
    if c.rotary_scaling == "llama3":
        kept_R = _kept_by_turns(c, frequency_R)
    else:
        kept_R = _kept_by_pair(c, num_pairs)
    return kept_R * frequency_R + (1 - kept_R) * frequency_R / c.rotary_factor


def _kept_by_turns(config: ModelConfig, frequency_R: np.ndarray) -> np.ndarray:
    """Return how far each pair keeps its frequency, from 0 to 1, linearly in its turns."""
    c = config
    turns_R = c.rotary_original_context * frequency_R / (2 * np.pi)
    share_R = (turns_R - c.rotary_slow_turns) / (c.rotary_fast_turns - c.rotary_slow_turns)
    return np.clip(share_R, 0, 1)


def _kept_by_pair(config: ModelConfig, num_pairs: int) -> np.ndarray:
    """Return how far each pair keeps its frequency, from 0 to 1, linearly in its number.

    The blend begins and ends at whole pairs, as in YaRN's own code.
    """
    c = config

    def pair_with(turns: float) -> float:
        """Return the number of the pair that makes so many turns in the original context."""
        wavelength = c.rotary_original_context / turns
        return num_pairs * math.log(wavelength / (2 * math.pi)) / math.log(c.rotary_base)

    first = max(math.floor(pair_with(c.rotary_fast_turns)), 0)
    last = min(math.ceil(pair_with(c.rotary_slow_turns)), 2 * num_pairs - 1)
    # Where both are the same pair, the ones before it are fast and the others slow.
    width = last - first or 0.001
    share_R = (np.arange(num_pairs) - first) / width
    return 1 - np.clip(share_R, 0, 1)


def rotate(x_BNTH: jax.Array, rotary: Rotary) -> jax.Array:
    """Turn the first 2R features of each head by their position; features i and i + R are a
    pair.
    """
    cos, sin = rotary
    num_pairs = cos.shape[-1]
    first = x_BNTH[..., :num_pairs]
    second = x_BNTH[..., num_pairs : 2 * num_pairs]
    unturned = x_BNTH[..., 2 * num_pairs :]
    turned_first = first * cos - second * sin
    turned_second = second * cos + first * sin
    turned = jnp.concatenate([turned_first, turned_second], axis=-1)
    turned = turned.astype(x_BNTH.dtype)
    if unturned.shape[-1] == 0:
        return turned
    return jnp.concatenate([turned, unturned], axis=-1)
