"""Score a run on its validation split: loss, perplexity, bits per byte. Or on stories that it makes up.

python -m tinylm.evaluate --workdir=runs/tales --step=best
python -m tinylm.evaluate --workdir=runs/tales --stories
"""

import json
import math
from typing import Any

from absl import flags

from tinylm import cli

FLAGS = flags.FLAGS


def main() -> None:
    """Evaluate the checkpoint that the flags name."""
    import jax

    from tinylm.core.distributed import is_main
    from tinylm.run.open_run import open_run

    run = open_run(FLAGS.workdir, FLAGS.step)
    with jax.set_mesh(run.mesh):
        result = (score_stories if FLAGS.stories else score_split)(run) | {"step": run.step}
    if not is_main():
        return
    if FLAGS.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:<14}{value:.4f}" if isinstance(value, float) else f"{name:<14}{value}"
                        for name, value in result.items()))  # fmt: skip


def score_split(run: Any) -> dict[str, Any]:
    """Return the loss over the validation split."""
    from tinylm.core.distributed import is_main
    from tinylm.core.errors import UserError
    from tinylm.core.settings import from_dict
    from tinylm.data import open_data
    from tinylm.data.config import DataConfig
    from tinylm.inference.evaluation import evaluate, make_eval_step
    from tinylm.train.config import Config

    config, imported = from_dict(DataConfig, run.config["data"]), "imported_from" in run.folder.read_config()
    own = run.tokenizer if imported else None  # where its file was once named may be nothing now
    data = open_data(config, seed=run.config["seed"], is_writer=is_main(), tokenizer=own)
    if data.valid is None:
        raise UserError("the run has no validation split; set data.valid_fraction or data.valid_source.")
    if data.tokenizer.fingerprint != run.tokenizer.fingerprint:
        raise UserError("the run's data now makes another tokenizer than the run learned with; restore the text.")
    rows = from_dict(Config, run.config).micro_batch_rows
    nats, tokens = evaluate(make_eval_step(run.graph), run.params, data.valid, rows, run.mesh, FLAGS.max_batches)
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) / data.valid_bytes_per_token,
        "tokens": int(tokens),
    }


def score_stories(run: Any, max_tokens: int = 250) -> dict[str, Any]:
    """Return measures of how the model goes on with fixed prompts, eight times each."""
    from tinylm.inference.samplers import Sampler
    from tinylm.inference.stories import PROMPTS, measure
    from tinylm.inference.writing import write_texts

    prompts, names = zip(*PROMPTS * 8, strict=True)
    texts = write_texts(run, prompts, max_tokens=max_tokens, sampler=Sampler(0.8))
    return measure([text.completion for text in texts], names, [len(text.ids) < max_tokens for text in texts])


if __name__ == "__main__":
    flags.DEFINE_string("step", "best", "checkpoint: best, latest or a step")
    flags.DEFINE_integer("max_batches", 0, "batches to score (0: the whole split)", lower_bound=0)
    flags.DEFINE_bool("stories", False, "measure repetition, variety, names and ends of stories instead")
    cli.define_workdir()
    cli.define_json()
    cli.run(main, __doc__)
