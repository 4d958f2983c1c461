"""Products of sorted rows with the matrix of their group: what the tokens of each expert meet.

Rows come in any order, each with the number of its group. `lay_out` gives each a slot, so that the
rows of a group lie next to each other; `to_slots` and `from_slots` move rows there and back, and
`grouped_matmul` multiplies the rows of each group with the group's matrix. No row is ever dropped:
there are as many slots as rows, however they are shared out.

What computes them depends on the platform (read from compiled programs, jax 0.10.2):

- On TPU it is the kernel of JAX's library, megablox (Gale et al. 2023). `jax.lax.ragged_dot` has a
  kernel, too, but not for the gradient of the matrices, which it computes from all rows for each
  group. Where the sizes don't fit the kernel's tiles, it is ragged_dot.
- On GPU it is ragged_dot.
- On CPU ragged_dot computes all rows with all matrices, 8 times the work with 8 groups. So there
  the rows of each group are filled up to whole blocks, and a loop multiplies each block with the
  matrix that it belongs to:

      groups of 5, 0 and 2 rows, blocks of 4:   slots  a a a a | a . . . | c c . .
                                                block     a         a         c

  1,536 rows of 128 with 8 matrices of 128 x 256 take 0.7 ms so, 4.3 ms by ragged_dot, and one
  product of that size takes 0.45 ms (two cores).

Axes: T tokens, C groups that a token is sent to, M rows (T times C), S slots, D embed, F mlp,
X groups (experts), Q blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import megablox

from tinylm.core.mesh import target_platform

# The name of a product, for policies of what the backward pass finds stored.
PRODUCT = "product by group"
# The most rows of a block on CPU. Larger blocks are no faster, and leave more slots empty.
_MOST_BLOCK_ROWS = 32
# On TPU, rows come in whole tiles of the kernel: the large ones where there are many.
_TILE_ROWS = 128
_LARGE_TILE_ROWS = 512
# The sizes of tiles along the features, the best first; one must divide them.
_TILE_FEATURES = (1024, 512, 256, 128)


class Layout(NamedTuple):
    """Where rows lie while their groups are multiplied.

    Attributes:
      slot_M: the slot of each row; the number of slots for a row of no group.
      row_S: the row in each slot; the number of rows for an empty one.
      sizes_X: the rows of each group.
    """

    slot_M: jax.Array
    row_S: jax.Array
    sizes_X: jax.Array


def lay_out(group_M: jax.Array, num_groups: int) -> Layout:
    """Return a slot for each row.

    Args:
      group_M: the number of each row's group; `num_groups` for a row of none.
      num_groups: how many there are.
    """
    num_rows = len(group_M)
    order_M = jnp.argsort(group_M, stable=True)
    sizes_X = jnp.sum(group_M[:, None] == jnp.arange(num_groups), axis=0, dtype=jnp.int32)
    block_rows = _block_rows(num_rows, num_groups)
    if target_platform() == "tpu":
        tile = _tile_rows(num_rows)
        num_slots = -(-num_rows // tile) * tile
    elif block_rows == 1:
        num_slots = num_rows
    else:
        num_slots = (num_rows // block_rows + num_groups) * block_rows
    # Where each group begins among the sorted rows, and among the slots. The last entry is that of
    # the rows of no group, which lie behind all others.
    room_X = -(-sizes_X // block_rows) * block_rows
    begins = jnp.cumulative_sum(sizes_X, include_initial=True)
    slots_begin = jnp.cumulative_sum(room_X, include_initial=True)
    group_in_order_M = group_M[order_M]
    within_group_M = jnp.arange(num_rows) - begins[group_in_order_M]
    slot_in_order_M = slots_begin[group_in_order_M] + within_group_M
    slot_in_order_M = jnp.where(group_in_order_M < num_groups, slot_in_order_M, num_slots)
    slot_M = jnp.zeros(num_rows, jnp.int32).at[order_M].set(slot_in_order_M, unique_indices=True)
    row_S = jnp.full(num_slots, num_rows, jnp.int32)
    row_S = row_S.at[slot_M].set(jnp.arange(num_rows), mode="drop")
    return Layout(slot_M, row_S, sizes_X)


def _block_rows(num_rows: int, num_groups: int) -> int:
    """Return the rows of a block: a power of two, at most a quarter of what a group has by mean."""
    if target_platform() != "cpu":
        return 1
    quarter = max(1, num_rows // (4 * num_groups))
    return min(_MOST_BLOCK_ROWS, 1 << (quarter.bit_length() - 1))


def _tile_rows(num_rows: int) -> int:
    """Return the rows of a tile on TPU."""
    return _LARGE_TILE_ROWS if num_rows >= 8 * _LARGE_TILE_ROWS else _TILE_ROWS


def _rows_of(x: jax.Array, index: jax.Array) -> jax.Array:
    """Return the rows of `x` that an index names, 0 where it points behind the last one."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def to_slots(x_TD: jax.Array, layout: Layout) -> jax.Array:
    """Return x_SD: each token in the slots of its C rows, 0 in empty ones.

    Rows are numbered token by token, so row m is of token m // C.
    """
    return _to_slots(len(layout.slot_M) // len(x_TD), x_TD, layout)


# Both ways are gathers of rows. JAX's own derivatives would scatter and add, which TPUs do slowly.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _to_slots(rows_per_token: int, x_TD: jax.Array, layout: Layout) -> jax.Array:
    return _rows_of(x_TD, layout.row_S // rows_per_token)


def _to_slots_forward(
    rows_per_token: int, x_TD: jax.Array, layout: Layout
) -> tuple[jax.Array, Layout]:
    return _to_slots(rows_per_token, x_TD, layout), layout


def _to_slots_backward(
    rows_per_token: int, layout: Layout, dx_SD: jax.Array
) -> tuple[jax.Array, None]:
    dx_MD = _rows_of(dx_SD, layout.slot_M)
    dx_TCD = dx_MD.reshape(-1, rows_per_token, dx_MD.shape[-1])
    return jnp.sum(dx_TCD, axis=1, dtype=jnp.float32).astype(dx_SD.dtype), None


_to_slots.defvjp(_to_slots_forward, _to_slots_backward)


@jax.custom_vjp
def from_slots(y_SD: jax.Array, layout: Layout) -> jax.Array:
    """Return y_MD: what the slot of each row holds, 0 for a row of no group."""
    return _rows_of(y_SD, layout.slot_M)


def _from_slots_forward(y_SD: jax.Array, layout: Layout) -> tuple[jax.Array, Layout]:
    return from_slots(y_SD, layout), layout


def _from_slots_backward(layout: Layout, dy_MD: jax.Array) -> tuple[jax.Array, None]:
    return _rows_of(dy_MD, layout.row_S), None


from_slots.defvjp(_from_slots_forward, _from_slots_backward)


def grouped_matmul(x_SD: jax.Array, matrices_XDF: jax.Array, layout: Layout) -> jax.Array:
    """Return y_SF: each slot times the matrix of its group, in the type of `x`; 0 in empty slots
    behind the last group.

    The result has the name PRODUCT, by which `model.remat` finds it.
    """
    return checkpoint_name(_multiply(x_SD, matrices_XDF, layout), PRODUCT)


def _multiply(x_SD: jax.Array, matrices_XDF: jax.Array, layout: Layout) -> jax.Array:
    num_slots = len(x_SD)
    num_groups = len(matrices_XDF)
    block_rows = _block_rows(len(layout.slot_M), num_groups)
    if target_platform() != "cpu":
        y_SF = _multiply_by_kernel(x_SD, matrices_XDF, layout)
        # What the kernels leave there is not defined.
        is_used_S = jnp.arange(num_slots) < jnp.sum(layout.sizes_X)
        return jnp.where(is_used_S[:, None], y_SF, 0)
    ends_X = jnp.cumulative_sum(-(-layout.sizes_X // block_rows))
    # The blocks that hold rows, and the group of each. Those behind them stay 0.
    num_blocks = ends_X[-1]
    group_Q = jnp.searchsorted(ends_X, jnp.arange(num_slots // block_rows), side="right")
    return _multiply_blocks(block_rows, x_SD, matrices_XDF, group_Q, num_blocks)


def _multiply_by_kernel(x_SD: jax.Array, matrices_XDF: jax.Array, layout: Layout) -> jax.Array:
    """Multiply the slots of each group with its matrix on TPU or GPU."""
    _, size_in, size_out = matrices_XDF.shape
    fitting = [size for size in _TILE_FEATURES if size_in % size == 0 and size_out % size == 0]
    if target_platform() != "tpu" or not fitting:
        return jax.lax.ragged_dot(x_SD, matrices_XDF, layout.sizes_X)
    tiles = (_tile_rows(len(layout.slot_M)), fitting[0], fitting[0])
    return megablox.gmm(x_SD, matrices_XDF, layout.sizes_X, x_SD.dtype, tiles)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply_blocks(
    rows: int, x_SD: jax.Array, matrices_XDF: jax.Array, group_Q: jax.Array, num_blocks: jax.Array
) -> jax.Array:
    """Multiply each block of `rows` rows with the matrix of its group."""

    def multiply(block: jax.Array, y_SF: jax.Array) -> jax.Array:
        x_RD = jax.lax.dynamic_slice_in_dim(x_SD, block * rows, rows)
        y_RF = jnp.matmul(
            x_RD, matrices_XDF[group_Q[block]], preferred_element_type=jnp.float32
        ).astype(x_SD.dtype)
        return jax.lax.dynamic_update_slice_in_dim(y_SF, y_RF, block * rows, 0)

    nothing = jnp.zeros((len(x_SD), matrices_XDF.shape[-1]), x_SD.dtype)
    return jax.lax.fori_loop(0, num_blocks, multiply, nothing)


_Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _multiply_blocks_forward(
    rows: int, x_SD: jax.Array, matrices_XDF: jax.Array, group_Q: jax.Array, num_blocks: jax.Array
) -> tuple[jax.Array, _Operands]:
    y_SF = _multiply_blocks(rows, x_SD, matrices_XDF, group_Q, num_blocks)
    return y_SF, (x_SD, matrices_XDF, group_Q, num_blocks)


def _multiply_blocks_backward(
    rows: int, operands: _Operands, dy_SF: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    x_SD, matrices_XDF, group_Q, num_blocks = operands
    dx_SD = _multiply_blocks(rows, dy_SF, matrices_XDF.swapaxes(1, 2), group_Q, num_blocks)

    def add(block: jax.Array, dmatrices_XDF: jax.Array) -> jax.Array:
        x_RD = jax.lax.dynamic_slice_in_dim(x_SD, block * rows, rows)
        dy_RF = jax.lax.dynamic_slice_in_dim(dy_SF, block * rows, rows)
        dmatrix_DF = jnp.matmul(x_RD.T, dy_RF, preferred_element_type=jnp.float32)
        return dmatrices_XDF.at[group_Q[block]].add(dmatrix_DF)

    nothing = jnp.zeros(matrices_XDF.shape, jnp.float32)
    dmatrices_XDF = jax.lax.fori_loop(0, num_blocks, add, nothing)
    return dx_SD, dmatrices_XDF.astype(matrices_XDF.dtype), None, None


_multiply_blocks.defvjp(_multiply_blocks_forward, _multiply_blocks_backward)
