"""Loading the batches of training onto the devices.

A batch is a pure function of (seed, step, row), so any batch can be loaded at any time: `load`
names the first one and how many. Batches that follow each other are read ahead by threads; a jump
starts them again.
"""

from collections.abc import Generator

import jax
import numpy as np
from jax.sharding import Mesh

from tinylm.core.mesh import owned_rows, place_batch
from tinylm.data.pipeline import train_batches
from tinylm.data.rows import Examples, Rows
from tinylm.train.config import Config

# Dimensions of a dispatch: K steps, A micro-batches, rows of a micro-batch, T tokens.
_ROWS_DIM = 2


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
        self._mesh = mesh
        self._rows = rows
        self._most_steps = most_steps
        self._micro_rows = config.micro_batch_rows
        self._batch_shape = (config.train.accumulation_steps, self._micro_rows)
        # The rows of a micro-batch that the devices of this process hold.
        self._owned_rows = owned_rows(mesh, self._micro_rows)
        self._batches: Generator[tuple[int, Examples], None, None] | None = None
        self._next = -1

    def load(self, first_batch: int, count: int) -> dict[str, jax.Array]:
        """Return `count` batches from `first_batch` on, as [K, A, rows, T] on the mesh.

        K is always `most_steps`; what lies behind `count` repeats the last batch and is not read.
        """
        if self._batches is None or self._next != first_batch:
            self.close()
            self._batches = train_batches(
                self._rows,
                batch_shape=self._batch_shape,
                owned_rows=self._owned_rows,
                start=first_batch,
            )
        host = [next(self._batches)[1] for _ in range(count)]
        self._next = first_batch + count
        host += [host[-1]] * (self._most_steps - count)
        stacked = {name: np.stack([batch[name] for batch in host]) for name in host[0]}
        return place_batch(
            self._mesh, stacked, self._owned_rows, self._micro_rows, batch_dim=_ROWS_DIM
        )

    def close(self) -> None:
        """End the threads that read ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
