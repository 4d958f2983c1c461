"""Writing text for people: prompts as strings, stop strings, and a text that can be read while it
is written.

The model is asked for a few tokens at a time where someone reads along or a stop string may come. A
text ends where the first stop string begins, so the last tokens that the model wrote may not be
part of it. While it is written, what later tokens could still change is held back: the first bytes
of a character, and the beginning of a stop string.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from tinylm.inference.decode import Decoder, before_end
from tinylm.inference.samplers import Sampler

_UNFINISHED = "�"  # what the first bytes of a character decode to
_SHOWN_TOKENS = 8


@dataclasses.dataclass
class Text:
    """A prompt and what follows it, up to the end of the text, a stop string (left out) or the last
    token.

    `ids` are the fewest that spell the completion. The last of them may spell the beginning of the
    stop string too.
    """

    prompt: str
    completion: str
    ids: list[int]
    logprobs: list[float]  # of `ids`, nats, where they were asked for


def write_texts(
    run: Any,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    sampler: Sampler,
    seed: int = 0,
    stop: Sequence[str] = (),
    logprobs: bool = False,
    show: Callable[[str], Any] | None = None,
) -> list[Text]:
    """Return what an opened run's model writes after each prompt; `show` gets the first text piece
    by piece.

    Raises UserError for a prompt that is too long or has characters that the tokenizer doesn't
    know.
    """
    tokenizer = run.tokenizer
    decoder = Decoder(
        run.graph, run.model_config.context, tokenizer.eot_id, tokenizer.vocab_size, run.end_ids
    )
    before = [tokenizer.encode(prompt) for prompt in prompts]
    rows: list[list[int]] = [[] for _ in prompts]
    scores: list[list[float]] = [[] for _ in prompts]
    num_shown = 0

    def ended(row: int, ids: list[int]) -> bool:
        return _find_stop(tokenizer.decode_after(before[row], ids), stop) is not None

    with jax.set_mesh(run.mesh):
        chunks = decoder.stream(
            run.params,
            [[run.start_id, *ids] for ids in before],
            max_tokens=max_tokens,
            sampler=sampler,
            seed=seed,
            chunk_tokens=_SHOWN_TOKENS if show or stop else max_tokens,
            scored=logprobs,
            ends=ended if stop else None,
        )
        for ids_BT, scores_BT in chunks:
            for row, score, new, values in zip(
                rows, scores, ids_BT.tolist(), scores_BT.tolist(), strict=True
            ):
                if tokenizer.eot_id not in row:
                    row += new
                    score += values
            if show:
                ready = settled(tokenizer.decode_after(before[0], rows[0]), stop)
                show(ready[num_shown:])
                num_shown = max(num_shown, len(ready))
    texts = []
    for prompt, prompt_ids, row, score in zip(prompts, before, rows, scores, strict=True):
        ids = before_end(row, tokenizer.eot_id)
        completion = tokenizer.decode_after(prompt_ids, ids)
        found = _find_stop(completion, stop)
        if found is not None:
            completion = completion[:found]
            ids = ids[: _num_spelling(tokenizer, prompt_ids, ids, completion)]
        texts.append(Text(prompt, completion, ids, score[: len(ids)] if logprobs else []))
    if show:
        show(texts[0].completion[num_shown:])
    return texts


def numbered(texts: Sequence[str]) -> str:
    """Return texts for a terminal, one below the other; where there are several, each under its
    number.
    """
    if len(texts) == 1:
        return texts[0]
    parts = [
        f"--- sample {number} of {len(texts)} ---\n{text}" for number, text in enumerate(texts, 1)
    ]
    return "\n\n".join(parts)


def settled(text: str, stop: Sequence[str]) -> str:
    """Return as much of an unfinished text as no later token can change, nor take back as part of a
    stop string.
    """
    found = _find_stop(text, stop)
    if found is not None:
        return text[:found]
    text = text.rstrip(_UNFINISHED)
    held = 0
    for mark in stop:
        for length in range(min(len(mark) - 1, len(text)), held, -1):
            if text.endswith(mark[:length]):
                held = length
                break
    return text[: len(text) - held]


def _find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first stop string begins, if there is one."""
    return min((text.index(mark) for mark in stop if mark in text), default=None)


def _num_spelling(
    tokenizer: Any, before: Sequence[int], ids: Sequence[int], completion: str
) -> int:
    """Return how many of the `ids` that follow `before` it takes to spell all of `completion`."""

    def spelled(count: int) -> bool:
        return tokenizer.decode_after(before, ids[:count]).startswith(completion)

    return bisect.bisect_left(range(len(ids)), True, key=spelled)
