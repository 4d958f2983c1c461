"""The small parts of a block: parameters with named axes, linear maps, norms, rotary positions, dropout.

Axes: B batch, T query positions, S key positions, D embed, N query heads, K kv heads, G query heads per kv head,
H head size, F mlp, V vocab, L layers.

Every parameter is an `nnx.Param` with a metadata entry `axes`: the logical names of its dimensions, which
tinylm.core.mesh maps onto the mesh. Weights are float32; each use casts them to the compute type.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tinylm.core.mesh import target_platform

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
}
GATED = ("swiglu", "geglu")


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> nnx.Param:
    """Return a normally distributed float32 parameter with named axes."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """Return a constant float32 parameter with named axes."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def _product(x: jax.Array, matrix_EF: jax.Array, **types) -> jax.Array:
    return jnp.matmul(x.reshape(-1, x.shape[-1]), matrix_EF, **types).reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _narrow_product(x: jax.Array, matrix_EF: jax.Array) -> jax.Array:
    """Return `_product` of bfloat16 arrays, in the forms that XLA multiplies as bfloat16 on CPU, at twice the speed.

    They have float32 results, contract the last axis of the left side, and see no transpose but through a reshape; in
    all others XLA widens the operands (jax 0.10, read from its passes).
    """
    return _product(x, matrix_EF, preferred_element_type=jnp.float32).astype(x.dtype)


def _narrow_product_bwd(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x, matrix_EF), dy_MF = kept, dy.reshape(-1, dy.shape[-1])
    x_EM = jax.lax.optimization_barrier(jnp.moveaxis(x, -1, 0).reshape(x.shape[-1], -1))
    dx_ME = jnp.einsum("MF,EF->ME", dy_MF, matrix_EF, preferred_element_type=jnp.float32)
    dmatrix_EF = _product(x_EM, dy_MF, preferred_element_type=jnp.float32)
    return dx_ME.reshape(x.shape).astype(x.dtype), dmatrix_EF.astype(matrix_EF.dtype)


_narrow_product.defvjp(lambda x, matrix_EF: (_narrow_product(x, matrix_EF), (x, matrix_EF)), _narrow_product_bwd)


class Linear(nnx.Module):
    """A linear map from the last axes of its input (`inputs`) to new last axes (`outputs`), with or without bias."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        std: float,
        bias: bool,
        rngs: nnx.Rngs,
    ):
        """Build a kernel of shape inputs + outputs, given as {logical axis: size}."""
        self.num_inputs = len(inputs)
        self.kernel = weight(rngs, (*inputs.values(), *outputs.values()), (*inputs, *outputs), std)
        self.bias = constant(0.0, tuple(outputs.values()), tuple(outputs)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Apply the map in the type of `x`; leading axes stay.

        The product is one of two matrices: of more axes, XLA on CPU copies each into another order, in both passes.
        """
        kernel, lead = self.kernel[...].astype(x.dtype), x.shape[: x.ndim - self.num_inputs]
        inputs, outputs = kernel.shape[: self.num_inputs], kernel.shape[self.num_inputs :]
        flat, matrix = x.reshape(*lead, -1), kernel.reshape(math.prod(inputs), -1)
        narrow = x.dtype == jnp.bfloat16 and target_platform() == "cpu"
        y = (_narrow_product(flat, matrix) if narrow else _product(flat, matrix)).reshape(*lead, *outputs)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis, in float32."""

    def __init__(self, size: int, *, kind: str, epsilon: float, bias: bool):
        """Build a norm over `size` features; RMSNorm has no bias."""
        self.centered, self.epsilon = kind == "layernorm", epsilon
        self.scale = constant(1.0, (size,), ("embed",))
        self.bias = constant(0.0, (size,), ("embed",)) if bias and self.centered else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize the last axis of `x`, returning its type."""
        y = x.astype(jnp.float32)
        if self.centered:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon) * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


class ShortConv(nnx.Module):
    """A causal convolution of each feature beside the identity (Canon layers, Allen-Zhu 2025); 0 taps: the identity.

    `taps[i]` weighs the input i positions before; all are 0 at first.
    """

    def __init__(self, size: int, taps: int):
        """Build `taps` weights for each of `size` features."""
        self.taps = constant(0.0, (taps, size), ("tap", "embed")) if taps else None

    def __call__(self, x_BTD, segments_BT=None, earlier_BCD=None) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Return (y_BTD, what the next position needs as `earlier_BCD`: the last C = taps - 1 inputs).

        Inputs of other segments are not seen; those before `x_BTD` are `earlier_BCD` (None: there are none).
        """
        if self.taps is None:
            return x_BTD, ()
        taps, (batch, length, size) = self.taps[...], x_BTD.shape
        before = len(taps) - 1
        earlier_BCD = jnp.zeros((batch, before, size)) if earlier_BCD is None else earlier_BCD
        dtype, x_BTD = x_BTD.dtype, x_BTD.astype(jnp.float32)  # in which CPUs are faster, too
        x_BSD, y_BTD = jnp.concatenate([earlier_BCD.astype(jnp.float32), x_BTD], axis=1), x_BTD
        ids_BS = None if segments_BT is None else jnp.pad(segments_BT, ((0, 0), (before, 0)))
        for i, tap_D in enumerate(taps):
            part = slice(before - i, before - i + length)
            near_BTD = x_BSD[:, part]
            if ids_BS is not None:
                near_BTD = jnp.where((ids_BS[:, part] == segments_BT)[..., None], near_BTD, 0)
            y_BTD = y_BTD + tap_D * near_BTD
        last_BCD = x_BSD[:, length:]
        if ids_BS is not None:
            last_BCD = jnp.where((ids_BS[:, length:] == ids_BS[:, -1:])[..., None], last_BCD, 0)
        return y_BTD.astype(dtype), (last_BCD.astype(dtype),)


def rms_normalize(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Return `x` scaled to unit mean square over its last axis (query-key norm, Henry et al. 2020)."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)).astype(x.dtype)


def rotary_tables(positions_BT: jax.Array, rotary_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Return cosines and sines [B, 1, T, rotary_dim / 2] of rotary position embedding (Su et al. 2021, eq. 15)."""
    frequency = base ** -(jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angle_B1TR = positions_BT.astype(jnp.float32)[:, None, :, None] * frequency
    return jnp.cos(angle_B1TR), jnp.sin(angle_B1TR)


def rotate(x_BNTH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the first features of each head by its position; features i and i + rotary_dim/2 form a pair."""
    cos, sin = tables
    half = cos.shape[-1]
    a, b, rest = x_BNTH[..., :half], x_BNTH[..., half : 2 * half], x_BNTH[..., 2 * half :]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BNTH.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


class Dropout:
    """The dropout of one forward pass: each mask depends on seed, step, layer, site and global row alone.

    So the masks are the same on any mesh, and for a row whether it comes in a micro-batch or in the whole batch.
    """

    def __init__(self, rate: float, row_keys_B: jax.Array | None):
        """Hold the rate and one random key a row (None, or rate 0: dropout is off)."""
        self.rate, self.row_keys_B = rate, row_keys_B
        self.active = rate > 0 and row_keys_B is not None

    def at(self, place: jax.Array | int) -> "Dropout":
        """Return the dropout of a layer or a site within it."""
        if not self.active:
            return self
        return Dropout(self.rate, jax.vmap(lambda key: jax.random.fold_in(key, place))(self.row_keys_B))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Zero elements of `x` (first axis: rows) with probability `rate` in steps of 2^-16, and scale up the rest."""
        if not self.active:
            return x
        bits = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint16))(self.row_keys_B)
        threshold = round(self.rate * 2**16)
        return jnp.where(bits >= threshold, x * (2**16 / (2**16 - threshold)), 0).astype(x.dtype)
