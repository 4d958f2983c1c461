"""The small parts of a block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylm.model import layers


@pytest.mark.parametrize("kind", layers.ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_activation_is_computed_in_float32_and_keeps_its_input_alone(kind, dtype):
    x = jnp.linspace(-4, 4, 256).astype(dtype)
    y, to_dx = jax.vjp(lambda x: layers.activate(kind, x), x)
    dy = jnp.linspace(1, 2, 256).astype(dtype)
    plain_y, plain_to_dx = jax.vjp(layers.ACTIVATIONS[kind], x.astype(jnp.float32))
    (plain_dx,) = plain_to_dx(dy.astype(jnp.float32))
    (dx,) = to_dx(dy)

    assert y.dtype == dx.dtype == x.dtype
    np.testing.assert_array_equal(y, plain_y.astype(dtype))
    np.testing.assert_array_equal(dx, plain_dx.astype(dtype))
    kept = [array for array in jax.tree.leaves(to_dx) if array.size == x.size]
    assert len(kept) == 1
    np.testing.assert_array_equal(kept[0], x)
