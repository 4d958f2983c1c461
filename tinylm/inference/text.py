"""Text for people: prompts and stop strings, and a text that can be read while it is written.

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

# What the first bytes of a character decode to.
_UNFINISHED = "�"
# Of a chunk, where each is looked at.
_SHOWN_TOKENS = 8


@dataclasses.dataclass
class Text:
    """A prompt and what follows it.

    Attributes:
      prompt: as it was given.
      completion: up to the end of the text, a stop string (left out) or the last token.
      ids: the fewest that spell the completion. The last of them may spell the beginning of the
        stop string too.
      logprobs: of `ids`, nats, where they were asked for.
    """

    prompt: str
    completion: str
    ids: list[int]
    logprobs: list[float]


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
    """Return what an opened run's model writes after each prompt.

    Args:
      run: as `open_run` returns it.
      prompts: to go on from.
      max_tokens: the most that follow a prompt.
      sampler: how to draw.
      seed: of the draws.
      stop: strings before which a text ends.
      logprobs: whether they are wanted.
      show: called with the first text, piece by piece while it is written.

    Raises:
      UserError: a prompt is too long, or has characters that the tokenizer doesn't know.
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
        for ids_BC, scores_BC in chunks:
            for number, row in enumerate(rows):
                if tokenizer.eot_id not in row:
                    row.extend(ids_BC[number].tolist())
                    scores[number].extend(scores_BC[number].tolist())
            if show:
                ready = settled(tokenizer.decode_after(before[0], rows[0]), stop)
                show(ready[num_shown:])
                num_shown = max(num_shown, len(ready))
    texts = []
    for number, (prompt, prompt_ids) in enumerate(zip(prompts, before, strict=True)):
        ids = before_end(rows[number], tokenizer.eot_id)
        completion = tokenizer.decode_after(prompt_ids, ids)
        found = _find_stop(completion, stop)
        if found is not None:
            completion = completion[:found]
            ids = ids[: _num_spelling(tokenizer, prompt_ids, ids, completion)]
        scores_of_ids = scores[number][: len(ids)] if logprobs else []
        texts.append(Text(prompt, completion, ids, scores_of_ids))
    if show:
        show(texts[0].completion[num_shown:])
    return texts


def numbered(texts: Sequence[str]) -> str:
    """Return texts for a terminal, one below the other; several, each under its number."""
    if len(texts) == 1:
        return texts[0]
    parts = []
    for number, text in enumerate(texts, 1):
        parts.append(f"--- sample {number} of {len(texts)} ---\n{text}")
    return "\n\n".join(parts)


def settled(text: str, stop: Sequence[str]) -> str:
    """Return as much of an unfinished text as no later token can change.

    The beginning of a stop string at its end might have to be taken back, so it is left out, too.
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
