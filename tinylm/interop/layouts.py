"""How a tensor of theirs holds one or more parameters of ours: the transforms of the tables.

Ours are kernels with a dimension for each logical axis: a query is [embed, heads, head_dim], and an
output of attention [heads, head_dim, embed]. Theirs are matrices, with the inputs first (GPT-2's
Conv1D) or the outputs first (torch's nn.Linear), and with query, key and value in one matrix or in
three. In all of them the features of a head lie next to each other, so feature h of head n is
number n * head_dim + h.

`split` makes views where it can, so that a device which reads its slice of ours reads no more than
that part of their file. `join` undoes it exactly. Shapes are those of one layer.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One transform.

    Attributes:
      shape: from the shapes of ours to the shape of theirs.
      split: from theirs and the shapes of ours to ours.
      join: from ours to theirs.
    """

    shape: Callable[[Sequence[Shape]], Shape]
    split: Callable[[np.ndarray, Sequence[Shape]], list[np.ndarray]]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]


def _shapes(arrays: Sequence[np.ndarray]) -> list[Shape]:
    return [array.shape for array in arrays]


def _input_first(num_inputs: int) -> Layout:
    """Return the layout of a matrix [inputs, outputs].

    Args:
      num_inputs: how many of the first axes of ours are inputs: 1 for [embed, heads, head_dim],
        2 for [heads, head_dim, embed].
    """

    def shape(shapes: Sequence[Shape]) -> Shape:
        [ours] = shapes
        return math.prod(ours[:num_inputs]), math.prod(ours[num_inputs:])

    def split(theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        [ours] = shapes
        return [theirs.reshape(ours)]

    def join(ours: Sequence[np.ndarray]) -> np.ndarray:
        return ours[0].reshape(shape(_shapes(ours)))

    return Layout(shape, split, join)


def _output_first(num_inputs: int) -> Layout:
    """Return the layout of a matrix [outputs, inputs]: the transpose of `_input_first`."""
    transpose = _input_first(num_inputs)

    def shape(shapes: Sequence[Shape]) -> Shape:
        inputs, outputs = transpose.shape(shapes)
        return outputs, inputs

    def split(theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return transpose.split(theirs.T, shapes)

    def join(ours: Sequence[np.ndarray]) -> np.ndarray:
        return transpose.join(ours).T

    return Layout(shape, split, join)


def _same() -> Layout:
    """Return the layout of a tensor that is the same here and there: a norm or an embedding."""

    def split(theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [theirs]

    return Layout(lambda shapes: shapes[0], split, lambda ours: ours[0])


def _flat() -> Layout:
    """Return the layout of a bias: [heads * head_dim] there, [heads, head_dim] here."""

    def shape(shapes: Sequence[Shape]) -> Shape:
        return (math.prod(shapes[0]),)

    def split(theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        return [theirs.reshape(shapes[0])]

    return Layout(shape, split, lambda ours: ours[0].reshape(-1))


def _fused_shape(shapes: Sequence[Shape]) -> Shape:
    """Return (embed, 3 * heads * head_dim) for kernels, (3 * heads * head_dim,) for biases."""
    *embed, heads, head_dim = shapes[0]
    return (*embed, len(shapes) * heads * head_dim)


def _thirds() -> Layout:
    """Return GPT-2's layout of query, key and value: [embed, (3, heads, head_dim)].

    All of the query comes first, then the key, then the value; the biases likewise, without embed.
    """

    def split(theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        *embed, heads, head_dim = shapes[0]
        num_parts = len(shapes)
        parts = theirs.reshape(*embed, num_parts, heads, head_dim)
        return [parts[..., i, :, :] for i in range(num_parts)]

    def join(ours: Sequence[np.ndarray]) -> np.ndarray:
        parts = np.stack(ours, axis=-3)
        return parts.reshape(_fused_shape(_shapes(ours)))

    return Layout(_fused_shape, split, join)


def _by_head() -> Layout:
    """Return GPT-NeoX's layout of query, key and value: [(heads, 3, head_dim), embed].

    Each head has its query, key and value one after the other; the biases likewise, without embed.
    """

    def shape(shapes: Sequence[Shape]) -> Shape:
        return _fused_shape(shapes)[::-1]

    def split(theirs: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        *embed, heads, head_dim = shapes[0]
        num_parts = len(shapes)
        parts = theirs.T.reshape(*embed, heads, num_parts, head_dim)
        return [parts[..., i, :] for i in range(num_parts)]

    def join(ours: Sequence[np.ndarray]) -> np.ndarray:
        parts = np.stack(ours, axis=-2)
        return parts.reshape(_fused_shape(_shapes(ours))).T

    return Layout(shape, split, join)


SAME = _same()
FLAT = _flat()
INPUT_FIRST = _input_first(1)
INPUT_FIRST_2 = _input_first(2)
OUTPUT_FIRST = _output_first(1)
OUTPUT_FIRST_2 = _output_first(2)
THIRDS = _thirds()
BY_HEAD = _by_head()
