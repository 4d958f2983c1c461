"""Batches from rows, on threads: training batches through Grain from any batch index, evaluation batches in order.

Batch b of B rows holds the examples b * B to (b + 1) * B - 1, so a batch is a pure function of its index; no iterator
state is saved anywhere. A process makes only the rows that its devices hold. Threads read ahead; how many there are
changes nothing. Grain is imported at the first batch, for it takes most of a second.
"""

import sys
from collections.abc import Generator, Iterator

import numpy as np

from tinylm.data.rows import Examples, Rows


class _TrainBatches:
    """The train batches of one process as Grain wants a source: a length and items by index."""

    def __init__(self, rows: Rows, batch_shape: tuple[int, int], owned_rows: np.ndarray):
        micro_batches, micro_rows = batch_shape
        self._rows, self._batch_size = rows, micro_batches * micro_rows
        self._places = np.arange(micro_batches)[:, None] * micro_rows + np.asarray(owned_rows, np.int64)

    def __len__(self) -> int:
        return sys.maxsize // 2

    def __getitem__(self, index: int) -> tuple[int, Examples]:
        examples = self._rows.read(index * self._batch_size + self._places.ravel())
        return index, {name: v.reshape(*self._places.shape, *v.shape[1:]) for name, v in examples.items()}


def train_batches(
    rows: Rows,
    *,
    batch_shape: tuple[int, int],
    owned_rows: np.ndarray,
    start: int = 0,
    num_threads: int = 2,
    prefetch: int = 4,
) -> Generator[tuple[int, Examples], None, None]:
    """Yield (batch index, host arrays [A, n, T]) from batch `start` on, without end.

    `batch_shape` is (A, rows of a micro-batch): the row of (a, b) in the global batch is a * batch_shape[1] + b.
    `owned_rows` are the n sorted positions b that this process holds. What a thread raises is raised here.
    """
    import grain

    batches = grain.MapDataset.source(_TrainBatches(rows, batch_shape, owned_rows))[start:]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    iterator = iter(batches.to_iter_dataset(options))
    try:
        yield from iterator
    finally:
        iterator.close()


def eval_batches(rows: Rows, *, batch_size: int, owned_rows: np.ndarray, max_batches: int = 0) -> Iterator[Examples]:
    """Yield host arrays [n, T] over all rows in order, once; the last batch is filled with rows of weight 0."""
    num_batches = -(-len(rows) // batch_size)
    for batch in range(min(num_batches, max_batches or num_batches)):
        indices = batch * batch_size + np.asarray(owned_rows, np.int64)
        examples = rows.read(np.minimum(indices, len(rows) - 1))
        examples["weights"][indices >= len(rows)] = 0
        yield examples
