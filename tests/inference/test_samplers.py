"""Every sampler's distribution is its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.inference.samplers import Sampler, draw, keep_likely

PROBABILITIES = np.array([0.02, 0.4, 0.08, 0.3, 0.05, 0.15])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None]


def expected(temperature, top_k, top_p):
    """The definition, written with sorted lists: temperature, then top-k, then the smallest set with top_p."""
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
    p = np.array([p[i] if i in kept else 0 for i in range(len(p))])
    return p / p.sum()


CASES = [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.5), (1.0, 0, 0.75), (1.3, 4, 0.9), (1.0, 1, 1.0)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), CASES)
def test_draws_follow_the_definition(temperature, top_k, top_p):
    sampler, n = Sampler(temperature, top_k, top_p), 20_000
    keys = jax.random.split(jax.random.key(1), n)
    logits = jnp.broadcast_to(LOGITS, (n, 6))
    ids = jax.jit(draw, static_argnums=2)(keys, logits, sampler.kind, sampler.values)
    counts = np.bincount(np.asarray(ids), minlength=6)
    wanted = expected(temperature, top_k, top_p)
    assert (counts[wanted == 0] == 0).all()
    error = np.sqrt(wanted * (1 - wanted) * n) + 1
    assert (np.abs(counts - wanted * n) < 4.5 * error).all()


def test_temperature_zero_is_greedy():
    sampler = Sampler(0.0)
    assert int(draw(jax.random.split(jax.random.key(0), 1), LOGITS, sampler.kind, sampler.values)[0]) == 1


def test_equal_logits_keep_exactly_top_k():
    kept = keep_likely(jnp.zeros((1, 10)), 3, 1.0)
    assert int((kept > -1e29).sum()) == 3
