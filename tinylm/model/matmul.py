"""Products of matrices in the forms that XLA computes fast.

On CPU, XLA multiplies bfloat16 operands as bfloat16, at twice the speed of float32, only in some
forms; in all others it widens them to float32 first (jax 0.10, read from its passes, and measured:
a 4-layer, 128-wide step took 28 ms instead of 44). `matmul` keeps to those forms, in the forward
and in the backward pass.

Axes: M rows (all leading axes flat), E input features, F output features.
"""

from typing import Any

import jax
import jax.numpy as jnp

from tinylm.core.mesh import target_platform
from tinylm.core.ring import parts_of_rows


def matmul(x: jax.Array, matrix_EF: jax.Array) -> jax.Array:
    """Return the product of the last axis of `x` [..., E] with a matrix, as [..., F] in x's
    type.
    """
    if x.ndim > 2 and parts_of_rows(x.shape[-2]) > 1:
        # Rows and positions that different axes of the mesh split can't become one axis: the
        # partitioner would gather the positions.
        return jnp.matmul(x, matrix_EF)
    if x.dtype == jnp.bfloat16 and target_platform() == "cpu":
        return _bfloat16_matmul_on_cpu(x, matrix_EF)
    return _flat_matmul(x, matrix_EF)


def _flat_matmul(x: jax.Array, matrix_EF: jax.Array, result_type: Any = None) -> jax.Array:
    """Multiply two matrices: leading axes are flattened, or XLA on CPU would copy them around."""
    x_ME = x.reshape(-1, x.shape[-1])
    y_MF = jnp.matmul(x_ME, matrix_EF, preferred_element_type=result_type)
    return y_MF.reshape(*x.shape[:-1], -1)


# The fast forms have a float32 result, contract the last axis of the left operand, and see no
# transpose except through a reshape. JAX's own derivative would contract other axes.
@jax.custom_vjp
def _bfloat16_matmul_on_cpu(x: jax.Array, matrix_EF: jax.Array) -> jax.Array:
    return _flat_matmul(x, matrix_EF, jnp.float32).astype(x.dtype)


def _forward(x: jax.Array, matrix_EF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _bfloat16_matmul_on_cpu(x, matrix_EF), (x, matrix_EF)


def _backward(operands: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, matrix_EF = operands
    dy_MF = dy.reshape(-1, dy.shape[-1])
    dx_ME = jnp.einsum("MF,EF->ME", dy_MF, matrix_EF, preferred_element_type=jnp.float32)
    # The barrier keeps XLA from merging the transpose into the product, which would widen it.
    x_EM = jnp.moveaxis(x, -1, 0).reshape(x.shape[-1], -1)
    x_EM = jax.lax.optimization_barrier(x_EM)
    dmatrix_EF = _flat_matmul(x_EM, dy_MF, jnp.float32)
    dx = dx_ME.reshape(x.shape).astype(x.dtype)
    return dx, dmatrix_EF.astype(matrix_EF.dtype)


_bfloat16_matmul_on_cpu.defvjp(_forward, _backward)
