"""Write text with a trained model: the prompt and what follows, up to the end of the text.

python -m tinylm.generate --workdir=runs/tales --prompt="Once upon a time" --temperature=0.8
python -m tinylm.generate --workdir=runs/tales --prompt_file=beginning.txt --num_samples=3

A single text appears while it is written; several are numbered.
"""

import functools
import json
import pathlib

from absl import flags

from tinylm import cli
from tinylm.core.errors import UserError
from tinylm.inference.samplers import Sampler

FLAGS = flags.FLAGS


def main() -> None:
    """Write as the flags say; only text goes to stdout."""
    from tinylm.core.distributed import is_main
    from tinylm.inference.decode import check_prompts
    from tinylm.inference.writing import numbered, write_texts
    from tinylm.run.open_run import open_run

    sampler = Sampler(
        FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.min_p, FLAGS.repetition_penalty
    )
    sampler.check(prefix="--")
    if "" in (FLAGS.stop or []):
        raise UserError(
            "--stop must not be empty: every text would end before its first character."
        )
    given = [*(FLAGS.prompt or []), *map(read_prompt, FLAGS.prompt_file or [])]
    prompts = [text for text in given or [""] for _ in range(FLAGS.num_samples)]
    run = open_run(FLAGS.workdir, FLAGS.step)
    show = None
    if len(prompts) == 1 and is_main() and not FLAGS.json:
        check_prompts([[run.start_id, *run.tokenizer.encode(prompts[0])]], run.model_config.context)
        show = functools.partial(print, end="", flush=True)
        show(prompts[0])
    texts = write_texts(
        run,
        prompts,
        max_tokens=FLAGS.max_tokens,
        sampler=sampler,
        seed=FLAGS.seed,
        stop=FLAGS.stop or [],
        logprobs=FLAGS.json,
        show=show,
    )
    if not is_main():
        return
    whole = [text.prompt + text.completion for text in texts]
    if FLAGS.json:
        ids = [text.ids for text in texts]
        logprobs = [text.logprobs for text in texts]
        print(json.dumps({"texts": whole, "step": run.step, "ids": ids, "logprobs": logprobs}))
    else:
        print("" if show else numbered(whole))


def read_prompt(path: str) -> str:
    """Return the text of a file without the line break at its end, which editors add."""
    try:
        text = pathlib.Path(path).expanduser().read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompt_file={path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt_file={path} is not UTF-8 (byte {error.start}); save it as UTF-8."
        ) from error
    return text.removesuffix("\n").removesuffix("\r")


if __name__ == "__main__":
    default = Sampler()
    flags.DEFINE_multi_string(
        "prompt", None, "text to go on from (may be given several times; none: a new text)"
    )
    flags.DEFINE_multi_string(
        "prompt_file", None, "a file with such a text (its last line break is left out)"
    )
    flags.DEFINE_integer("max_tokens", 200, "most tokens to write after a prompt", lower_bound=1)
    flags.DEFINE_float(
        "temperature", 0.8, "0: always the most probable token; 1: the model's own distribution"
    )
    flags.DEFINE_integer("top_k", default.top_k, "draw from the k most probable tokens (0: all)")
    flags.DEFINE_float(
        "top_p", default.top_p, "draw from the fewest tokens that have this probability together"
    )
    flags.DEFINE_float(
        "min_p", default.min_p, "draw from tokens at least this part as probable as the first"
    )
    flags.DEFINE_float(
        "repetition_penalty", default.repetition_penalty, "above 1: tokens of the text count less"
    )
    flags.DEFINE_multi_string(
        "stop", None, "end a text before this string (may be given several times)"
    )
    flags.DEFINE_integer("num_samples", 1, "texts for each prompt", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "seed of the draws", lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_string("step", "best", "checkpoint: best, latest or a step")
    cli.define_workdir()
    cli.define_json()
    cli.run(main, __doc__)
