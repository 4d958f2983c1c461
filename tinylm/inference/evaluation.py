"""Scores on a validation split: the loss, and the share of answers met exactly.

The loss is a sum and a count, divided once.

An answer is compared token by token. Where it is worked out in words first, as in GSM8K (Cobbe et
al. 2021), only the final answer counts, which a pattern finds in both texts.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tinylm.core.batch import Batch, BatchRows
from tinylm.core.errors import UserError
from tinylm.core.mesh import constrain
from tinylm.data.pipeline import eval_batches
from tinylm.data.rows import Rows
from tinylm.inference.decode import Decoder
from tinylm.inference.samplers import Sampler
from tinylm.model.losses import next_token_loss


def make_eval_step(graph: nnx.GraphDef) -> Callable:
    """Return jitted `(params, batch [B, T]) -> (nats, target tokens)`."""

    def eval_step(params: dict, batch: Batch) -> tuple[jax.Array, jax.Array]:
        sums = next_token_loss(nnx.merge(graph, params), batch)
        return constrain(sums.nats), constrain(sums.num_targets)

    return jax.jit(eval_step)


def evaluate(
    eval_step: Callable,
    params: dict,
    split: Rows,
    mesh: Mesh,
    *,
    rows: int,
    micro_batches: int = 1,
    max_batches: int = 0,
) -> tuple[float, float]:
    """Return (nats, target tokens) over a validation split.

    Batches are added up in double precision on the host, so the sums don't depend on their number.

    Args:
      eval_step: as `make_eval_step` returns it.
      params: of the model.
      split: the rows to score.
      mesh: where to score them.
      rows: of a micro-batch, which are scored at a time.
      micro_batches: of a batch, as training has them: train.accumulation_steps.
      max_batches: batches to score at most, the first ones (0: all).

    Returns:
      The two sums; both are 0 where no batch holds a target token.
    """
    batch_rows = BatchRows(mesh, rows)
    batches = eval_batches(
        split, batch_size=rows, owned_rows=batch_rows.owned, max_batches=max_batches * micro_batches
    )
    sums: list[tuple[jax.Array, jax.Array]] = []
    for batch in batches:
        sums.append(eval_step(params, batch_rows.place(batch, rows_dim=0)))
        # Many programs at a time that wait for other processes block each other: two are under way
        # at most.
        jax.block_until_ready(sums[-2:][0])
    nats = math.fsum(float(n) for n, _ in sums)
    count = math.fsum(float(c) for _, c in sums)
    return nats, count


def exact_match(
    decoder: Decoder,
    params: dict,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    start_id: int,
    rows: int,
    is_right: Callable[[np.ndarray, np.ndarray, list[int]], bool] | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> float:
    """Return the share of pairs that the model answers rightly by greedy decoding.

    Args:
      decoder: of the model.
      params: of the model.
      pairs: (prompt ids, completion ids); there is room for the longest completion and its end.
      start_id: stands before each prompt.
      rows: prompts that are decoded at once.
      is_right: asked as `is_right(prompt, completion, answer)`, such as what `final_answers`
        returns; without it an answer is right where it is the completion and then the end.
      before_batch: called before each batch of prompts.
    """
    longest = max(len(completion) for _, completion in pairs) + 1
    num_right = 0
    for start in range(0, len(pairs), rows):
        before_batch()
        part = pairs[start : start + rows]
        prompts = [[start_id, *prompt.tolist()] for prompt, _ in part]
        # A last batch with fewer prompts is filled up, so that one program serves all.
        prompts += [prompts[-1]] * (rows - len(part))
        answers = decoder.write(
            params, prompts, max_tokens=longest, sampler=Sampler(temperature=0.0)
        )
        for (prompt, completion), answer in zip(part, answers, strict=False):
            if is_right is None:
                num_right += answer == completion.tolist()
            else:
                num_right += is_right(prompt, completion, answer)
    return num_right / len(pairs)


def check_pairs(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    context: int,
    tokenizer: Any,
    pattern: str,
    keys: tuple[str, str],
) -> None:
    """Raise UserError where `exact_match` could not count pairs.

    There have to be some, each prompt has to fit into the context, and each completion has to have
    a final answer where a pattern tells what that is.

    Args:
      pairs: (prompt ids, completion ids).
      context: of the model, tokens.
      tokenizer: of the ids.
      pattern: of the final answer (empty: the whole completion counts).
      keys: what messages call the wish to count, and the pattern.
    """
    wish, pattern_key = keys
    if not pairs:
        raise UserError(
            f"{wish} needs validation pairs of prompt and completion, and there are none; leave it "
            "out."
        )
    longest = max(len(prompt) for prompt, _ in pairs)
    if longest + 1 >= context:
        raise UserError(
            f"{wish}: a prompt of {longest + 1} tokens, its begin among them, must be shorter than "
            f"the context ({context}); take shorter prompts or a longer data.seq_len, or leave "
            f"{wish} out."
        )
    if not pattern:
        return
    for prompt, completion in pairs:
        text = tokenizer.decode_after(prompt.tolist(), completion.tolist())
        if final_answer(text, pattern) is None:
            raise UserError(
                f"{pattern_key}={pattern} finds nothing in the completion {text!r:.80}; change it."
            )


def final_answer(text: str, pattern: str) -> str | None:
    """Return what a pattern finds last in a text, None where it finds nothing.

    Where the pattern has groups, it is what the first of them holds.
    """
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    group = 1 if matches[-1].re.groups else 0
    return (matches[-1][group] or "").strip()


def final_answers(
    tokenizer: Any, pattern: str
) -> Callable[[np.ndarray, np.ndarray, list[int]], bool]:
    """Return whether completion and answer have the same final answer, as `exact_match` asks."""

    def is_right(prompt: np.ndarray, completion: np.ndarray, answer: list[int]) -> bool:
        before = prompt.tolist()
        wanted = final_answer(tokenizer.decode_after(before, completion.tolist()), pattern)
        got = final_answer(tokenizer.decode_after(before, answer), pattern)
        return wanted is not None and got == wanted

    return is_right
