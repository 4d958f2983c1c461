"""The small parts of a block: parameters with named axes, linear maps, norms, short convolutions,
dropout.

Every parameter is an `nnx.Param` with a metadata entry `axes`: the logical names of its
dimensions, which tinylm.core.mesh maps onto the mesh. Weights are float32; each use casts them to
the type that the model computes in.

Axes: B batch, T query positions, S key positions, D embed, C the inputs that a convolution
remembers.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tinylm.core.collectives import on_shards
from tinylm.core.ring import ends_before, parts_of_rows
from tinylm.model.matmul import matmul
from tinylm.model.random_bits import bits_at
from tinylm.model.rowwise import center, rms_normalize
from tinylm.model.visibility import EVERYTHING, Visibility

# The logit of what must never be chosen: far below every real one, but finite, so that a row in
# which everything is masked gives equal probabilities and not NaN.
MASKED_LOGIT = -1e30

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
    "geglu": jax.nn.gelu,
}
GATED = ("swiglu", "geglu")


def activate(kind: str, x: jax.Array) -> jax.Array:
    """Apply an activation of ACTIVATIONS, computed in float32, in the type of `x`.

    Its input alone is kept for the backward pass. JAX's own derivative of GELU keeps five arrays of
    that size, and XLA on CPU, which has no arithmetic in bfloat16, widens and rounds at each of its
    operations.
    """
    return _activate(ACTIVATIONS[kind], x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activate(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    return function(x.astype(jnp.float32)).astype(x.dtype)


def _activate_forward(
    function: Callable[[jax.Array], jax.Array], x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _activate(function, x), x


def _activate_backward(
    function: Callable[[jax.Array], jax.Array], x: jax.Array, dy: jax.Array
) -> tuple[jax.Array]:
    _, to_dx = jax.vjp(function, x.astype(jnp.float32))
    return (to_dx(dy.astype(jnp.float32))[0].astype(x.dtype),)


_activate.defvjp(_activate_forward, _activate_backward)


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float
) -> nnx.Param:
    """Return a normally distributed float32 parameter with named axes."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def constant(value: float, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """Return a constant float32 parameter with named axes."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


class Linear(nnx.Module):
    """A linear map from the last axes of its input to new last axes, with or without bias."""

    def __init__(
        self,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        std: float,
        bias: bool,
        rngs: nnx.Rngs,
    ):
        """Build a kernel of shape inputs + outputs.

        Args:
          inputs, outputs: the axes that are mapped from and to, as {logical axis: size}.
          std: standard deviation of the initial weights. The bias starts at 0.
        """
        self.num_inputs = len(inputs)
        input_shape = tuple(inputs.values())
        output_shape = tuple(outputs.values())
        self.kernel = weight(rngs, input_shape + output_shape, (*inputs, *outputs), std)
        self.bias = constant(0.0, output_shape, tuple(outputs)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., *inputs] to [..., *outputs], in the type of `x`."""
        kernel = self.kernel[...].astype(x.dtype)
        input_shape = kernel.shape[: self.num_inputs]
        output_shape = kernel.shape[self.num_inputs :]
        leading_shape = x.shape[: x.ndim - self.num_inputs]

        # One product of two matrices: of more axes, XLA on CPU copies each operand into another
        # order, in the forward and in the backward pass.
        flat_x = x.reshape(*leading_shape, -1)
        flat_y = matmul(flat_x, kernel.reshape(math.prod(input_shape), -1))
        y = flat_y.reshape(*leading_shape, *output_shape)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis."""

    def __init__(self, size: int, *, kind: str, epsilon: float, bias: bool):
        """Build a norm over `size` features; RMSNorm has no bias."""
        self.centered = kind == "layernorm"
        self.epsilon = epsilon
        self.scale = constant(1.0, (size,), ("embed",))
        self.bias = constant(0.0, (size,), ("embed",)) if bias and self.centered else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize the last axis of `x` in float32, returning x's type."""
        y = x
        if self.centered:
            y = center(y.astype(jnp.float32))
        y = rms_normalize(y, self.scale[...], self.epsilon)
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


class HeadNorm(nnx.Module):
    """The RMS norm of queries or keys (Henry et al. 2020), with or without learned scales."""

    def __init__(self, heads: dict[str, int], *, scales: str, epsilon: float):
        """Build a norm.

        Args:
          heads: the last axes of its input, as {logical axis: size}: heads and their features.
          scales: model.qk_norm_scale.
          epsilon: is added to the mean square where there are scales.
        """
        self.over_all = scales == "all"
        self.epsilon = epsilon
        scaled = heads if self.over_all else {"head_dim": heads["head_dim"]}
        self.scale = (
            None if scales == "none" else constant(1.0, tuple(scaled.values()), tuple(scaled))
        )

    def __call__(self, x_BNTH: jax.Array) -> jax.Array:
        """Normalize each head, or all heads of a position together, in float32."""
        if self.scale is None:
            y_BNTH = rms_normalize(x_BNTH)
        elif not self.over_all:
            y_BNTH = rms_normalize(x_BNTH, self.scale[...], self.epsilon)
        else:
            # Heads may be split over the mesh, so this can't be a norm of a last axis.
            wide_BNTH = x_BNTH.astype(jnp.float32)
            mean_square = jnp.mean(jnp.square(wide_BNTH), axis=(1, 3), keepdims=True)
            factor = jax.lax.rsqrt(mean_square + self.epsilon)
            y_BNTH = wide_BNTH * factor * self.scale[...][:, None]
        return y_BNTH.astype(x_BNTH.dtype)


class ShortConv(nnx.Module):
    """A causal convolution of each feature, added to its input (Canon layers, Allen-Zhu 2025).

    `taps[i]` weighs the input i positions before. All start at 0, so that the layer starts as the
    identity. With 0 taps it has no parameters and stays the identity.
    """

    def __init__(self, size: int, taps: int):
        """Build `taps` weights for each of `size` features."""
        self.taps = constant(0.0, (taps, size), ("tap", "embed")) if taps else None

    def __call__(
        self,
        x_BTD: jax.Array,
        visibility: Visibility = EVERYTHING,
        earlier_BCD: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Convolve along the positions, over none of another segment.

        Args:
          x_BTD: the inputs.
          visibility: the segment and the place of each column.
          earlier_BCD: the C = taps - 1 inputs before `x_BTD`; None: there are none.

        Returns:
          y_BTD, and the last C inputs: `earlier_BCD` of the next call. None without taps, and where
          columns don't lie in their order.
        """
        if self.taps is None:
            return x_BTD, None
        taps = self.taps[...]
        num_earlier = len(taps) - 1
        batch, length, size = x_BTD.shape
        segments_BT = visibility.segments_BT
        if visibility.order_T is not None:
            return self._convolve_stretches(x_BTD, segments_BT, taps), None
        if earlier_BCD is None:
            earlier_BCD = jnp.zeros((batch, num_earlier, size))
        x_BSD = jnp.concatenate([earlier_BCD.astype(x_BTD.dtype), x_BTD], axis=1)
        segments_BS = None
        if segments_BT is not None:
            segments_BS = jnp.pad(segments_BT, ((0, 0), (num_earlier, 0)))
        y_BTD = _convolve(x_BSD, segments_BS, taps)

        last_BCD = x_BSD[:, length:]
        if segments_BS is not None:
            same_BC = jnp.equal(segments_BS[:, length:], segments_BS[:, -1:])
            last_BCD = jnp.where(same_BC[..., None], last_BCD, 0)
        return y_BTD, last_BCD

    def _convolve_stretches(
        self, x_BTD: jax.Array, segments_BT: jax.Array | None, taps: jax.Array
    ) -> jax.Array:
        """Convolve rows whose columns lie as `core.ring.balanced_order` has them.

        Each stretch is convolved by itself, after the inputs before it, which neighbours send.
        """
        num_earlier = len(taps) - 1
        num_stretches = 2 * parts_of_rows(x_BTD.shape[1])

        def in_stretches(x: jax.Array) -> jax.Array:
            return x.reshape(len(x), num_stretches, -1, *x.shape[2:])

        def with_ends_before(x: jax.Array) -> jax.Array:
            axes = ("batch", "positions", *(None for _ in x.shape[2:]))
            ends = on_shards(lambda x: ends_before(x, 1, num_earlier), (x, axes))
            return jnp.concatenate([in_stretches(ends), in_stretches(x)], axis=2)

        segments_BPS = None
        if segments_BT is not None:
            segments_BPS = with_ends_before(segments_BT)
        y_BPTD = _convolve(with_ends_before(x_BTD), segments_BPS, taps)
        return y_BPTD.reshape(x_BTD.shape)


def _convolve(x: jax.Array, segments: jax.Array | None, taps: jax.Array) -> jax.Array:
    """Return [..., T, D], the last T inputs with the weighted ones before them.

    Args:
      x: [..., C + T, D], the C = taps - 1 inputs before, and T inputs.
      segments: [..., C + T] of the inputs; None: all are of one.
      taps: [C + 1, D].
    """
    num_earlier = len(taps) - 1
    length = x.shape[-2] - num_earlier
    # In float32, in which CPUs are faster than in bfloat16 here, too.
    wide_x = x.astype(jnp.float32)
    y = wide_x[..., num_earlier:, :]
    for distance, tap_D in enumerate(taps):
        # The inputs that lie `distance` positions before.
        start = num_earlier - distance
        before = slice(start, start + length)
        inputs = wide_x[..., before, :]
        if segments is not None:
            own = segments[..., num_earlier:]
            is_same = segments[..., before] == own
            inputs = jnp.where(is_same[..., None], inputs, 0)
        y = y + tap_D * inputs
    return y.astype(x.dtype)


class Dropout:
    """The dropout of one forward pass: a mask depends on seed, step, layer, site and row alone.

    The row is that of the global batch. So the masks are the same on any mesh, and the same for a
    row whether it comes in a micro-batch or in the whole batch.
    """

    def __init__(self, rate: float, row_keys_B: jax.Array | None, order_T: jax.Array | None = None):
        """Hold the rate and one random key a row (None, or rate 0: dropout is off).

        `order_T` is the position of each column, where that is not the column's number.
        """
        self.rate = rate
        self.row_keys_B = row_keys_B
        self.order_T = order_T
        self.active = rate > 0 and row_keys_B is not None

    def at(self, place: jax.Array | int) -> "Dropout":
        """Return the dropout of a layer, or of a site within it."""
        if not self.active:
            return self
        fold_place_in = jax.vmap(lambda key: jax.random.fold_in(key, place))
        return Dropout(self.rate, fold_place_in(self.row_keys_B), self.order_T)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Zero elements of `x` with probability `rate`, in steps of 2^-16, and scale up the rest.

        The first axis of `x` is that of the rows; with `order_T`, the next one that of the columns.
        """
        if not self.active:
            return x
        assert self.row_keys_B is not None, "active dropout has keys"
        if self.order_T is None:
            draw_row = jax.vmap(lambda key: jax.random.bits(key, x.shape[1:], jnp.uint16))
            bits = draw_row(self.row_keys_B)
        else:
            _, length, size = x.shape
            position_T1 = self.order_T[:, None]
            feature_D = jnp.arange(size)
            places = ((position_T1, length), (feature_D, size))
            key_words_B2 = jax.random.key_data(self.row_keys_B)
            bits = bits_at(key_words_B2, places)
        return jnp.where(bits >= self.threshold, x * self.factor, 0).astype(x.dtype)

    @property
    def threshold(self) -> int:
        """Of 2^16 numbers, how many mean that an element is dropped."""
        return round(self.rate * 2**16)

    @property
    def factor(self) -> float:
        """What the elements that are kept are scaled by."""
        return 2**16 / (2**16 - self.threshold)


NO_DROPOUT = Dropout(0.0, None)
