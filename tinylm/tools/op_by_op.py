"""A function without its compiler: every operation by itself, in the types that it has or all in
float64.

`jax.jit` hands a whole function to XLA, which fuses, reorders and replaces operations. Here the
same function is traced into its equations, with loops and inner calls unrolled, and each equation
is run alone. On the CPU, NumPy runs most of them, so that the result doesn't depend on XLA at all,
and few have to be compiled. With `wide`, every float array is float64: the result is exact for all
that float32 can tell. For small arrays: each operation is a call, and each array is made.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

_CALLS = (
    "pjit",
    "jit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
)
_UNCHANGED = (
    "sharding_constraint",
    "optimization_barrier",
    "reduce_precision",
    "copy",
    "copy_p",
    "stop_gradient",
)
_TYPES = ("new_dtype", "dtype", "preferred_element_type", "accum_dtype")


@dataclasses.dataclass(frozen=True)
class Operations:
    """The equations of a function for arguments of certain shapes, and the form of its result."""

    jaxpr: Any
    result: Any

    def run(self, *arguments: Any, wide: bool = False) -> Any:
        """Return the function's result as NumPy arrays; with `wide`, floats are float64 throughout,
        on the CPU.
        """
        device = jax.local_devices(backend="cpu")[0] if wide else jax.local_devices()[0]
        with jax.default_device(device), jax.enable_x64(wide):
            runner = _Runner(wide, uses_numpy=device.platform == "cpu")
            types = [var.aval.dtype for var in self.jaxpr.jaxpr.invars]
            given = zip(jax.tree.leaves(arguments), types, strict=True)
            inputs = [runner.array(np.asarray(x, dtype)) for x, dtype in given]
            consts = [runner.array(x) for x in self.jaxpr.consts]
            results = runner.evaluate(self.jaxpr.jaxpr, consts, inputs)
        return jax.tree.unflatten(self.result, [np.asarray(x) for x in results])


def operations_of(function: Callable, *arguments: Any) -> Operations:
    """Trace `function` for arguments of these shapes and types, loops and inner calls unrolled."""
    with jax.disable_jit():
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return Operations(jaxpr, jax.tree.structure(shapes))


def _dot_general(x: np.ndarray, y: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """Return `jax.lax.dot_general` of two arrays: batch axes, then the free axes of `x`, then those
    of `y`.
    """
    (x_summed, y_summed), (x_batch, y_batch) = params["dimension_numbers"]
    x_free = [axis for axis in range(x.ndim) if axis not in (*x_summed, *x_batch)]
    y_free = [axis for axis in range(y.ndim) if axis not in (*y_summed, *y_batch)]
    batch = [x.shape[axis] for axis in x_batch]
    summed = int(np.prod([x.shape[axis] for axis in x_summed]))
    left = x.transpose(*x_batch, *x_free, *x_summed).reshape(*batch, -1, summed)
    right = y.transpose(*y_batch, *y_summed, *y_free).reshape(*batch, summed, -1)
    shape = [*batch, *(x.shape[axis] for axis in x_free), *(y.shape[axis] for axis in y_free)]
    return np.matmul(left, right).reshape(shape)


def _broadcast_in_dim(x: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


def _slice(x: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    strides = params["strides"] or (1,) * x.ndim
    return x[tuple(map(slice, params["start_indices"], params["limit_indices"], strides))]


# What NumPy does as the operation of this name does, given its operands and the parameters of its
# equation: of arrays of floats first, then of any type.
_OF_FLOATS: dict[str, Callable] = {
    "add": lambda x, y, _: x + y,
    "add_any": lambda x, y, _: x + y,
    "sub": lambda x, y, _: x - y,
    "mul": lambda x, y, _: x * y,
    "div": lambda x, y, _: x / y,
    "max": lambda x, y, _: np.maximum(x, y),
    "min": lambda x, y, _: np.minimum(x, y),
    "neg": lambda x, _: -x,
    "abs": lambda x, _: np.abs(x),
    "sign": lambda x, _: np.sign(x),
    "square": lambda x, _: x * x,
    "sqrt": lambda x, _: np.sqrt(x),
    "rsqrt": lambda x, _: 1 / np.sqrt(x),
    "exp": lambda x, _: np.exp(x),
    "log": lambda x, _: np.log(x),
    "tanh": lambda x, _: np.tanh(x),
    "cos": lambda x, _: np.cos(x),
    "sin": lambda x, _: np.sin(x),
    "integer_pow": lambda x, params: x ** params["y"],
    "reduce_sum": lambda x, params: np.sum(x, axis=tuple(params["axes"])),
    "reduce_max": lambda x, params: np.max(x, axis=tuple(params["axes"])),
    "dot_general": _dot_general,
}
_OF_ANY: dict[str, Callable] = {
    "select_n": lambda which, no, yes, _: np.where(which, yes, no),
    "convert_element_type": lambda x, _: x,  # the type of the result follows for every operation
    "concatenate": lambda *given: np.concatenate(given[:-1], axis=given[-1]["dimension"]),
    "eq": lambda x, y, _: x == y,
    "lt": lambda x, y, _: x < y,
    "le": lambda x, y, _: x <= y,
    "gt": lambda x, y, _: x > y,
    "ge": lambda x, y, _: x >= y,
    "reshape": lambda x, params: x.reshape(params["new_sizes"]),
    "squeeze": lambda x, params: np.squeeze(x, params["dimensions"]),
    "transpose": lambda x, params: x.transpose(params["permutation"]),
    "broadcast_in_dim": lambda x, params: _broadcast_in_dim(x, params),
    "slice": _slice,
}


class _Runner:
    """Runs equations one by one, in the types that they have or all in float64."""

    def __init__(self, wide: bool, uses_numpy: bool):
        """Choose the types, and whether NumPy may take the place of the platform's own
        operations.
        """
        self.wide = wide
        self.uses_numpy = uses_numpy

    def array(self, x: Any) -> Any:
        """Return a value as an array on the host, a float one as float64 where all are; random keys
        stay.
        """
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        host = np.asarray(x)
        return host.astype(self._type(host.dtype), copy=False)

    def evaluate(self, jaxpr: Any, consts: list, inputs: list) -> list:
        """Return what the equations of `jaxpr` make of `inputs`; an array is let go after its last
        use.
        """
        values: dict[Any, Any] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True)
        )
        last_use: dict[Any, int] = {}
        for number, equation in enumerate(jaxpr.eqns):
            last_use.update(
                {var: number for var in equation.invars if not isinstance(var, core.Literal)}
            )
        last_use.update(
            {var: len(jaxpr.eqns) for var in jaxpr.outvars if not isinstance(var, core.Literal)}
        )

        def read(var: Any) -> Any:
            if not isinstance(var, core.Literal):
                return values[var]
            aval: Any = var.aval
            return self.array(np.asarray(var.val, aval.dtype))

        for number, equation in enumerate(jaxpr.eqns):
            results = self._run(equation, [read(var) for var in equation.invars])
            values.update(zip(equation.outvars, results, strict=True))
            for var in equation.invars:
                if not isinstance(var, core.Literal) and last_use[var] == number:
                    values.pop(var, None)
        return [read(var) for var in jaxpr.outvars]

    def _run(self, equation: Any, operands: list) -> list:
        """Return the results of one equation."""
        name, params = equation.primitive.name, dict(equation.params)
        if name in _CALLS:
            inner = next(
                value
                for value in params.values()
                if isinstance(value, core.ClosedJaxpr | core.Jaxpr)
            )
            consts = [self.array(x) for x in getattr(inner, "consts", ())]
            return self.evaluate(getattr(inner, "jaxpr", inner), consts, operands)
        if name in _UNCHANGED:
            return operands
        if self.uses_numpy and name in _OF_FLOATS and all(map(_is_float, operands)):
            return [
                self._in_numpy(_OF_FLOATS[name], operands, params, equation.outvars[0].aval.dtype)
            ]
        if self.uses_numpy and name in _OF_ANY and all(isinstance(x, np.ndarray) for x in operands):
            return [self._in_numpy(_OF_ANY[name], operands, params, equation.outvars[0].aval.dtype)]
        if (
            self.wide and name == "scatter-add"
        ):  # its parameters hold an addition of the narrow type
            params.pop("update_jaxpr")
            params.pop("update_consts")
            array, indices, updates = map(jnp.asarray, operands)
            return [self.array(jax.lax.scatter_add(array, indices, updates, **params))]
        params |= {key: self._type(params[key]) for key in _TYPES if key in params}
        results = equation.primitive.bind(*map(jnp.asarray, operands), **params)
        return [
            self.array(x) for x in (results if equation.primitive.multiple_results else [results])
        ]

    def _in_numpy(
        self, function: Callable, operands: list, params: dict[str, Any], dtype: Any
    ) -> np.ndarray:
        """Return an operation's result in its type; one of narrow floats is made in float32, then
        rounded.
        """
        operands = [
            x.astype(np.float32) if _is_float(x) and x.dtype.itemsize < 4 else x for x in operands
        ]
        with np.errstate(all="ignore"):
            return np.asarray(function(*operands, params)).astype(self._type(dtype), copy=False)

    def _type(self, dtype: Any) -> Any:
        """Return float64 for a type of floats where all are wide, any other type as it is."""
        is_float = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
        return np.dtype(np.float64) if self.wide and is_float else dtype


def _is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and jnp.issubdtype(x.dtype, jnp.floating)
