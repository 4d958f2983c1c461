"""Softmax and RMS norm over the last axis, in forms that XLA on CPU computes fast.

XLA on CPU reduces an axis one element after another (jaxlib 0.10 to 0.12), but adds arrays with
vector instructions. So on CPU a last axis is folded: its halves are added until 16 elements are
left, as in a sum of 64 elements

    x[0:32] + x[32:64]   ->   [0:16] + [16:32]   ->   a sum of 16

which takes a quarter of the time (12 us instead of 48 for 768 rows of 128). A sum over all rows is
a product with ones, for the same gain. The derivatives are written out because JAX's own would
reduce the plain way. At nanoGPT's CPU setting all this is 7% of a train step.

The last axis must not be split over the mesh: its halves would lie on different devices.

Axes: D the last axis.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tinylm.core.mesh import target_platform

# What a folded axis ends at: one vector of 512 bits in float32.
_FOLDED_SIZE = 16


def _folded(x: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Combine the halves of the last axis until it is short or odd; on CPU alone."""
    if target_platform() != "cpu":
        return x
    while x.shape[-1] > _FOLDED_SIZE and x.shape[-1] % 2 == 0:
        half = x.shape[-1] // 2
        x = combine(x[..., :half], x[..., half:])
    return x


def _sum_last(x: jax.Array) -> jax.Array:
    """Return the sums over the last axis, [..., D] to [..., 1]."""
    x = _folded(x, jnp.add)
    return jnp.sum(x, axis=-1, keepdims=True)


def _max_last(x: jax.Array) -> jax.Array:
    """Return the maxima over the last axis, [..., D] to [..., 1]."""
    x = _folded(x, jnp.maximum)
    return jnp.max(x, axis=-1, keepdims=True)


def _sum_rows(x: jax.Array) -> jax.Array:
    """Return the sum of all rows, [..., D] to [D]."""
    row_axes = x.ndim - 1
    if target_platform() != "cpu":
        return jnp.sum(x, axis=tuple(range(row_axes)))
    # The rows are not made flat, which would move those that are split over the mesh.
    return jnp.tensordot(jnp.ones(x.shape[:-1], x.dtype), x, axes=row_axes)


@jax.custom_vjp
def softmax(x: jax.Array) -> jax.Array:
    """Return the softmax of float32 numbers over the last axis."""
    exponentials = jnp.exp(x - _max_last(x))
    return exponentials / _sum_last(exponentials)


def _softmax_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = softmax(x)
    return y, y


def _softmax_backward(y: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    along_row = _sum_last(y * dy)
    dx = y * (dy - along_row)
    return (dx,)


softmax.defvjp(_softmax_forward, _softmax_backward)


@jax.custom_vjp
def center(x: jax.Array) -> jax.Array:
    """Subtract the mean over the last axis."""
    return x - _sum_last(x) / x.shape[-1]


def _center_forward(x: jax.Array) -> tuple[jax.Array, None]:
    return center(x), None


def _center_backward(_: None, dy: jax.Array) -> tuple[jax.Array]:
    # The map is linear and symmetric, so it is its own transpose.
    dx = center(dy)
    return (dx,)


center.defvjp(_center_forward, _center_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_normalize(
    x: jax.Array,
    scale_D: jax.Array | None = None,
    epsilon: float = 1e-6,
) -> jax.Array:
    """Scale `x` to unit mean square over its last axis (Zhang and Sennrich 2019).

    Without a learned scale this is query-key norm (Henry et al. 2020).

    Args:
      x: [..., D] in any type.
      scale_D: learned factors, in float32; None: none.
      epsilon: is added to the mean square.

    Returns:
      [..., D] in float32, in which it is computed.
    """
    return _rms_forward(x, scale_D, epsilon)[0]


# What is kept for the backward pass: the input as it came, the scale, and a factor for each row.
_Kept = tuple[jax.Array, jax.Array | None, jax.Array]


def _rms_forward(
    x: jax.Array, scale_D: jax.Array | None, epsilon: float
) -> tuple[jax.Array, _Kept]:
    wide_x = x.astype(jnp.float32)
    mean_square = _sum_last(jnp.square(wide_x)) / x.shape[-1]
    factor = jax.lax.rsqrt(mean_square + epsilon)
    y = wide_x * factor
    if scale_D is not None:
        y = y * scale_D
    return y, (x, scale_D, factor)


def _rms_backward(epsilon: float, kept: _Kept, dy: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    x, scale_D, factor = kept
    normal = x.astype(jnp.float32) * factor
    dscale_D = None
    if scale_D is not None:
        dscale_D = _sum_rows(dy * normal)
        dy = dy * scale_D
    # What the gradient has along the row would change its length alone, which the norm takes away.
    along_row = _sum_last(dy * normal) / x.shape[-1]
    dx = (dy - normal * along_row) * factor
    return dx.astype(x.dtype), dscale_D


rms_normalize.defvjp(_rms_forward, _rms_backward)
