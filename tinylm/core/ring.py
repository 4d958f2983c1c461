"""The devices that share a row: who holds which of its positions, and what they send each other.

The mesh's `context` axis splits rows by position. Under a causal mask a late position reads more
keys than an early one, so each of n devices holds one early and one late stretch of 2n, and all
have the same number of products of a query with a key (the zigzag order of other trainers):

    row of 16 positions      0 1 2 3 4 5 6 7 8 9 . . . . 14 15
    device 0 of 4            0 1                         14 15
    device 1                     2 3             12 13
    device 2                         4 5   10 11
    device 3                             6 7 8 9

(Brandon et al. 2023, "Striped attention", balance one position at a time; stretches keep blocks of
keys that a kernel may skip whole, as in Llama 3's training, Dubey et al. 2024, section 3.3.2.)
The order is that of columns in a row's arrays: 0 1 14 15 2 3 12 13 ..., of which each device takes
one part. What reads neighbours, or counts positions, has to know; everything else works as ever.

The functions from `pass_on` downward are for the body of a shard_map (`collectives.on_shards`).
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.core.mesh import AXES, sizes_in_use

Tree = TypeVar("Tree")


def splits_rows() -> bool:
    """Say whether the mesh in use splits rows that are long enough by position."""
    return sizes_in_use()[AXES.context] > 1


def parts_of_rows(length: int) -> int:
    """Return into how many parts the mesh in use splits the positions of rows (1: not at all)."""
    size = sizes_in_use()[AXES.context]
    return size if length % size == 0 else 1


def has_stretches(length: int, num_parts: int) -> bool:
    """Say whether each of so many devices gets two stretches of a row, or the whole row."""
    return num_parts == 1 or length % (2 * num_parts) == 0


def balanced_order(length: int, reach: int = 0) -> np.ndarray | None:
    """Return the position of each column of a row's arrays, as the picture above has them.

    None where rows stay as they are: the mesh in use doesn't split them, not into two stretches a
    device, or into stretches shorter than `reach`, how far some layer looks back.
    """
    num_parts = parts_of_rows(length)
    if num_parts == 1 or not has_stretches(length, num_parts):
        return None
    if length // (2 * num_parts) < reach:
        return None
    return order_of_parts(length, num_parts)


def order_of_parts(length: int, num_parts: int) -> np.ndarray:
    """Return the position of each column of rows in so many parts, in the balanced order."""
    stretches = np.arange(length, dtype=np.int32).reshape(2 * num_parts, -1)
    columns = []
    for early in range(num_parts):
        late = 2 * num_parts - 1 - early
        columns += [stretches[early], stretches[late]]
    return np.concatenate(columns)


def ring_size() -> int:
    """Return how many devices share a row."""
    return jax.lax.axis_size(AXES.context)


def ring_place() -> jax.Array:
    """Return the place of this device among those that share a row."""
    return jax.lax.axis_index(AXES.context)


def pass_on(tree: Tree) -> Tree:
    """Send a tree to the next device of the ring, and return the one of the device before."""
    size = ring_size()
    to_next = [(place, (place + 1) % size) for place in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXES.context, to_next), tree)


def gather_ring(x: jax.Array, axis: int) -> jax.Array:
    """Return the parts of all devices of the ring, one after the other along `axis`."""
    # The devices come first: along another axis the TPU's compiler adds the gradients up whole on
    # each device and cuts its part out, which sends twice as much as scattering them.
    by_device = jax.lax.all_gather(x, AXES.context)
    parts = jnp.moveaxis(by_device, 0, axis)
    return parts.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def gather_row(x: jax.Array, axis: int) -> jax.Array:
    """Return whole rows in their own order, from parts in the balanced order along `axis`."""
    # The devices come first, and then what each has.
    by_device = jax.lax.all_gather(x, AXES.context)
    early, late = jnp.split(by_device, 2, axis + 1)
    # The last device has the first of the late stretches.
    stretches = jnp.concatenate([early, jnp.flip(late, 0)])
    stretches = jnp.moveaxis(stretches, 0, axis)
    return stretches.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])


def ends_before(x: jax.Array, axis: int, count: int) -> jax.Array:
    """Return the `count` positions before each of this device's two stretches, from its neighbours.

    Before the first stretch of a row there are zeros.

    Args:
      x: this device's two stretches, along `axis`, in the balanced order.
      axis: that of the positions.
      count: at most the length of a stretch.

    Returns:
      2 x `count` positions along `axis`.
    """
    early, late = jnp.split(x, 2, axis)
    assert count <= early.shape[axis], "a neighbour has one stretch before another"
    size = ring_size()
    first = early.shape[axis] - count
    end_of_early = jax.lax.slice_in_dim(early, first, None, axis=axis)
    end_of_late = jax.lax.slice_in_dim(late, first, None, axis=axis)
    # Early stretches follow each other from device to device, late ones the other way round.
    up = [(place, place + 1) for place in range(size - 1)]
    down = [(place + 1, place) for place in range(size - 1)]
    before_early = jax.lax.ppermute(end_of_early, AXES.context, up)
    before_late = jax.lax.ppermute(end_of_late, AXES.context, down)
    # The last device has the two stretches in the middle of the row.
    is_last = ring_place() == size - 1
    before_late = jnp.where(is_last, end_of_early, before_late)
    return jnp.concatenate([before_early, before_late], axis)
