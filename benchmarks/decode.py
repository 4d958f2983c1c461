"""Compare decoding speed with `transformers` and llama2.c; gpu.py has `rate_alone`, without either.

Weights, prompt and sampling are the same, and they take turns on one machine.

python benchmarks/decode.py    (needs the `parity` extra)
python benchmarks/decode.py --run=llama2.c/run --model=stories260K.bin --tokenizer=tok512.bin

Each row gives tokens per second as the median of `--pairs` turns, and the median of the ratios turn
by turn. `transformers` decodes with its cache, eager attention, in float32, as many threads as it
likes; llama2.c's program (built with -Ofast) is told the same number of tokens and prints its own
rate.
"""

import functools
import pathlib
import re
import statistics
import subprocess
import tempfile
import time

import jax
import numpy as np
from absl import app, flags

from tinylm.config import Config
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.inference.decode import Decoder
from tinylm.inference.samplers import Sampler
from tinylm.model.transformer import abstract_transformer
from tinylm.train.state import make_blueprint

FLAGS = flags.FLAGS
flags.DEFINE_integer("pairs", 5, "turns of each")
flags.DEFINE_integer("tokens", 200, "tokens to write after a prompt of 8")
flags.DEFINE_string("run", None, "llama2.c's program, instead of transformers")
flags.DEFINE_string("model", None, "with --run: stories260K.bin")
flags.DEFINE_string("tokenizer", None, "with --run: tok512.bin")

SIZES = {
    "4 layers of 128, 65 tokens": (4, 128, 4, 65),
    "6 layers of 384, 50,257 tokens": (6, 384, 6, 50257),
}


def in_turns(name, rows, ours, theirs):
    """Print the rates of both, in tokens per second over all rows."""
    ours(), theirs()  # compile, warm up
    rates = [(ours(), theirs()) for _ in range(FLAGS.pairs)]
    mine, other = (statistics.median(column) for column in zip(*rates, strict=True))
    ratio = statistics.median(a / b for a, b in rates)
    print(
        f"{name:32} {rows:3} rows: {mine:8,.0f} against {other:8,.0f} tokens/s, {ratio:5.2f} times",
        flush=True,
    )


def timed(call, rows):
    """Return tokens per second of a call that writes as many as the flags say."""
    start = time.perf_counter()
    call()
    return rows * FLAGS.tokens / (time.perf_counter() - start)


def write(decoder, params, prompts, sampler):
    """Go on with prompts as far as the flags say."""
    list(decoder.stream(params, prompts, max_tokens=FLAGS.tokens, sampler=sampler))


def rate_alone(config: Config, rows: int, num_tokens: int, turns: int = 3) -> float:
    """Return tokens per second over all rows of a resolved config with random weights.

    The median of some turns after one that compiles, at temperature 0.8 from the 50 most probable.
    """
    mesh = make_mesh(config.mesh)
    model = config.model
    end_id = model.vocab_size - 1
    decoder = Decoder(abstract_transformer(model)[0], model.context, end_id, model.vocab_size)
    prompts = np.random.default_rng(0).integers(0, end_id, (rows, 8)).tolist()
    rates = []
    with jax.set_mesh(mesh):
        params = make_blueprint(config, mesh).init(0).params
        for _ in range(1 + turns):
            start = time.perf_counter()
            stream = decoder.stream(
                params, prompts, max_tokens=num_tokens, sampler=Sampler(0.8, top_k=50)
            )
            num_columns = sum(ids.shape[1] for ids, _ in stream)
            rates.append(rows * num_columns / (time.perf_counter() - start))
    return statistics.median(rates[1:])


def write_with_transformers(model, prompt):
    """Do the same with a model of theirs, at the same sampling."""
    import torch

    ids = torch.from_numpy(prompt)
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=0.8,
            top_k=50,
            max_new_tokens=FLAGS.tokens,
            min_new_tokens=FLAGS.tokens,
            pad_token_id=0,
        )


def against_transformers():
    """Compare GPT-2 shapes with random weights, drawing at temperature 0.8 from the 50 most
    probable.
    """
    import transformers

    from tinylm.interop import weights
    from tinylm.interop.hf_model import read_model

    mesh = make_mesh(MeshConfig(data=1))
    for name, (num_layers, width, heads, vocab) in SIZES.items():
        config = transformers.GPT2Config(
            n_layer=num_layers,
            n_embd=width,
            n_head=heads,
            vocab_size=vocab,
            n_positions=256,
            bos_token_id=None,
            eos_token_id=None,
        )
        theirs = transformers.GPT2LMHeadModel(config).eval()
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            read = read_model(pathlib.Path(folder))
            params = weights.import_params(read.tensors, read.family, read.model, mesh, False)
        decoder = Decoder(abstract_transformer(read.model)[0], 256, vocab, vocab)
        for rows in (1, 16):
            prompt = np.random.default_rng(0).integers(0, 65, (rows, 8))
            ours = functools.partial(
                write, decoder, params, prompt.tolist(), Sampler(0.8, top_k=50)
            )
            reference = functools.partial(write_with_transformers, theirs, prompt)
            in_turns(
                name,
                rows,
                functools.partial(timed, ours, rows),
                functools.partial(timed, reference, rows),
            )


def against_llama2c():
    """Compare greedy text of stories260K: llama2.c writes one text, we one and sixteen."""
    from tinylm.interop import models

    imported = models.import_llama2c(FLAGS.model, FLAGS.tokenizer, MeshConfig(data=1))
    end = imported.tokenizer.eot_id
    decoder = Decoder(
        abstract_transformer(imported.model)[0],
        imported.model.context,
        end,
        imported.model.vocab_size,
    )

    def theirs():
        command = [
            FLAGS.run,
            FLAGS.model,
            "-z",
            FLAGS.tokenizer,
            "-t",
            "0",
            "-n",
            str(FLAGS.tokens),
        ]
        report = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stderr
        return float(re.search(r"tok/s: ([\d.]+)", report)[1])

    for rows in (1, 16):
        prompts = [[end]] * rows
        ours = functools.partial(write, decoder, imported.params, prompts, Sampler(0.0))
        in_turns("stories260K", rows, functools.partial(timed, ours, rows), theirs)


if __name__ == "__main__":
    app.run(lambda _: against_llama2c() if FLAGS.run else against_transformers())
