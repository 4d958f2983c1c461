"""Writing text with a KV cache: prefill the prompts at once, then decode token by token on the device.

Prompts of unequal length share a batch, padded on the right. Lengths are rounded up to buckets, so that few programs
are compiled whatever the prompts. A text longer than the model's context goes on: when the cache is full, the last
half of the context is read again as a prompt.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.core.errors import UserError
from tinylm.core.mesh import constrain
from tinylm.inference.samplers import Sampler, draw
from tinylm.model.transformer import Transformer

_CHUNK_TOKENS = 32


class Decoder:
    """Decodes with one model's graph; compiled programs are kept for the parameters of any step."""

    def __init__(self, graph: nnx.GraphDef, context: int, end_id: int, num_ids: int):
        """Compile nothing yet; `end_id` ends a text, and ids from `num_ids` on are never drawn."""
        self._context, self._end_id = context, end_id

        def prefill(params, tokens_BT, length_B, num_slots):
            model: Transformer = nnx.merge(graph, params)
            batch_size, num_tokens = tokens_BT.shape
            positions_BT = jnp.broadcast_to(jnp.arange(num_tokens), (batch_size, num_tokens))
            x_BTD, cache = model.decode(tokens_BT, positions_BT, model.init_cache(batch_size, num_slots))
            last_B1D = jnp.take_along_axis(x_BTD, (length_B - 1)[:, None, None], axis=1)
            return model.logits(last_B1D)[:, 0], cache

        def decode(params, cache, logits_BV, length_B, done_B, seeds, count, kind, values):
            model: Transformer = nnx.merge(graph, params)
            key = jax.random.fold_in(jax.random.key(seeds[0]), seeds[1])
            keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits_BV.shape[0]))

            def one(i, carry):
                cache, logits_BV, length_B, done_B, written_BT = carry
                draw_keys_B = jax.vmap(jax.random.fold_in)(keys_B, length_B)
                known_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < num_ids, logits_BV, -1e30)
                token_B = jnp.where(done_B, end_id, draw(draw_keys_B, known_BV, kind, values))
                x_B1D, cache = model.decode(token_B[:, None], length_B[:, None], cache)
                done_B = done_B | (token_B == end_id)
                return cache, model.logits(x_B1D)[:, 0], length_B + 1, done_B, written_BT.at[:, i].set(token_B)

            written_BT = jnp.full((logits_BV.shape[0], _CHUNK_TOKENS), end_id, jnp.int32)
            cache, logits_BV, length_B, done_B, written_BT = jax.lax.fori_loop(
                0, count, one, (cache, logits_BV, length_B, done_B, written_BT)
            )
            return cache, logits_BV, length_B, constrain(done_B, None), constrain(written_BT, None, None)

        self._prefill: Callable = jax.jit(prefill, static_argnums=3)
        self._decode: Callable = jax.jit(decode, static_argnums=7, donate_argnums=1)

    def stream(
        self, params: dict, prompts: Sequence[Sequence[int]], *, max_tokens: int, sampler: Sampler, seed: int = 0
    ) -> Iterator[np.ndarray]:
        """Yield chunks [B, n] of the ids that follow each prompt; after its end a row holds the end id.

        What a row draws depends on its place in the batch; past the end of the context, where all rows are read
        again together, also on the longest of them. Raises UserError as `check_prompts` does.
        """
        check_prompts(prompts, self._context)
        texts = [list(prompt) for prompt in prompts]
        done_B, written, restarts = np.zeros(len(texts), bool), 0, 0
        while written < max_tokens and not np.all(done_B):
            texts = [text[-self._context // 2 :] if restarts else text for text in texts]
            restarts += 1
            longest = max(map(len, texts))
            num_slots = min(self._context, _bucket(longest + max_tokens - written))
            logits_BV, cache, length_B = self._read(params, texts, num_slots)
            room = min(num_slots - longest, max_tokens - written)
            while room > 0 and not np.all(done_B):
                count = min(room, _CHUNK_TOKENS)
                cache, logits_BV, length_B, done_B, chunk_BT = self._decode(
                    params, cache, logits_BV, length_B, done_B, (seed, restarts), count, sampler.kind, sampler.values
                )
                chunk = np.asarray(chunk_BT)[:, :count]
                for text, ids in zip(texts, chunk, strict=True):
                    text.extend(ids.tolist())
                room, written = room - count, written + count
                yield chunk

    def _read(self, params: dict, texts: list[list[int]], num_slots: int):
        """Prefill padded prompts; return logits after each, the cache, and the lengths."""
        longest = max(map(len, texts))
        tokens_BT = np.full((len(texts), min(_bucket(longest), num_slots)), self._end_id, np.int32)
        for row, text in zip(tokens_BT, texts, strict=True):
            row[: len(text)] = text
        length_B = np.array([len(text) for text in texts], np.int32)
        logits_BV, cache = self._prefill(params, tokens_BT, length_B, num_slots)
        return logits_BV, cache, length_B

    def write(
        self, params: dict, prompts: Sequence[Sequence[int]], *, max_tokens: int, sampler: Sampler, seed: int = 0
    ) -> list[list[int]]:
        """Return the ids that follow each prompt, up to its end."""
        chunks = list(self.stream(params, prompts, max_tokens=max_tokens, sampler=sampler, seed=seed))
        rows = np.concatenate(chunks, axis=1) if chunks else np.zeros((len(prompts), 0), np.int32)
        return [before_end(row.tolist(), self._end_id) for row in rows]


def check_prompts(prompts: Sequence[Sequence[int]], context: int) -> None:
    """Raise UserError unless each prompt is non-empty and shorter than the context."""
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(f"a prompt of {len(prompt)} tokens must be shorter than the context ({context}).")


def before_end(ids: list[int], end_id: int) -> list[int]:
    """Return what stands before the first end id."""
    return ids[: ids.index(end_id)] if end_id in ids else ids


def _bucket(length: int) -> int:
    """Round up to a power of two, at least 16."""
    return max(16, 1 << (length - 1).bit_length())
