"""The schema of a batch, and how the rows that a process makes get onto the mesh.

A batch is a dictionary of arrays of one shape, whose names and types are listed here. A dispatch of
K steps takes them as [K, A, B/A, T]: K steps, A micro-batches, B/A rows of a micro-batch (B is the
global batch size), T tokens of a row. Each process makes only the rows that its devices hold:

    rows of a micro-batch     0 1 2 3 4 5 6 7
    process 0, 2 devices      0 1 2 3            owned: [0 1 2 3]
    process 1, 2 devices              4 5 6 7    owned: [4 5 6 7]
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinylm.core.mesh import activation_sharding

# On the host: each array [..., rows, T], of all rows or of those that a process holds.
HostBatch = dict[str, np.ndarray]
# On the mesh: the same names, as global arrays.
Batch = dict[str, jax.Array]

# `weights` is 1 for a target that counts in the loss, and 0 for one that does not.
_DTYPES = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
# Packed rows hold several documents: `segments` numbers them from 1 (0: nothing is there), and
# `positions` counts from the begin of each.
_PACKED_DTYPES = {"segments": np.int32, "positions": np.int32}

# The dimension of rows in a dispatch [K, A, B/A, T].
ROWS_DIM = 2


def batch_dtypes(packed: bool) -> dict[str, type[np.generic]]:
    """Return the names and types of a batch's arrays; packed rows have two more."""
    if packed:
        return {**_DTYPES, **_PACKED_DTYPES}
    return dict(_DTYPES)


def batch_of_ids(ids: np.ndarray, weights: np.ndarray) -> HostBatch:
    """Return the batch that predicts each id from those before it.

    Args:
      ids: [..., T + 1], int32.
      weights: [..., T], float32, one for each target.
    """
    return {"tokens": ids[..., :-1], "targets": ids[..., 1:], "weights": weights}


def abstract_batch(
    mesh: Mesh, shape: Sequence[int], packed: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return what a dispatch of `shape` [K, A, B/A, T] takes, for compiling without data."""
    sharding = activation_sharding(mesh, (None, None, "batch", None), shape)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, dtype in batch_dtypes(packed).items()
    }


def stack_steps(batches: Sequence[HostBatch]) -> HostBatch:
    """Return the batches of several steps, each [A, rows, T], as those of one dispatch."""
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


class BatchRows:
    """The rows of a micro-batch on a mesh: which this process makes, and how they get there.

    Attributes:
      owned: the sorted positions of the rows that this process's devices hold.
    """

    def __init__(self, mesh: Mesh, num_rows: int):
        """Find the rows of this process.

        Args:
          mesh: the devices.
          num_rows: of a micro-batch, over all processes.
        """
        self._mesh = mesh
        self._num_rows = num_rows
        sharding = activation_sharding(mesh, ("batch",), (num_rows,))
        index_of = sharding.addressable_devices_indices_map((num_rows,))
        rows = np.arange(num_rows)
        # Devices that differ along the model axis hold the same rows.
        self.owned = np.unique(np.concatenate([rows[index] for index in index_of.values()]))

    def place(self, host: HostBatch, rows_dim: int = ROWS_DIM) -> Batch:
        """Put the owned rows, which lie along `rows_dim`, onto the mesh as global arrays."""
        return {name: self._place(x, rows_dim) for name, x in host.items()}

    def _place(self, x: np.ndarray, rows_dim: int) -> jax.Array:
        shape = (*x.shape[:rows_dim], self._num_rows, *x.shape[rows_dim + 1 :])
        axes: list[str | None] = [None] * x.ndim
        axes[rows_dim] = "batch"
        sharding = activation_sharding(self._mesh, axes, shape)
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(shape, sharding, self._reader(x, rows_dim))

    def _reader(self, x: np.ndarray, rows_dim: int) -> Callable[[Any], np.ndarray]:
        """Return the callback that cuts one device's part out of the rows this process holds."""

        def read(index: tuple[slice, ...]) -> np.ndarray:
            wanted = np.arange(self._num_rows)[index[rows_dim]]
            return np.take(x, np.searchsorted(self.owned, wanted), axis=rows_dim)

        return read
