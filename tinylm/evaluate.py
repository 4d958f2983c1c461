"""Score a run on its validation split or any text: loss, perplexity, bits per byte, answers.

python -m tinylm.evaluate --workdir=runs/tales --step=best
python -m tinylm.evaluate --workdir=runs/tales --source="text:PATH/*.txt"
python -m tinylm.evaluate --workdir=runs/gpt2 --source=jsonl:PATH/x.jsonl --data=text_field=story
python -m tinylm.evaluate --workdir=runs/addition --exact_match
python -m tinylm.evaluate --workdir=runs/tales --stories

Scores are those of the whole split, which a training with eval.max_batches doesn't read.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags as absl_flags
from absl.flags import FlagValues

from tinylm import cli
from tinylm.core import text


def evaluate(flags: FlagValues) -> None:
    """Score the checkpoint that the flags name, and print its scores."""
    from tinylm.core.distributed import is_main
    from tinylm.tools.score import ScoreRequest, score

    request = ScoreRequest(
        source=flags.source,
        settings=flags.data or (),
        max_batches=flags.max_batches,
        exact_match=flags.exact_match,
        answer_pattern=flags.answer_pattern,
        stories=flags.stories,
    )
    scores = score(flags.workdir, flags.step, request)
    if is_main():
        print(json.dumps(scores) if flags.json else text_of(scores))


def text_of(scores: dict[str, Any]) -> str:
    """Return scores as aligned lines; measures of stories with those of the corpus next to them."""
    corpus = scores.get("corpus", {})
    widths = (16, -12, -12)
    lines = []
    for name, value in scores.items():
        if name == "corpus":
            continue
        if name not in corpus:
            lines.append(text.columns((name, shown(value)), (16, 0)))
            continue
        if name == next(iter(corpus)):
            lines.append(text.columns(("", "the model", "the texts"), widths))
        cells = (name, shown(value), shown(corpus[name]))
        lines.append(text.columns(cells, widths))
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


COMMAND = cli.Command(__doc__, evaluate, define_flags)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: this process's); return its exit code."""
    return cli.run(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
