"""Writing text with a KV cache: read the prompts at once, then decode token by token on the device.

Prompts of unequal length share a batch. They are padded on the left, so that all rows write the
same slot of the cache: one update in place. Two prompts of 2 and 4 tokens, after one more token:

    slot         0  1  2  3  4  5 ...
    row 0        .  .  a  b  c            positions -2 -1 0 1 2
    row 1        a  b  c  d  e            positions  0  1 2 3 4

Lengths are rounded up to buckets, so that few programs are compiled whatever the prompts. A text
longer than the model's context goes on: when the cache is full, the last half of the context is
read again as a prompt.

Axes: B batch, T tokens, V vocab, D embed, C tokens of a chunk.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.core.errors import UserError
from tinylm.core.mesh import constrain
from tinylm.inference.samplers import Filters, Sampler, draw, penalize
from tinylm.model.layers import MASKED_LOGIT
from tinylm.model.transformer import Cache, Transformer

# Lengths above it are rounded up to eighths of the power of two below them.
_LONG = 1 << 13
# The most tokens that one call to the device decodes.
_CHUNK_TOKENS = 128


class Writing(NamedTuple):
    """Where the rows of a batch stand, on the device."""

    cache: Cache
    logits_BV: jax.Array  # of the next token
    position_B: jax.Array  # of the next token in its text
    slot: jax.Array  # of the next token in the cache
    done_B: jax.Array  # whether the text has ended
    seen_BV: jax.Array  # whether a text has a token already; [B, 0] where that doesn't matter


class Ids(NamedTuple):
    """What the decoder must know of the tokenizer."""

    end: int  # ends a text
    more_ends: tuple[int, ...]  # end it too, and are written as `end`
    num_known: int  # ids from here on are never drawn


class Decoder:
    """Decodes with one model's graph; compiled programs are kept for the parameters of any step."""

    def __init__(
        self,
        graph: nnx.GraphDef,
        context: int,
        end_id: int,
        num_ids: int,
        more_ends: Sequence[int] = (),
    ):
        """Compile nothing yet.

        Args:
          graph: of the model; parameters come with each call.
          context: the longest sequence of tokens that the model reads.
          end_id: ends a text.
          num_ids: ids from here on are never drawn.
          more_ends: ids that end a text of a model that came from elsewhere. One that the model
            draws is written as `end_id`, for readers to have one end to look for.
        """
        self._context = context
        self._ids = Ids(end_id, tuple(more_ends), num_ids)
        self._prefill: Callable = jax.jit(
            functools.partial(_prefill, graph), static_argnames=("num_slots", "penalizes")
        )
        self._decode: Callable = jax.jit(
            functools.partial(_decode_chunk, graph, self._ids),
            static_argnames=("candidates", "scored"),
            donate_argnames="writing",
        )

    def stream(
        self,
        params: dict,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampler: Sampler,
        seed: int = 0,
        chunk_tokens: int = _CHUNK_TOKENS,
        scored: bool = False,
        ends: Callable[[int, list[int]], bool] | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield what follows each prompt, a chunk at a time.

        What a row draws depends on its place in the batch; past the end of the context, where all
        rows are read again together, also on the longest of them.

        Args:
          params: of the model.
          prompts: ids; each must be non-empty and shorter than the context.
          max_tokens: the most tokens that a row gets.
          sampler: how to draw.
          seed: of the draws.
          chunk_tokens: the most tokens of a chunk.
          scored: whether log-probabilities are wanted.
          ends: asked after each chunk as `ends(row, ids of the row so far)`; true ends the row.

        Yields:
          ids [B, C], which after the end of a row are the end id, and their log-probabilities in
          nats [B, C] if `scored`: those of the model, before sampler and penalty.

        Raises:
          UserError: as `check_prompts` does.
        """
        check_prompts(prompts, self._context)
        texts = [list(prompt) for prompt in prompts]
        written: list[list[int]] = [[] for _ in prompts]
        num_written = 0
        num_reads = 0
        done_B = np.zeros(len(texts), bool)
        while num_written < max_tokens and not np.all(done_B):
            if num_reads > 0:
                texts = [text[-self._context // 2 :] for text in texts]
            num_reads += 1
            room = self._context - max(len(text) for text in texts)
            room = min(room, max_tokens - num_written)
            writing = self._read(params, texts, done_B, room, sampler)
            while room > 0 and not np.all(done_B):
                count = min(room, chunk_tokens, _CHUNK_TOKENS)
                writing, ids_BC, scores_BC, device_done_B = self._decode(
                    params,
                    writing=writing,
                    seeds=(seed, num_reads),
                    count=count,
                    candidates=sampler.candidates,
                    filters=sampler.filters,
                    penalty=float(sampler.repetition_penalty),
                    scored=scored,
                )
                chunk_BC = np.asarray(ids_BC)[:, :count]
                done_B = np.array(device_done_B)
                for row, ids in enumerate(chunk_BC.tolist()):
                    texts[row].extend(ids)
                    written[row].extend(ids)
                    if ends and not done_B[row] and ends(row, written[row]):
                        done_B[row] = True
                        writing = writing._replace(done_B=done_B.copy())
                room -= count
                num_written += count
                yield chunk_BC, np.asarray(scores_BC)[:, :count]

    def write(
        self,
        params: dict,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampler: Sampler,
        seed: int = 0,
    ) -> list[list[int]]:
        """Return the ids that follow each prompt, up to its end; arguments as `stream` has them."""
        stream = self.stream(params, prompts, max_tokens=max_tokens, sampler=sampler, seed=seed)
        chunks = [ids_BC for ids_BC, _ in stream]
        if not chunks:
            return [[] for _ in prompts]
        rows = np.concatenate(chunks, axis=1).tolist()
        return [before_end(row, self._ids.end) for row in rows]

    def _read(
        self,
        params: dict,
        texts: list[list[int]],
        done_B: np.ndarray,
        room: int,
        sampler: Sampler,
    ) -> Writing:
        """Read texts, padded on the left, into a cache with room for `room` more tokens."""
        lengths_B = np.array([len(text) for text in texts], np.int32)
        tokens_BT = np.full((len(texts), _bucket(max(lengths_B))), self._ids.end, np.int32)
        for row, text in zip(tokens_BT, texts, strict=True):
            row[len(row) - len(text) :] = text
        num_slots = _bucket(tokens_BT.shape[1] + room)
        return self._prefill(
            params, tokens_BT, lengths_B, done_B, num_slots=num_slots, penalizes=sampler.penalizes
        )


def _prefill(
    graph: nnx.GraphDef,
    params: dict,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    done_B: jax.Array,
    *,
    num_slots: int,
    penalizes: bool,
) -> Writing:
    """Read prompts that are padded on the left, each `length_B` tokens long."""
    model: Transformer = nnx.merge(graph, params)
    num_tokens = tokens_BT.shape[1]
    padding_B1 = (num_tokens - length_B)[:, None]
    positions_BT = jnp.arange(num_tokens) - padding_B1
    x_BTD, cache = model.prefill(tokens_BT, positions_BT, num_slots)
    logits_BV = model.logits(x_BTD[:, -1:])[:, 0]
    # Which tokens a text has matters to the repetition penalty alone.
    penalized_ids_V = jnp.arange(logits_BV.shape[1] if penalizes else 0)
    is_token_BTV = tokens_BT[..., None] == penalized_ids_V
    seen_BV = jnp.any(is_token_BTV & (positions_BT >= 0)[..., None], axis=1)
    return Writing(cache, logits_BV, length_B, jnp.int32(num_tokens), done_B, seen_BV)


def _decode_chunk(
    graph: nnx.GraphDef,
    known: Ids,
    params: dict,
    *,
    writing: Writing,
    seeds: tuple[jax.Array, jax.Array],
    count: jax.Array,
    candidates: int,
    filters: Filters,
    penalty: jax.Array,
    scored: bool,
) -> tuple[Writing, jax.Array, jax.Array, jax.Array]:
    """Decode up to `count` tokens a row, fewer where all rows end before.

    Returns:
      The rows after it, ids_BC, scores_BC (0 where not `scored`), done_B. The last three are whole
      on every device, so that each process can read them.
    """
    model: Transformer = nnx.merge(graph, params)
    blocks = model.unstacked_blocks()
    batch_size, vocab = writing.logits_BV.shape
    uniform_CB = _uniform_numbers(seeds, writing.position_B)

    def decode_one(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        t, writing, ids_BC, scores_BC = carry
        is_known_V = jnp.arange(vocab) < known.num_known
        logits_BV = jnp.where(is_known_V, writing.logits_BV, MASKED_LOGIT)
        wanted_BV = logits_BV
        if writing.seen_BV.shape[1]:
            wanted_BV = penalize(logits_BV, writing.seen_BV, penalty)
        drawn_B = draw(uniform_CB[t], wanted_BV, candidates, filters)
        drawn_B = jnp.where(writing.done_B, known.end, drawn_B)
        id_B = drawn_B
        for other_end in known.more_ends:
            id_B = jnp.where(drawn_B == other_end, known.end, id_B)
        if scored:
            log_p_BV = jax.nn.log_softmax(logits_BV)
            score_B = jnp.take_along_axis(log_p_BV, drawn_B[:, None], axis=1)[:, 0]
            scores_BC = scores_BC.at[:, t].set(score_B)
        x_BD, cache = model.decode(id_B, writing.position_B, writing.slot, writing.cache, blocks)
        is_id_BV = id_B[:, None] == jnp.arange(writing.seen_BV.shape[1])
        writing = Writing(
            cache=cache,
            logits_BV=model.logits(x_BD[:, None])[:, 0],
            position_B=writing.position_B + 1,
            slot=writing.slot + 1,
            done_B=writing.done_B | (id_B == known.end),
            seen_BV=writing.seen_BV | is_id_BV,
        )
        return t + 1, writing, ids_BC.at[:, t].set(id_B), scores_BC

    def goes_on(carry: tuple[Any, ...]) -> jax.Array:
        t, writing, _, _ = carry
        return (t < count) & ~jnp.all(writing.done_B)

    ids_BC = jnp.full((batch_size, _CHUNK_TOKENS), known.end, jnp.int32)
    scores_BC = jnp.zeros(ids_BC.shape, jnp.float32)
    start = (0, writing, ids_BC, scores_BC)
    _, writing, ids_BC, scores_BC = jax.lax.while_loop(goes_on, decode_one, start)
    ids_BC = constrain(ids_BC, None, None)
    scores_BC = constrain(scores_BC, None, None)
    return writing, ids_BC, scores_BC, constrain(writing.done_B, None)


def _uniform_numbers(seeds: tuple[jax.Array, jax.Array], position_B: jax.Array) -> jax.Array:
    """Return a number in [0, 1) for each token of a chunk and row, [C, B].

    It depends on the seeds, the row and the position in the text, so not on how the tokens are cut
    into chunks. All are drawn ahead: XLA on CPU makes a loop of its own for each random key.
    """
    seed, num_reads = seeds
    key = jax.random.fold_in(jax.random.key(seed), num_reads)
    rows_B = jnp.arange(len(position_B))
    row_keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, rows_B)
    fold_in_B = jax.vmap(jax.random.fold_in)
    keys_CB = jax.vmap(lambda t: fold_in_B(row_keys_B, position_B + t))(jnp.arange(_CHUNK_TOKENS))
    return jax.vmap(jax.vmap(jax.random.uniform))(keys_CB)


def check_prompts(prompts: Sequence[Sequence[int]], context: int) -> None:
    """Raise UserError unless each prompt is non-empty and shorter than the context."""
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(
                f"a prompt of {len(prompt)} tokens must be shorter than the context ({context}); "
                "give its end alone."
            )


def before_end(ids: list[int], end_id: int) -> list[int]:
    """Return what stands before the first end id."""
    return ids[: ids.index(end_id)] if end_id in ids else ids


def _bucket(length: int) -> int:
    """Round up to a power of two, at least 16; from 2^13 on, to an eighth of one.

    Of long texts the cache would otherwise be up to twice as large as it has to be.
    """
    power = max(16, 1 << (int(length) - 1).bit_length())
    if power <= _LONG:
        return power
    step = power // 16
    return -(-length // step) * step
