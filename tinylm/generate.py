"""Write text with a trained model: the prompt and what follows, up to the end of the text.

python -m tinylm.generate --workdir=runs/tales --prompt="Once upon a time" --temperature=0.8
"""

import json

from absl import flags

from tinylm import cli

FLAGS = flags.FLAGS


def main() -> None:
    """Write as the flags say; only text goes to stdout."""
    import jax

    from tinylm.core.distributed import is_main
    from tinylm.inference.config import check_sampling
    from tinylm.inference.decode import Decoder
    from tinylm.inference.samplers import Sampler
    from tinylm.run.open_run import open_run

    check_sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p, prefix="--")
    run = open_run(FLAGS.workdir, FLAGS.step)
    tokenizer = run.tokenizer
    prompts = [text for text in FLAGS.prompt or [""] for _ in range(FLAGS.num_samples)]
    ids = [[tokenizer.eot_id, *tokenizer.encode(text)] for text in prompts]
    decoder = Decoder(run.graph, run.model_config.context, tokenizer.eot_id, tokenizer.vocab_size)
    sampler = Sampler(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)
    with jax.set_mesh(run.mesh):
        rows = decoder.write(run.params, ids, max_tokens=FLAGS.max_tokens, sampler=sampler, seed=FLAGS.seed)
    texts = [prompt + tokenizer.decode(row) for prompt, row in zip(prompts, rows, strict=True)]
    if not is_main():
        return
    if FLAGS.json:
        print(json.dumps({"texts": texts, "step": run.step}))
    else:
        print("\n\n".join(texts))


if __name__ == "__main__":
    flags.DEFINE_multi_string("prompt", None, "text to go on from (may be given several times; none: a new text)")
    flags.DEFINE_integer("max_tokens", 200, "most tokens to write after a prompt", lower_bound=1)
    flags.DEFINE_float("temperature", 0.8, "0: always the most probable token; 1: the model's own distribution")
    flags.DEFINE_integer("top_k", 0, "draw from the k most probable tokens (0: all)")
    flags.DEFINE_float("top_p", 1.0, "draw from the fewest tokens that have this probability together")
    flags.DEFINE_integer("num_samples", 1, "texts for each prompt", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "seed of the draws", lower_bound=0, upper_bound=2**31 - 1)
    flags.DEFINE_string("step", "best", "checkpoint: best, latest or a step")
    cli.define_workdir()
    cli.define_json()
    cli.run(main, __doc__)
