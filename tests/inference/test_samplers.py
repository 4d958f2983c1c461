"""Every sampler's distribution is its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.core.errors import UserError
from tinylm.inference.samplers import Filters, Sampler, cumulate, draw, keep_likely, penalize

PROBABILITIES = np.array([0.02, 0.4, 0.08, 0.3, 0.05, 0.15])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None]


def expected(temperature, top_k, top_p, min_p):
    """The definition with sorted lists: temperature, top-k, the smallest set with top_p, then at
    least min_p of it.
    """
    p = PROBABILITIES ** (1 / temperature)
    p = p / p.sum()
    order = sorted(range(len(p)), key=lambda i: -p[i])[: top_k or len(p)]
    p = np.array([p[i] if i in order else 0 for i in range(len(p))])
    p = p / p.sum()
    kept, total = [], 0.0
    for i in order:
        if total < top_p:
            kept.append(i)
        total += p[i]
    kept = [i for i in kept if p[i] >= min_p * p.max()]
    p = np.array([p[i] if i in kept else 0 for i in range(len(p))])
    return p / p.sum()


CASES = [
    (1.0, 0, 1.0, 0.0),
    (0.5, 0, 1.0, 0.0),
    (2.0, 3, 1.0, 0.0),
    (1.0, 0, 0.5, 0.0),
    (1.0, 0, 0.75, 0.0),
    (1.3, 4, 0.9, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 1.0, 0.3),
    (1.5, 5, 0.9, 0.3),
    (0.7, 0, 0.97, 0.05),
]


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_definition(case):
    sampler, n = Sampler(*case), 20_000
    uniform = jax.random.uniform(jax.random.key(1), n)
    logits = jnp.broadcast_to(LOGITS, (n, 6))
    ids = jax.jit(draw, static_argnums=2)(uniform, logits, sampler.candidates, sampler.filters)
    counts = np.bincount(np.asarray(ids), minlength=6)
    wanted = expected(*case)
    assert (counts[wanted == 0] == 0).all()
    error = np.sqrt(wanted * (1 - wanted) * n) + 1
    assert (np.abs(counts - wanted * n) < 4.5 * error).all()


def test_temperature_zero_is_greedy():
    sampler = Sampler(0.0)
    assert int(draw(jnp.zeros(1), LOGITS, sampler.candidates, sampler.filters)[0]) == 1


def test_equal_logits_keep_exactly_top_k():
    kept = keep_likely(jnp.zeros((1, 10)), 3, 1.0, 0.0)
    assert int((kept > -1e29).sum()) == 3


def test_the_lowest_and_the_highest_number_draw_tokens_that_can_be_drawn():
    """Over a vocabulary of several blocks, with tokens of probability 0 at its ends and between."""
    logits = np.full((2, 1000), -1e30, np.float32)
    logits[:, 3:900:7] = np.random.default_rng(0).normal(size=(2, 129))
    ids = draw(jnp.array([0.0, 1 - 2**-24]), jnp.asarray(logits), -1, Filters(1.0, 0, 1.0, 0.0))
    assert ids.tolist() == [3, 899]


def test_sums_are_those_of_a_scan():
    x = np.random.default_rng(1).random((3, 1000)).astype(np.float32)
    np.testing.assert_allclose(
        cumulate(jnp.asarray(x)), np.cumsum(x.astype(np.float64), axis=1), rtol=1e-5
    )


def test_the_penalty_pushes_seen_tokens_down_on_both_sides_of_0():
    got = penalize(
        jnp.array([[2.0, -2.0, 2.0, -2.0]]), jnp.array([[True, True, False, False]]), 4.0
    )
    assert got.tolist() == [[0.5, -8.0, 2.0, -2.0]]


@pytest.mark.parametrize(
    ("extreme", "drawn"),
    [({"top_p": 1e-60}, {1}), ({"top_k": 2**40}, {0, 1, 2, 3, 4, 5}), ({"temperature": 1e-6}, {1})],
)
def test_values_at_the_ends_of_their_ranges_mean_what_they_say(extreme, drawn):
    sampler, uniform = Sampler(**extreme), jnp.linspace(0, 1, 200, endpoint=False)
    sampler.check(prefix="--")
    logits = jnp.broadcast_to(LOGITS, (200, 6))
    ids = jax.jit(draw, static_argnums=2)(uniform, logits, sampler.candidates, sampler.filters)
    assert set(ids.tolist()) == drawn


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": 1},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-40},
        {"temperature": 1e-40},
        {"temperature": 1e30},
        {"temperature": float("nan")},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}=.* must be"):
        Sampler(**wrong).check(prefix="--")
