"""Loading the batches of training onto the devices.

A batch is a pure function of (seed, step, row), so any batch can be loaded at any time: `load`
names the first one and how many. Batches that follow each other are read ahead by threads; a jump
starts them again.
"""

from collections.abc import Generator

from jax.sharding import Mesh

from tinylm.core.batch import Batch, BatchRows, stack_steps
from tinylm.data.pipeline import train_batches
from tinylm.data.rows import Examples, Rows
from tinylm.train.config import Config


class Feed:
    """The training batches of one run on one mesh."""

    def __init__(self, config: Config, rows: Rows, mesh: Mesh, most_steps: int):
        """Read nothing yet.

        Args:
          config: of the run, resolved.
          rows: of the training split.
          mesh: where batches go.
          most_steps: the most steps of one dispatch. All dispatches have room for as many, so that
            one program serves all.
        """
        self._rows = rows
        self._most_steps = most_steps
        self._batch_shape = (config.train.accumulation_steps, config.micro_batch_rows)
        self._batch_rows = BatchRows(mesh, config.micro_batch_rows)
        self._batches: Generator[tuple[int, Examples], None, None] | None = None
        self._next = -1

    def load(self, first_batch: int, count: int) -> Batch:
        """Return `count` batches from `first_batch` on, as [K, A, B/A, T] on the mesh.

        K is always `most_steps`; what lies behind `count` repeats the last batch and is not read.
        """
        if self._batches is None or self._next != first_batch:
            self.close()
            self._batches = train_batches(
                self._rows,
                batch_shape=self._batch_shape,
                owned_rows=self._batch_rows.owned,
                start=first_batch,
            )
        host = [next(self._batches)[1] for _ in range(count)]
        self._next = first_batch + count
        host += [host[-1]] * (self._most_steps - count)
        return self._batch_rows.place(stack_steps(host))

    def close(self) -> None:
        """End the threads that read ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
