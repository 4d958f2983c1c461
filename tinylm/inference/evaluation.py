"""The loss over a validation split: sums and counts added up over batches, divided once."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tinylm.core.mesh import constrain, place_batch
from tinylm.model.losses import cross_entropy


def make_eval_step(graph: nnx.GraphDef) -> Callable:
    """Return jitted `(params, batch [B, T]) -> (nats, target tokens)`."""

    def eval_step(params, batch):
        model = nnx.merge(graph, params)
        logits_BTV = model(batch["tokens"], segments_BT=batch.get("segments"), positions_BT=batch.get("positions"))
        nats, count = cross_entropy(logits_BTV, batch["targets"], batch["weights"])
        return constrain(nats), constrain(count)

    return jax.jit(eval_step)


def evaluate(
    eval_step: Callable,
    params: dict,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    owned: np.ndarray,
    rows: int,
) -> tuple[float, float]:
    """Return (nats, target tokens) summed over host batches of `rows` rows, of which this process holds `owned`.

    The device adds nothing across batches, so the sums, kept in double precision, don't depend on their number.
    """
    sums = [eval_step(params, place_batch(mesh, batch, owned, rows, 0)) for batch in batches]
    nats, counts = np.asarray([[float(n), float(c)] for n, c in sums], np.float64).sum(axis=0)
    return float(nats), float(counts)
