"""Rotary positions: what they let attention know, at any distance from the begin, and how they
stretch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_model

from tinylm.model.rotary import rotary_angles, rotary_frequencies, rotate

SCALED = {
    "none": {},
    "linear": {"rotary_scaling": "linear", "rotary_factor": 4.0},
    "llama3": {"rotary_scaling": "llama3", "rotary_factor": 4.0, "rotary_original_context": 512},
    "yarn": {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_original_context": 512},
}


def config_of(scaling, **changes):
    return tiny_model(num_heads=1, embed_dim=32, **{**SCALED[scaling], **changes})


def products(config, positions):
    """Return the products of one query at the last of these positions with keys at all of them."""
    x_BNTH = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, len(positions), 32)))
    turned_TH = jax.jit(lambda p: rotate(x_BNTH, rotary_angles(p, config)))(positions[None])[0, 0]
    return np.asarray(turned_TH @ turned_TH[-1])


@pytest.mark.parametrize("scaling", SCALED)
def test_distance_alone_counts_however_far_from_the_begin(scaling):
    """Also in rows of 2^20 tokens, and for the padding before a prompt, at positions below 0."""
    config = config_of(scaling)
    near = products(config, np.arange(40, dtype=np.int32))
    for begin in (-30, 2**14, 2**20 - 40, 2**28):
        far = products(config, np.arange(begin, begin + 40, dtype=np.int32))
        np.testing.assert_allclose(far, near, atol=2e-5)


def test_angles_are_positions_times_frequencies():
    config = config_of("none")
    positions = np.arange(3000)
    exact_TR = positions[:, None] * 10_000.0 ** (-np.arange(16) / 16)
    rotary = rotary_angles(jnp.asarray(positions[None]), config)
    np.testing.assert_allclose(rotary.cos_B1TR[0, 0], np.cos(exact_TR), atol=5e-6)
    np.testing.assert_allclose(rotary.sin_B1TR[0, 0], np.sin(exact_TR), atol=5e-6)


def test_linear_scaling_moves_positions_together():
    plain = rotary_angles(jnp.arange(0, 32)[None], config_of("none"))
    scaled = rotary_angles(jnp.arange(0, 128, 4)[None], config_of("linear"))
    np.testing.assert_allclose(scaled.cos_B1TR, plain.cos_B1TR, atol=1e-6)


@pytest.mark.parametrize("scaling", ["llama3", "yarn"])
def test_fast_pairs_stay_and_slow_ones_stretch(scaling):
    plain_R = rotary_frequencies(config_of("none"))
    slowed_R = plain_R / rotary_frequencies(config_of(scaling))
    turns_R = 512 * plain_R / (2 * np.pi)
    fast_turns = {"llama3": 4, "yarn": 32}[scaling]
    assert (slowed_R[turns_R > fast_turns] == 1).all()
    # YaRN begins and ends its blend at whole pairs, so the first pair behind may be of it.
    np.testing.assert_allclose(slowed_R[turns_R < 1][1:], 4)
    assert (np.diff(slowed_R) >= -1e-12).all()
    blended_R = slowed_R[(turns_R < fast_turns) & (turns_R > 1)]
    assert 1 < blended_R.mean() < 4


def test_yarn_lets_what_rotates_grow():
    """By 1 + 0.1 ln s in queries and keys alike, so the logits by its square (section 3.4)."""
    positions = np.arange(12, dtype=np.int32)
    plain = products(config_of("yarn", rotary_attention_factor=1.0), positions)
    grown = products(config_of("yarn"), positions)
    np.testing.assert_allclose(grown, plain * (1 + 0.1 * np.log(4)) ** 2, rtol=1e-5, atol=1e-5)
