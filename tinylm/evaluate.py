"""Score a run on its validation split or any text: loss, perplexity, bits per byte, answers.

python -m tinylm.evaluate --workdir=runs/tales --step=best
python -m tinylm.evaluate --workdir=runs/tales --source="text:PATH/*.txt"
python -m tinylm.evaluate --workdir=runs/gpt2 --source=jsonl:PATH/x.jsonl --data=text_field=story
python -m tinylm.evaluate --workdir=runs/addition --exact_match
python -m tinylm.evaluate --workdir=runs/tales --stories

Scores are those of the whole split, which a training with eval.max_batches doesn't read.
"""

import ast
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from absl.flags import FlagValues

from tinylm import cli
from tinylm.core import text
from tinylm.core.errors import UserError
from tinylm.data.config import DataConfig

_NUM_STORIES = 64
_FEWEST_STORIES = 8


def score(flags: FlagValues) -> None:
    """Evaluate the checkpoint that the flags name."""
    import jax

    from tinylm.core.distributed import is_main
    from tinylm.inference.config import check_pattern
    from tinylm.run.open_run import open_run

    if flags.stories and flags.exact_match:
        raise UserError("--stories and --exact_match are two measures; ask for one at a time.")
    check_pattern("--answer_pattern", flags.answer_pattern or "")
    run = open_run(flags.workdir, flags.step)
    with jax.set_mesh(run.mesh):
        if flags.stories and is_imported(run) and not flags.source:
            result = score_stories(run, None, "")
        elif flags.stories:
            result = score_stories(run, *open_text(run, flags))
        else:
            result = score_text(run, flags)
    if is_main():
        print(json.dumps(result) if flags.json else text_of(result))


def score_text(run: Any, flags: FlagValues) -> dict[str, Any]:
    """Return the loss over the text that the flags name and, if they ask for it, the share of exact
    answers.
    """
    from tinylm.core.settings import from_dict
    from tinylm.inference.evaluation import evaluate, make_eval_step
    from tinylm.train.config import Config

    config = from_dict(Config, run.config)
    data, source = open_text(run, flags)
    nats, tokens = evaluate(
        make_eval_step(run.graph),
        run.params,
        data.valid,
        run.mesh,
        rows=config.micro_batch_rows,
        micro_batches=config.train.accumulation_steps,
        max_batches=flags.max_batches,
    )
    if not tokens and flags.max_batches:
        raise UserError(
            f"the first {flags.max_batches} batches hold no target token; set --max_batches "
            "higher, or 0."
        )
    if not tokens:
        raise UserError(
            "nothing that is scored is a target token; check --source, data.valid_source and "
            "data.loss_on."
        )
    loss = nats / tokens
    bytes_per_token = data.valid_bytes_per_token(flags.max_batches * config.data.batch_size)
    result: dict[str, Any] = {
        "source": source,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) / bytes_per_token if bytes_per_token else None,
        "tokens": int(tokens),
    }
    if data.loss_on == "answer":
        result["loss_on"] = "answer"
    floor = data.floor_nats_per_token
    if floor is not None and not flags.max_batches:
        result["floor"] = floor
    if flags.exact_match:
        result |= score_answers(run, data, flags)
    return result | {"step": run.step}


def score_answers(run: Any, data: Any, flags: FlagValues) -> dict[str, Any]:
    """Return the share of validation pairs that the model answers exactly, and how many there
    are.
    """
    from tinylm.inference.decode import Decoder
    from tinylm.inference.evaluation import check_pairs, exact_match, final_answers

    tokenizer, context = run.tokenizer, run.model_config.context
    batch_size = run.config["data"]["batch_size"]
    pattern = run.config["eval"].get("answer_pattern", "")
    if flags.answer_pattern is not None:
        pattern = flags.answer_pattern
    pairs = data.answers(flags.max_batches * batch_size)
    check_pairs(pairs, context, tokenizer, pattern, ("--exact_match", "--answer_pattern"))
    share = exact_match(
        Decoder(run.graph, context, tokenizer.eot_id, tokenizer.vocab_size, run.end_ids),
        run.params,
        pairs,
        start_id=run.start_id,
        rows=batch_size,
        is_right=final_answers(tokenizer, pattern) if pattern else None,
    )
    return {
        "exact_match": share,
        "pairs": len(pairs),
        **({"answer_pattern": pattern} if pattern else {}),
    }


def score_stories(run: Any, data: Any, source: str, max_tokens: int = 250) -> dict[str, Any]:
    """Return measures of how the model goes on with beginnings, and of how the texts that have them
    go on.

    Args:
        run: An opened run.
        data: The text with the beginnings that are the prompts, as `open_text` returns it. None,
            as for an imported model: eight of TinyStories, eight times each.
        source: Its name.
        max_tokens: How much is written and compared.
    """
    from tinylm.inference.samplers import Sampler
    from tinylm.inference.stories import PROMPTS, beginnings, measure
    from tinylm.inference.text import write_texts

    tokenizer = run.tokenizer
    if data is None:
        found = list(PROMPTS) * (_NUM_STORIES // len(PROMPTS))
        origin = f"{len(PROMPTS)} beginnings of TinyStories, for this run has no text of its own"
    else:
        longest = run.model_config.context // 2
        every = beginnings(data.valid_texts(2 * _NUM_STORIES))
        found = [one for one in every if len(tokenizer.encode(one.prompt)) < longest][:_NUM_STORIES]
        origin = f"{len(found)} beginnings of {source}"
        if len(found) < _FEWEST_STORIES:
            raise UserError(
                f"--stories needs {_FEWEST_STORIES} texts of a few sentences, the first of them "
                f"shorter than half the context, to take beginnings from; {source} has "
                f"{len(found)}; give others with --source."
            )
    names = [one.names for one in found]
    texts = write_texts(
        run, [one.prompt for one in found], max_tokens=max_tokens, sampler=Sampler(0.8)
    )
    ended = [len(text.ids) < max_tokens for text in texts]
    result: dict[str, Any] = {
        "prompts": origin,
        **measure([text.completion for text in texts], names, ended),
    }
    if data is not None:
        # The texts themselves, as far as the model may write.
        rests = [tokenizer.encode(one.rest) for one in found]
        cut = [tokenizer.decode(ids[:max_tokens]) for ids in rests]
        result["corpus"] = measure(cut, names, [len(ids) < max_tokens for ids in rests])
    return result | {"step": run.step}


def open_text(run: Any, flags: FlagValues) -> tuple[Any, str]:
    """Return the text to score a run on, as `open_validation` does, and its name."""
    from tinylm.core.distributed import is_main
    from tinylm.core.settings import from_dict
    from tinylm.data import open_data, open_validation

    config = with_settings(from_dict(DataConfig, run.config["data"]), flags.data or [])
    if config.seq_len > run.model_config.context:
        raise UserError(
            f"--data=seq_len={config.seq_len} must be at most the context "
            f"({run.model_config.context})."
        )
    if flags.source:
        data = open_validation(config, flags.source, run.tokenizer, is_writer=is_main())
        return data, flags.source
    if is_imported(run):
        raise UserError(
            f"--workdir={flags.workdir} holds an imported model, which has no text of its own to "
            "be scored on; give one: --source=text:FILE (or any data.source)."
        )
    try:
        # The tokenizer of a run that took it over is in its own folder, and may be nowhere else
        # now.
        took_over = run.config["train"].get("init_model", False)
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


def is_imported(run: Any) -> bool:
    """Say whether a run is a model that came from elsewhere."""
    return "imported_from" in run.folder.read_config()


def text_of(result: dict[str, Any]) -> str:
    """Return scores as aligned lines; measures of stories with those of the corpus next to them."""
    corpus = result.get("corpus", {})
    widths = (16, -12, -12)
    lines = []
    for name, value in result.items():
        if name in corpus:
            if name == next(iter(corpus)):
                lines.append(text.columns(("", "the model", "the texts"), widths))
            lines.append(text.columns((name, shown(value), shown(corpus[name])), widths))
        elif name != "corpus":
            lines.append(text.columns((name, shown(value)), (16, 0)))
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Return a value as text."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def define_flags(flags: FlagValues) -> None:
    """Add the flags of this command."""
    cli.define_step(flags)
    absl_flags.DEFINE_string(
        "source",
        "",
        "text to score instead of the run's own: any data.source, such as text:FILE",
        flag_values=flags,
    )
    absl_flags.DEFINE_multi_string(
        "data",
        None,
        (
            "KEY=VALUE: another value of a setting of the run's data, such as text_field=story or "
            "seq_len=1024"
        ),
        flag_values=flags,
    )
    absl_flags.DEFINE_integer(
        "max_batches",
        0,
        "batches to score, as in training (0: the whole split)",
        lower_bound=0,
        flag_values=flags,
    )
    absl_flags.DEFINE_bool(
        "exact_match",
        False,
        "answer validation pairs greedily, and count those that are met exactly",
        flag_values=flags,
    )
    absl_flags.DEFINE_string(
        "answer_pattern",
        None,
        "regular expression of the final answer (default: eval.answer_pattern)",
        flag_values=flags,
    )
    absl_flags.DEFINE_bool(
        "stories",
        False,
        "measure repetition, variety, names and ends of what the model makes up",
        flag_values=flags,
    )
    cli.define_workdir(flags)
    cli.define_json(flags)


COMMAND = cli.Command(__doc__, score, define_flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: this process's); return its exit code."""
    return cli.run(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
