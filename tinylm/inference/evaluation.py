"""Scores on a validation split: the loss as sums and counts, divided once, and the share of answers met exactly."""

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tinylm.core.errors import UserError
from tinylm.core.mesh import constrain, owned_rows, place_batch
from tinylm.data.pipeline import eval_batches
from tinylm.data.rows import Rows
from tinylm.inference.decode import Decoder
from tinylm.inference.samplers import Sampler
from tinylm.model.losses import next_token_loss


def make_eval_step(graph: nnx.GraphDef) -> Callable:
    """Return jitted `(params, batch [B, T]) -> (nats, target tokens)`."""

    def eval_step(params, batch):
        nats, count, _ = next_token_loss(nnx.merge(graph, params), batch)
        return constrain(nats), constrain(count)

    return jax.jit(eval_step)


def evaluate(
    eval_step: Callable, params: dict, split: Rows, rows: int, mesh: Mesh, max_batches: int = 0
) -> tuple[float, float]:
    """Return (nats, target tokens) over a validation split, `rows` rows at a time (`max_batches` 0: all of it).

    Batches are added up in double precision on the host, so the sums don't depend on their number. Raises UserError
    for a split without target tokens.
    """
    owned = owned_rows(mesh, rows)
    batches = eval_batches(split, batch_size=rows, owned_rows=owned, max_batches=max_batches)
    sums: list[tuple[jax.Array, jax.Array]] = []
    for batch in batches:
        sums.append(eval_step(params, place_batch(mesh, batch, owned, rows, 0)))
        jax.block_until_ready(sums[-2:][0])  # programs that wait for other processes, many at a time, block each other
    nats = math.fsum(float(n) for n, _ in sums)
    count = math.fsum(float(c) for _, c in sums)
    if not count:
        raise UserError("the validation split has no target tokens; check data.valid_source and data.loss_on.")
    return nats, count


def exact_match(
    decoder: Decoder, params: dict, pairs: Sequence[tuple[np.ndarray, np.ndarray]], start_id: int, rows: int
) -> float:
    """Return the share of (prompt ids, completion ids) whose greedy answer is the completion and then the end.

    `rows` prompts are decoded at once, each after `start_id`, with room for the longest completion and its end.
    """
    longest = max(len(completion) for _, completion in pairs) + 1
    right = 0
    for start in range(0, len(pairs), rows):
        part = pairs[start : start + rows]
        filled = [*part, *[part[-1]] * (rows - len(part))]
        prompts = [[start_id, *prompt.tolist()] for prompt, _ in filled]
        answers = decoder.write(params, prompts, max_tokens=longest, sampler=Sampler(temperature=0.0))
        right += sum(answer == completion.tolist() for answer, (_, completion) in zip(answers, part, strict=False))
    return right / len(pairs)
