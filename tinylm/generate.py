"""Write text with a trained model: the prompt and what follows, up to the end of the text.

python -m tinylm.generate --workdir=runs/tales --prompt="Once upon a time" --temperature=0.8

A single text appears while it is written.
"""

import functools
import json

from absl import flags

from tinylm import cli
from tinylm.core.errors import UserError
from tinylm.inference.samplers import Sampler

FLAGS = flags.FLAGS


def main() -> None:
    """Write as the flags say; only text goes to stdout."""
    from tinylm.core.distributed import is_main
    from tinylm.inference.decode import check_prompts
    from tinylm.inference.writing import write_texts
    from tinylm.run.open_run import open_run

    sampler = Sampler(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, FLAGS.min_p, FLAGS.repetition_penalty)
    sampler.check(prefix="--")
    if "" in (FLAGS.stop or []):
        raise UserError("--stop must not be empty: every text would end before its first character.")
    prompts = [text for text in FLAGS.prompt or [""] for _ in range(FLAGS.num_samples)]
    run = open_run(FLAGS.workdir, FLAGS.step)
    show = functools.partial(print, end="", flush=True) if len(prompts) == 1 and is_main() and not FLAGS.json else None
    if show:
        check_prompts([[run.start_id, *run.tokenizer.encode(prompts[0])]], run.model_config.context)
        show(prompts[0])
    texts = write_texts(
        run, prompts, max_tokens=FLAGS.max_tokens, sampler=sampler, seed=FLAGS.seed, stop=FLAGS.stop or [],
        logprobs=FLAGS.json, show=show,
    )  # fmt: skip
    if FLAGS.json and is_main():
        scored = {"ids": [text.ids for text in texts], "logprobs": [text.logprobs for text in texts]}
        print(json.dumps({"texts": [text.prompt + text.completion for text in texts], "step": run.step, **scored}))
    elif is_main():
        print("" if show else "\n\n".join(text.prompt + text.completion for text in texts))


if __name__ == "__main__":
    default = Sampler()
    flags.DEFINE_multi_string("prompt", None, "text to go on from (may be given several times; none: a new text)")
    flags.DEFINE_integer("max_tokens", 200, "most tokens to write after a prompt", lower_bound=1)
    flags.DEFINE_float("temperature", 0.8, "0: always the most probable token; 1: the model's own distribution")
    flags.DEFINE_integer("top_k", default.top_k, "draw from the k most probable tokens (0: all)")
    flags.DEFINE_float("top_p", default.top_p, "draw from the fewest tokens that have this probability together")
    flags.DEFINE_float("min_p", default.min_p, "draw from tokens at least this part as probable as the first")
    flags.DEFINE_float("repetition_penalty", default.repetition_penalty, "above 1: tokens of the text count less")
    flags.DEFINE_multi_string("stop", None, "end a text before this string (may be given several times)")
    flags.DEFINE_integer("num_samples", 1, "texts for each prompt", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "seed of the draws", lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_string("step", "best", "checkpoint: best, latest or a step")
    cli.define_workdir()
    cli.define_json()
    cli.run(main, __doc__)
