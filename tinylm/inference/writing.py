"""Writing text for people: prompts as strings, stop strings, and a text that can be read while it is written."""

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
    """A prompt and what follows it, up to the end of the text, a stop string (left out) or the last token."""

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
    """Return what an opened run's model writes after each prompt; `show` gets the first text piece by piece.

    Raises UserError for a prompt that is too long or has characters that the tokenizer doesn't know.
    """
    tokenizer = run.tokenizer
    decoder = Decoder(run.graph, run.model_config.context, tokenizer.eot_id, tokenizer.vocab_size, run.end_ids)
    before = [tokenizer.encode(prompt) for prompt in prompts]
    rows: list[list[int]] = [[] for _ in prompts]
    scores: list[list[float]] = [[] for _ in prompts]
    held, shown = max(map(len, stop), default=1) - 1, 0

    def written(i: int, ids: list[int]) -> str:
        text = tokenizer.decode_after(before[i], ids)
        return text[: _cut(text, stop)]

    def ended(i: int, ids: list[int]) -> bool:
        return _cut(tokenizer.decode_after(before[i], ids), stop) is not None

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
            for row, score, new, values in zip(rows, scores, ids_BT.tolist(), scores_BT.tolist(), strict=True):
                if tokenizer.eot_id not in row:
                    row += new
                    score += values
            if show:
                text = written(0, rows[0])
                ready = text[: len(text) - held] if held else text
                if len(ready) > shown and not ready.endswith(_UNFINISHED):
                    show(ready[shown:])
                    shown = len(ready)
    texts = []
    for i, (row, score) in enumerate(zip(rows, scores, strict=True)):
        row = before_end(row, tokenizer.eot_id)
        texts.append(Text(prompts[i], written(i, row), row, score[: len(row)] if logprobs else []))
    if show:
        show(texts[0].completion[shown:])
    return texts


def _cut(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first stop string begins, if there is one."""
    return min((text.index(mark) for mark in stop if mark in text), default=None)
