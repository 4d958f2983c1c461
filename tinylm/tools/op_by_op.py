"""A function without its compiler: each operation by itself, in its own types or all in float64.

`jax.jit` hands a whole function to XLA, which fuses, reorders and replaces operations. Here the
same function is traced into its equations, with loops and inner calls unrolled, and each equation
is run alone. NumPy runs most of them, so that the result doesn't depend on XLA at all, and few have
to be compiled. An accelerator runs products itself, which it multiplies in shorter floats (TF32 on
NVIDIA GPUs, bfloat16 on TPUs). With `wide`, every float array is float64: the result is exact for
all that float32 can tell. For small arrays: each operation is a call, and each array is made.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

# Primitives that call an inner jaxpr, which is one of their parameters.
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
# Primitives that return their operands.
_UNCHANGED = (
    "sharding_constraint",
    "optimization_barrier",
    "reduce_precision",
    "copy",
    "copy_p",
    "stop_gradient",
)
# Parameters that are a type of arrays.
_TYPES = ("new_dtype", "dtype", "preferred_element_type", "accum_dtype")


@dataclasses.dataclass(frozen=True)
class Operations:
    """The equations of a function for arguments of certain shapes, and the form of its result."""

    jaxpr: Any
    result: Any

    def run(self, *arguments: Any, wide: bool = False) -> Any:
        """Return the function's result as NumPy arrays.

        Args:
          *arguments: of the shapes and types that it was traced for.
          wide: run on the CPU, with all floats float64.
        """
        device = jax.local_devices()[0]
        if wide:
            device = jax.local_devices(backend="cpu")[0]
        variables = self.jaxpr.jaxpr.invars
        leaves = jax.tree.leaves(arguments)
        with jax.default_device(device), jax.enable_x64(wide):
            runner = _Runner(wide, multiplies_in_numpy=device.platform == "cpu")
            inputs = []
            for variable, leaf in zip(variables, leaves, strict=True):
                inputs.append(runner.array(np.asarray(leaf, variable.aval.dtype)))
            consts = [runner.array(const) for const in self.jaxpr.consts]
            results = runner.evaluate(self.jaxpr.jaxpr, consts, inputs)
        arrays = [np.asarray(result) for result in results]
        return jax.tree.unflatten(self.result, arrays)


def operations_of(function: Callable, *arguments: Any) -> Operations:
    """Trace `function` for arguments of these shapes and types, loops and inner calls unrolled."""
    with jax.disable_jit():
        jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    return Operations(jaxpr, jax.tree.structure(shapes))


def _dot_general(x: np.ndarray, y: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    """Return `jax.lax.dot_general` of two arrays.

    The axes of its result are the batch axes, then the free axes of `x`, then those of `y`. With
    all axes of a kind taken as one, it is a product of matrices: [batch, x free, summed] by
    [batch, summed, y free].
    """
    (x_summed, y_summed), (x_batch, y_batch) = params["dimension_numbers"]
    x_free = _other_axes(x, x_batch, x_summed)
    y_free = _other_axes(y, y_batch, y_summed)
    batch_shape = _sizes(x, x_batch)
    summed_shape = _sizes(x, x_summed)
    num_summed = math.prod(summed_shape)

    left = x.transpose((*x_batch, *x_free, *x_summed))
    left = left.reshape((*batch_shape, -1, num_summed))
    right = y.transpose((*y_batch, *y_summed, *y_free))
    right = right.reshape((*batch_shape, num_summed, -1))
    product = np.matmul(left, right)
    return product.reshape(batch_shape + _sizes(x, x_free) + _sizes(y, y_free))


def _other_axes(x: np.ndarray, *taken: Sequence[int]) -> tuple[int, ...]:
    """Return the axes of an array that are in none of `taken`."""
    known = set().union(*taken)
    return tuple(axis for axis in range(x.ndim) if axis not in known)


def _sizes(x: np.ndarray, axes: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes of some axes of an array."""
    return tuple(x.shape[axis] for axis in axes)


def _broadcast_in_dim(x: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


def _slice(x: np.ndarray, params: dict[str, Any]) -> np.ndarray:
    strides = params["strides"] or (1,) * x.ndim
    slices = map(slice, params["start_indices"], params["limit_indices"], strides)
    return x[tuple(slices)]


# What NumPy does in place of the primitive of a name, given its operands and the parameters of its
# equation. These are taken for arrays of floats alone, for NumPy does otherwise with integers.
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
# These are taken for arrays of any type.
_OF_ANY: dict[str, Callable] = {
    "select_n": lambda which, no, yes, _: np.where(which, yes, no),
    # Each result is brought to the type of its variable.
    "convert_element_type": lambda x, _: x,
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

    def __init__(self, wide: bool, multiplies_in_numpy: bool):
        """Choose what to run with.

        Args:
          wide: make all floats float64.
          multiplies_in_numpy: let NumPy take the place of the platform in products, too.
        """
        self.wide = wide
        self.multiplies_in_numpy = multiplies_in_numpy

    def array(self, x: Any) -> Any:
        """Return a value as an array on the host, of float64 where it is a float and all are wide.

        Random keys stay as they are: they have no form on the host.
        """
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        host = np.asarray(x)
        return host.astype(self._type(host.dtype), copy=False)

    def evaluate(self, jaxpr: Any, consts: list, inputs: list) -> list:
        """Return what the equations of `jaxpr` make of `inputs`."""
        # An array is let go after its last use, for all of a step together may not fit.
        last_use: dict[Any, int] = {}
        for number, equation in enumerate(jaxpr.eqns):
            for variable in equation.invars:
                if not isinstance(variable, core.Literal):
                    last_use[variable] = number
        for variable in jaxpr.outvars:
            if not isinstance(variable, core.Literal):
                last_use[variable] = len(jaxpr.eqns)

        values: dict[Any, Any] = {}
        values.update(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, inputs, strict=True))
        for number, equation in enumerate(jaxpr.eqns):
            operands = [self._read(variable, values) for variable in equation.invars]
            results = self._run(equation, operands)
            values.update(zip(equation.outvars, results, strict=True))
            for variable in equation.invars:
                if not isinstance(variable, core.Literal) and last_use[variable] == number:
                    values.pop(variable, None)
        return [self._read(variable, values) for variable in jaxpr.outvars]

    def _read(self, variable: Any, values: dict[Any, Any]) -> Any:
        """Return the value of a variable, or of a literal in its place."""
        if isinstance(variable, core.Literal):
            aval: Any = variable.aval
            return self.array(np.asarray(variable.val, aval.dtype))
        return values[variable]

    def _run(self, equation: Any, operands: list) -> list:
        """Return the results of one equation."""
        name = equation.primitive.name
        params = dict(equation.params)
        if name in _CALLS:
            jaxpr_types = core.ClosedJaxpr | core.Jaxpr
            inner = next(value for value in params.values() if isinstance(value, jaxpr_types))
            # A closed jaxpr holds its constants, an open one has none.
            consts = [self.array(const) for const in getattr(inner, "consts", ())]
            return self.evaluate(getattr(inner, "jaxpr", inner), consts, operands)
        if name in _UNCHANGED:
            return operands
        if name == "cond":
            # Only the branch that the first operand numbers runs.
            branch = params["branches"][int(operands[0])]
            consts = [self.array(const) for const in branch.consts]
            return self.evaluate(branch.jaxpr, consts, operands[1:])

        if name == "while":
            return self._run_loop(params, operands)

        function = None
        if name in _OF_FLOATS and all(_is_float(x) for x in operands):
            function = _OF_FLOATS[name]
        elif name in _OF_ANY and all(isinstance(x, np.ndarray) for x in operands):
            function = _OF_ANY[name]
        is_platforms = name == "dot_general" and not self.multiplies_in_numpy
        if function is not None and not is_platforms:
            dtype = equation.outvars[0].aval.dtype
            return [self._in_numpy(function, operands, params, dtype)]

        arrays = [jnp.asarray(operand) for operand in operands]
        if self.wide and name == "scatter-add":
            # Its parameters hold a traced addition of the narrow type.
            params.pop("update_jaxpr")
            params.pop("update_consts")
            array, indices, updates = arrays
            return [self.array(jax.lax.scatter_add(array, indices, updates, **params))]
        for key in _TYPES:
            if key in params:
                params[key] = self._type(params[key])
        results = equation.primitive.bind(*arrays, **params)
        if not equation.primitive.multiple_results:
            results = [results]
        return [self.array(result) for result in results]

    def _run_loop(self, params: dict[str, Any], operands: list) -> list:
        """Return what a while loop ends with, given its constants and what it begins with."""
        condition = params["cond_jaxpr"]
        body = params["body_jaxpr"]
        num_condition_consts = params["cond_nconsts"]
        num_consts = num_condition_consts + params["body_nconsts"]
        condition_consts = operands[:num_condition_consts]
        body_consts = operands[num_condition_consts:num_consts]
        carried = operands[num_consts:]
        while True:
            consts = [self.array(const) for const in condition.consts]
            [goes_on] = self.evaluate(condition.jaxpr, consts, [*condition_consts, *carried])
            if not goes_on:
                return carried
            consts = [self.array(const) for const in body.consts]
            carried = self.evaluate(body.jaxpr, consts, [*body_consts, *carried])

    def _in_numpy(
        self, function: Callable, operands: list, params: dict[str, Any], dtype: Any
    ) -> np.ndarray:
        """Return the result of an operation, which NumPy runs, in the type `dtype`.

        Narrow floats are widened to float32 first, and the result is rounded.
        """
        widened = []
        for x in operands:
            is_narrow = _is_float(x) and x.dtype.itemsize < 4
            widened.append(x.astype(np.float32) if is_narrow else x)
        with np.errstate(all="ignore"):
            result = np.asarray(function(*widened, params))
            return result.astype(self._type(dtype), copy=False)

    def _type(self, dtype: Any) -> Any:
        """Return float64 for a type of floats where all are wide, any other type as it is."""
        if not self.wide or dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            return dtype
        return np.dtype(np.float64)


def _is_float(x: Any) -> bool:
    return isinstance(x, np.ndarray) and jnp.issubdtype(x.dtype, jnp.floating)
