"""The scores of a trained model on a text: loss, exact answers, and measures of made-up stories.

The text is the run's own validation split, or any that `data.source` can name. A score is that of
the whole split unless the number of batches is limited, which a training with `eval.max_batches`
does.
"""

import ast
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from tinylm.core.distributed import is_main
from tinylm.core.errors import UserError
from tinylm.core.settings import from_dict
from tinylm.data import Validation, open_data, open_validation
from tinylm.data.config import DataConfig
from tinylm.inference.config import check_pattern
from tinylm.inference.decode import Decoder
from tinylm.inference.evaluation import (
    check_pairs,
    evaluate,
    exact_match,
    final_answers,
    make_eval_step,
)
from tinylm.inference.samplers import Sampler
from tinylm.inference.stories import PROMPTS, beginnings, measure
from tinylm.inference.text import write_texts
from tinylm.run.open_run import Run, open_run
from tinylm.train.config import Config

_NUM_STORIES = 64
_FEWEST_STORIES = 8


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """What to score, and how.

    Attributes:
      source: the text, as `data.source` names it; "": the run's own validation split.
      settings: other values for settings of the run's data, each as KEY=VALUE.
      max_batches: how much of the text to score, in batches of the run (0: all).
      exact_match: whether validation pairs are answered, and right answers counted, too.
      answer_pattern: the regular expression of a final answer; None: `eval.answer_pattern`.
      stories: whether stories are made up and measured, instead of the loss.
    """

    source: str = ""
    settings: Sequence[str] = ()
    max_batches: int = 0
    exact_match: bool = False
    answer_pattern: str | None = None
    stories: bool = False


def score(workdir: str, step: str, request: ScoreRequest) -> dict[str, Any]:
    """Score a checkpoint of a run.

    Args:
      workdir: the run's folder.
      step: the checkpoint: best, latest or a number.
      request: what is asked for.

    Returns:
      The scores by name, for `evaluate --json`.

    Raises:
      UserError: where the request contradicts itself, the run or its text can't be read, or the
        text holds nothing to score.
    """
    if request.stories and request.exact_match:
        raise UserError("--stories and --exact_match are two measures; ask for one at a time.")
    check_pattern("--answer_pattern", request.answer_pattern or "")
    run = open_run(workdir, step)
    with jax.set_mesh(run.mesh):
        if not request.stories:
            return score_text(run, request)
        if _is_imported(run) and not request.source:
            return score_stories(run, None, "")
        data, name = _open_text(run, request)
        return score_stories(run, data, name)


def score_text(run: Run, request: ScoreRequest) -> dict[str, Any]:
    """Return the loss over the requested text and, where asked for, the share of exact answers."""
    config = from_dict(Config, run.config)
    data, name = _open_text(run, request)
    assert data.valid is not None, "a text without validation rows is refused as it is opened"
    nats, tokens = evaluate(
        make_eval_step(run.graph),
        run.params,
        data.valid,
        run.mesh,
        rows=config.micro_batch_rows,
        micro_batches=config.train.accumulation_steps,
        max_batches=request.max_batches,
    )
    if not tokens and request.max_batches:
        raise UserError(
            f"the first {request.max_batches} batches hold no target token; set --max_batches "
            "higher, or 0."
        )
    if not tokens:
        raise UserError(
            "nothing that is scored is a target token; check --source, data.valid_source and "
            "data.loss_on."
        )
    loss = nats / tokens
    bits_per_byte = None
    bytes_per_token = data.valid_bytes_per_token(request.max_batches * config.data.batch_size)
    if bytes_per_token:
        bits_per_byte = loss / math.log(2) / bytes_per_token
    found: dict[str, Any] = {
        "source": name,
        "loss": loss,
        # A larger power of e overflows.
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits_per_byte,
        "tokens": int(tokens),
    }
    if data.loss_on == "answer":
        found["loss_on"] = "answer"
    floor = data.floor_nats_per_token
    # The floor is that of the whole split.
    if floor is not None and not request.max_batches:
        found["floor"] = floor
    if request.exact_match:
        found |= score_answers(run, data, request)
    found["step"] = run.step
    return found


def score_answers(run: Run, data: Validation, request: ScoreRequest) -> dict[str, Any]:
    """Return the share of validation pairs that the model answers exactly, and how many there
    are.
    """
    tokenizer = run.tokenizer
    context = run.model_config.context
    batch_size = run.config["data"]["batch_size"]
    pattern = request.answer_pattern
    if pattern is None:
        pattern = run.config["eval"].get("answer_pattern", "")
    pairs = data.answers(request.max_batches * batch_size)
    check_pairs(pairs, context, tokenizer, pattern, ("--exact_match", "--answer_pattern"))
    share = exact_match(
        Decoder(run.graph, context, tokenizer.eot_id, tokenizer.vocab_size, run.end_ids),
        run.params,
        pairs,
        start_id=run.start_id,
        rows=batch_size,
        is_right=final_answers(tokenizer, pattern) if pattern else None,
    )
    found: dict[str, Any] = {"exact_match": share, "pairs": len(pairs)}
    if pattern:
        found["answer_pattern"] = pattern
    return found


def score_stories(
    run: Run, data: Validation | None, source: str, max_tokens: int = 250
) -> dict[str, Any]:
    """Return measures of how the model goes on from beginnings of texts, and of how the texts
    themselves go on from there.

    Args:
      run: an opened run.
      data: the texts whose beginnings are the prompts. None, as for an imported model: eight
        beginnings of TinyStories, eight times each.
      source: the name of the text.
      max_tokens: how much is written and compared.
    """
    tokenizer = run.tokenizer
    if data is None:
        found = list(PROMPTS) * (_NUM_STORIES // len(PROMPTS))
        origin = f"{len(PROMPTS)} beginnings of TinyStories, for this run has no text of its own"
    else:
        longest = run.model_config.context // 2
        every = beginnings(data.valid_texts(2 * _NUM_STORIES))
        short = [one for one in every if len(tokenizer.encode(one.prompt)) < longest]
        found = short[:_NUM_STORIES]
        origin = f"{len(found)} beginnings of {source}"
        if len(found) < _FEWEST_STORIES:
            raise UserError(
                f"--stories needs {_FEWEST_STORIES} texts of a few sentences, the first of them "
                f"shorter than half the context, to take beginnings from; {source} has "
                f"{len(found)}; give others with --source."
            )
    prompts = [one.prompt for one in found]
    names = [one.names for one in found]
    texts = write_texts(run, prompts, max_tokens=max_tokens, sampler=Sampler(0.8))
    completions = [text.completion for text in texts]
    ended = [len(text.ids) < max_tokens for text in texts]
    measured: dict[str, Any] = {"prompts": origin, **measure(completions, names, ended)}
    if data is not None:
        # The texts themselves, as far as the model may write.
        rests = [tokenizer.encode(one.rest) for one in found]
        cut = [tokenizer.decode(ids[:max_tokens]) for ids in rests]
        ended = [len(ids) < max_tokens for ids in rests]
        measured["corpus"] = measure(cut, names, ended)
    measured["step"] = run.step
    return measured


def _open_text(run: Run, request: ScoreRequest) -> tuple[Validation, str]:
    """Return the requested text, and its name."""
    config = with_settings(from_dict(DataConfig, run.config["data"]), request.settings)
    if config.seq_len > run.model_config.context:
        raise UserError(
            f"--data=seq_len={config.seq_len} must be at most the context "
            f"({run.model_config.context})."
        )
    if config.seq_len % run.model_config.loss_chunks:
        raise UserError(
            f"--data=seq_len={config.seq_len} must be divisible by the run's model.loss_chunks "
            f"({run.model_config.loss_chunks})."
        )
    if request.source:
        data = open_validation(config, request.source, run.tokenizer, is_writer=is_main())
        return data, request.source
    if _is_imported(run):
        raise UserError(
            f"--workdir={run.folder.path} holds an imported model, which has no text of its own to "
            "be scored on; give one: --source=text:FILE (or any data.source)."
        )
    # The tokenizer of a run that took it over is in its own folder, and may be nowhere else now.
    took_over = run.config["train"].get("init_model", False)
    try:
        own = open_data(
            config,
            seed=run.config["seed"],
            is_writer=is_main(),
            tokenizer=run.tokenizer if took_over else None,
        )
    except UserError as error:
        raise UserError(
            f"the run's own text can't be read: {error} Another one is scored with --source."
        ) from error
    if own.valid is None:
        raise UserError("the run has no validation split; give a text with --source=text:FILE.")
    if own.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise UserError(
            "the run's text now makes another tokenizer than the run learned with, so it has "
            "changed; restore it, or give a text with --source."
        )
    return own, f"{config.valid_source or config.source} (validation)"


def with_settings(config: DataConfig, lines: Sequence[str]) -> DataConfig:
    """Return a section with other values for some settings, each given as KEY=VALUE."""
    changed = config.editable_copy()
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    for line in lines:
        key, equals, text = line.partition("=")
        key = key.removeprefix("data.")
        if not equals:
            raise UserError(f"--data={line} must be KEY=VALUE, for example text_field=story.")
        value: Any = text
        if kinds.get(key, str) is not str:
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError) as error:
                raise UserError(
                    f"--data={line}: {text!r} is not a value that data.{key} can have."
                ) from error
        setattr(changed, key, value)
    return changed


def _is_imported(run: Run) -> bool:
    """Say whether a run is a model that came from elsewhere."""
    return "imported_from" in run.folder.read_config()
