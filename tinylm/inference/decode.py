"""Writing text with a KV cache: prefill the prompts at once, then decode token by token on the device.

Prompts of unequal length share a batch, padded on the left, so that all rows write the same slot of the cache: one
update in place. Lengths are rounded up to buckets, so that few programs are compiled whatever the prompts. A text
longer than the model's context goes on: when the cache is full, the last half of the context is read again as a prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.core.errors import UserError
from tinylm.core.mesh import constrain
from tinylm.inference.samplers import Sampler, draw, penalize
from tinylm.model.transformer import Cache, Transformer

_CHUNK_TOKENS = 128


class Writing(NamedTuple):
    """Where the rows of a batch stand, on the device."""

    cache: Cache
    logits_BV: jax.Array  # of the next token
    position_B: jax.Array  # of the next token in its text
    slot: jax.Array  # of the next token in the cache
    done_B: jax.Array
    seen_BV: jax.Array  # tokens that a text has, where they are penalized; else [B, 0]


class Decoder:
    """Decodes with one model's graph; compiled programs are kept for the parameters of any step."""

    def __init__(self, graph: nnx.GraphDef, context: int, end_id: int, num_ids: int, more_ends: Sequence[int] = ()):
        """Compile nothing yet; `end_id` ends a text, and ids from `num_ids` on are never drawn.

        A model that came from elsewhere may have `more_ends`; one that it draws is written as `end_id`, so that who
        reads ids has one end to look for.
        """
        self._context, self._end_id = context, end_id

        def prefill(params, tokens_BT, length_B, done_B, num_slots, penalizes):
            model: Transformer = nnx.merge(graph, params)
            num_tokens = tokens_BT.shape[1]
            positions_BT = jnp.arange(num_tokens) - (num_tokens - length_B)[:, None]
            x_BTD, cache = model.prefill(tokens_BT, positions_BT, num_slots)
            logits_BV = model.logits(x_BTD[:, -1:])[:, 0]
            ids_V = jnp.arange(logits_BV.shape[1] if penalizes else 0)
            seen_BV = jnp.any((tokens_BT[..., None] == ids_V) & (positions_BT >= 0)[..., None], axis=1)
            return Writing(cache, logits_BV, length_B, jnp.int32(num_tokens), done_B, seen_BV)

        def decode(params, writing, seeds, count, candidates, values, penalty, scored):
            model: Transformer = nnx.merge(graph, params)
            blocks = model.unstacked_blocks()
            batch_size, vocab = writing.logits_BV.shape
            key = jax.random.fold_in(jax.random.key(seeds[0]), seeds[1])
            fold_B = jax.vmap(jax.random.fold_in)
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch_size))
            keys_TB = jax.vmap(lambda t: fold_B(keys_B, writing.position_B + t))(jnp.arange(_CHUNK_TOKENS))
            uniform_TB = jax.vmap(jax.vmap(jax.random.uniform))(keys_TB)

            def one(carry):
                t, (cache, logits_BV, position_B, slot, done_B, seen_BV), ids_BT, scores_BT = carry
                known_BV = jnp.where(jnp.arange(vocab) < num_ids, logits_BV, -1e30)
                wanted_BV = penalize(known_BV, seen_BV, penalty) if seen_BV.shape[1] else known_BV
                drawn_B = jnp.where(done_B, end_id, draw(uniform_TB[t], wanted_BV, candidates, values))
                id_B = drawn_B
                for other_end in more_ends:
                    id_B = jnp.where(drawn_B == other_end, end_id, id_B)
                x_BD, cache = model.decode(id_B, position_B, slot, cache, blocks)
                if scored:
                    score_BV = jax.nn.log_softmax(known_BV)
                    scores_BT = scores_BT.at[:, t].set(jnp.take_along_axis(score_BV, drawn_B[:, None], axis=1)[:, 0])
                new = Writing(
                    cache, model.logits(x_BD[:, None])[:, 0], position_B + 1, slot + 1, done_B | (id_B == end_id),
                    seen_BV | (id_B[:, None] == jnp.arange(seen_BV.shape[1])),
                )  # fmt: skip
                return t + 1, new, ids_BT.at[:, t].set(id_B), scores_BT

            ids_BT = jnp.full((batch_size, _CHUNK_TOKENS), end_id, jnp.int32)
            start = (0, writing, ids_BT, jnp.zeros(ids_BT.shape, jnp.float32))
            _, writing, ids_BT, scores_BT = jax.lax.while_loop(
                lambda carry: (carry[0] < count) & ~jnp.all(carry[1].done_B), one, start
            )
            everywhere = [constrain(x, *[None] * x.ndim) for x in (ids_BT, scores_BT, writing.done_B)]
            return writing, *everywhere

        self._prefill: Callable = jax.jit(prefill, static_argnums=(4, 5))
        self._decode: Callable = jax.jit(decode, static_argnums=(4, 7), donate_argnums=1)

    def stream(
        self, params: dict, prompts: Sequence[Sequence[int]], *, max_tokens: int, sampler: Sampler, seed: int = 0,
        chunk_tokens: int = _CHUNK_TOKENS, scored: bool = False, ends: Callable[[int, list[int]], bool] | None = None,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
        """Yield chunks of the ids that follow each prompt and, if `scored`, their log-probabilities in nats, [B, n].

        After its end a row holds the end id. A row also ends where `ends(row, its ids so far)`, asked after each chunk
        of at most `chunk_tokens`, is true. Scores are those of the model, before sampler and penalty. What a row draws
        depends on its place in the batch; past the end of the context, where all rows are read again together, also on
        the longest of them. Raises UserError as `check_prompts` does.
        """
        check_prompts(prompts, self._context)
        texts, written, restarts = [list(prompt) for prompt in prompts], 0, 0
        new: list[list[int]] = [[] for _ in prompts]
        done_B = np.zeros(len(texts), bool)
        while written < max_tokens and not np.all(done_B):
            texts = [text[-self._context // 2 :] if restarts else text for text in texts]
            restarts += 1
            room = min(self._context - max(map(len, texts)), max_tokens - written)
            writing = self._read(params, texts, done_B, room, sampler)
            while room > 0 and not np.all(done_B):
                count = min(room, chunk_tokens, _CHUNK_TOKENS)
                writing, ids_BT, scores_BT, done_B = self._decode(
                    params, writing, (seed, restarts), count, sampler.candidates, sampler.values,
                    float(sampler.repetition_penalty), scored,
                )  # fmt: skip
                chunk, done_B = np.asarray(ids_BT)[:, :count], np.array(done_B)
                for row, ids in enumerate(chunk):
                    texts[row].extend(ids.tolist())
                    new[row].extend(ids.tolist())
                    if ends and not done_B[row] and ends(row, new[row]):
                        done_B[row] = True
                        writing = writing._replace(done_B=done_B.copy())
                room, written = room - count, written + count
                yield chunk, np.asarray(scores_BT)[:, :count]

    def _read(self, params: dict, texts: list[list[int]], done_B: np.ndarray, room: int, sampler: Sampler) -> Writing:
        """Prefill prompts, padded on the left, into a cache with `room` for as many tokens."""
        tokens_BT = np.full((len(texts), _bucket(max(map(len, texts)))), self._end_id, np.int32)
        for row, text in zip(tokens_BT, texts, strict=True):
            row[len(row) - len(text) :] = text
        lengths = np.array([len(text) for text in texts], np.int32)
        num_slots = _bucket(tokens_BT.shape[1] + room)
        return self._prefill(params, tokens_BT, lengths, done_B, num_slots, sampler.penalizes)

    def write(
        self, params: dict, prompts: Sequence[Sequence[int]], *, max_tokens: int, sampler: Sampler, seed: int = 0
    ) -> list[list[int]]:
        """Return the ids that follow each prompt, up to its end."""
        chunks = [ids for ids, _ in self.stream(params, prompts, max_tokens=max_tokens, sampler=sampler, seed=seed)]
        rows = np.concatenate(chunks, axis=1) if chunks else np.zeros((len(prompts), 0), np.int32)
        return [before_end(row.tolist(), self._end_id) for row in rows]


def check_prompts(prompts: Sequence[Sequence[int]], context: int) -> None:
    """Raise UserError unless each prompt is non-empty and shorter than the context."""
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(
                f"a prompt of {len(prompt)} tokens must be shorter than the context ({context}); give its end alone."
            )


def before_end(ids: list[int], end_id: int) -> list[int]:
    """Return what stands before the first end id."""
    return ids[: ids.index(end_id)] if end_id in ids else ids


def _bucket(length: int) -> int:
    """Round up to a power of two, at least 16."""
    return max(16, 1 << (length - 1).bit_length())
