"""Batches from rows, on threads: training batches through Grain from any batch index, evaluation
batches in order.

Batch b of B rows holds the examples b * B to (b + 1) * B - 1, so a batch is a pure function of its
index; no iterator state is saved anywhere. A process makes only the rows that its devices hold.
Threads read ahead; how many there are changes nothing. Grain is imported at the first batch, for it
takes most of a second.
"""

import itertools
import sys
from collections.abc import Generator, Iterator

import numpy as np

from tinylm.core.errors import HangError
from tinylm.data.rows import Examples, Rows


class _Runs:
    """The train batches of one process as Grain wants a source: a length and items by index.

    An item is a run of consecutive batches, of some 64 rows together, so that what an item costs is
    shared.
    """

    def __init__(self, rows: Rows, batch_shape: tuple[int, int], owned_rows: np.ndarray):
        micro_batches, micro_rows = batch_shape
        self._rows = rows
        self._batch_size = micro_batches * micro_rows
        # Of each row that this process holds, its place in the global batch: [A, n].
        first_rows = np.arange(micro_batches)[:, None] * micro_rows
        self._places = first_rows + np.asarray(owned_rows, np.int64)
        self.length = max(1, 64 // self._places.size)

    def __len__(self) -> int:
        return sys.maxsize // 2**16

    def __getitem__(self, index: int) -> list[tuple[int, Examples]]:
        first_batch = index * self.length
        batches = first_batch + np.arange(self.length)
        # Of each row of the run, its index over all epochs: [batches, A, n].
        first_indices = batches * self._batch_size
        indices = first_indices[:, None, None] + self._places
        by_batch: Examples = {}
        for name, values in self._rows.read(indices.ravel()).items():
            by_batch[name] = values.reshape(*indices.shape, -1)

        run: list[tuple[int, Examples]] = []
        for nth, batch in enumerate(batches.tolist()):
            arrays = {name: values[nth] for name, values in by_batch.items()}
            run.append((batch, arrays))
        return run


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

    `batch_shape` is (A, rows of a micro-batch): the row of (a, b) in the global batch is a *
    batch_shape[1] + b. `owned_rows` are the n sorted positions b that this process holds. What a
    thread raises is raised here.
    """
    import grain

    runs = _Runs(rows, batch_shape, owned_rows)
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0
    )
    first_run, batches_before = divmod(start, runs.length)
    iterator = iter(grain.MapDataset.source(runs)[first_run:].to_iter_dataset(options))
    try:
        batches = itertools.chain.from_iterable(iterator)
        yield from itertools.islice(batches, batches_before, None)
    except SystemExit as error:  # would end the program as if all were done
        raise HangError("a thread that reads batches was ended; give the same command.") from error
    finally:
        iterator.close()


def eval_batches(
    rows: Rows, *, batch_size: int, owned_rows: np.ndarray, max_batches: int = 0
) -> Iterator[Examples]:
    """Yield host arrays [n, T] over all rows in order, once; the last batch is filled with rows of
    weight 0.
    """
    num_batches = -(-len(rows) // batch_size)
    for batch in range(min(num_batches, max_batches or num_batches)):
        indices = batch * batch_size + np.asarray(owned_rows, np.int64)
        examples = rows.read(np.minimum(indices, len(rows) - 1))
        examples["weights"][indices >= len(rows)] = 0
        yield examples
