"""Functions of rows equal the plain ones of JAX, derivatives included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.model import rowwise

# Folded down to 16, down to an odd size, and not at all.
SIZES = (128, 48 + 4, 7)


@pytest.fixture(params=["cpu", "gpu"], autouse=True)
def platform(request, monkeypatch):
    """Take the form of a platform, whatever this one is."""
    monkeypatch.setattr(rowwise, "target_platform", lambda: request.param)


def plain_rms_normalize(x, scale_D=None, epsilon=1e-6):
    x = x.astype(jnp.float32)
    y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return y if scale_D is None else y * scale_D


def value_and_gradients(function, *arrays):
    """Return the values of a function and the gradients of a sum that weighs each differently."""

    def weighted_sum(*arrays):
        y = function(*arrays)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    gradients = jax.grad(weighted_sum, argnums=tuple(range(len(arrays))))(*arrays)
    return function(*arrays), *gradients


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("fast", "plain"),
    [
        (rowwise.softmax, jax.nn.softmax),
        (rowwise.center, lambda x: x - jnp.mean(x, axis=-1, keepdims=True)),
        (rowwise.rms_normalize, plain_rms_normalize),
    ],
)
def test_functions_of_rows_equal_the_plain_ones(size, fast, plain):
    x = jax.random.normal(jax.random.key(size), (3, 5, size))
    for ours, theirs in zip(
        value_and_gradients(fast, x), value_and_gradients(plain, x), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradients_of_a_scaled_norm_equal_the_plain_ones(dtype):
    x = jax.random.normal(jax.random.key(0), (3, 5, 64)).astype(dtype)
    scale_D = jnp.linspace(0.5, 2.0, 64)
    ours = value_and_gradients(rowwise.rms_normalize, x, scale_D)
    theirs = value_and_gradients(plain_rms_normalize, x, scale_D)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        tolerance = 1e-5 if mine.dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(
            mine.astype(jnp.float32), other.astype(jnp.float32), rtol=tolerance, atol=tolerance
        )


def test_a_row_that_is_masked_everywhere_has_equal_probabilities():
    np.testing.assert_allclose(rowwise.softmax(jnp.full((2, 64), -1e30)), 1 / 64)
