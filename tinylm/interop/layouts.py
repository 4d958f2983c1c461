"""How a tensor of theirs holds one or more of ours: the transforms that the families' tables name.

Ours are kernels with a dimension for each logical axis (embed, heads, head_dim); theirs are
matrices, input first (GPT-2's Conv1D) or output first (nn.Linear), with query, key and value apart
or fused. `split` makes views where it can, so that a slice of ours reads no more than its part of
their file; `join` undoes it exactly.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One transform, given the shapes of ours: theirs' shape, theirs to ours, ours to theirs."""

    shape: Callable[[Sequence[Shape]], Shape]
    split: Callable[[np.ndarray, Sequence[Shape]], list[np.ndarray]]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]


def _flat(shapes: Sequence[Shape]) -> Shape:
    return (math.prod(shapes[0]),)


def _input_first(inputs: int) -> Layout:
    """A matrix [inputs, outputs]; ours has `inputs` leading axes of input."""

    def shape(shapes):
        return math.prod(shapes[0][:inputs]), math.prod(shapes[0][inputs:])

    def join(ours):
        return ours[0].reshape(shape([ours[0].shape]))

    return Layout(shape, lambda x, shapes: [x.reshape(shapes[0])], join)


def _output_first(inputs: int) -> Layout:
    """A matrix [outputs, inputs]; ours has `inputs` leading axes of input."""
    forward = _input_first(inputs)
    return Layout(
        lambda shapes: forward.shape(shapes)[::-1],
        lambda x, shapes: forward.split(x.T, shapes),
        lambda ours: forward.join(ours).T,
    )


def _fused_shape(shapes: Sequence[Shape]) -> Shape:
    *lead, heads, head_dim = shapes[0]
    return (*lead, len(shapes) * heads * head_dim)


def _split_thirds(x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    *lead, heads, head_dim = shapes[0]
    parts = x.reshape(*lead, len(shapes), heads, head_dim)
    return [parts[..., i, :, :] for i in range(len(shapes))]


def _split_by_head(x: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    *lead, heads, head_dim = shapes[0]
    parts = x.T.reshape(*lead, heads, len(shapes), head_dim)
    return [parts[..., i, :] for i in range(len(shapes))]


def _join_thirds(ours: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(ours, axis=-3).reshape(_fused_shape([x.shape for x in ours]))


def _join_by_head(ours: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(ours, axis=-2).reshape(_fused_shape([x.shape for x in ours])).T


SAME = Layout(lambda shapes: shapes[0], lambda x, shapes: [x], lambda ours: ours[0])
FLAT = Layout(_flat, lambda x, shapes: [x.reshape(shapes[0])], lambda ours: ours[0].reshape(-1))
INPUT_FIRST, INPUT_FIRST_2 = _input_first(1), _input_first(2)
OUTPUT_FIRST, OUTPUT_FIRST_2 = _output_first(1), _output_first(2)
# GPT-2: [embed, query | key | value], and their biases end to end.
THIRDS = Layout(_fused_shape, _split_thirds, _join_thirds)
# GPT-NeoX: [head by head: query, key, value; embed], and their biases likewise.
BY_HEAD = Layout(lambda shapes: _fused_shape(shapes)[::-1], _split_by_head, _join_by_head)
