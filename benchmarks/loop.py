"""Compare the trainer's loop with the bare jitted step.

The step is called in a Python loop on one batch that lies on the device.

python benchmarks/loop.py [--pairs=5] [--dispatch=1,10] [--width=32]

The loop reads its batches, logs every 100 steps and keeps its account; it neither evaluates nor
saves. Prints milliseconds a step as medians of the turns, and the median of the ratios turn by
turn.
"""

import json
import pathlib
import statistics
import tempfile
import time

import jax
from absl import app, flags

from tinylm.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
    WritersConfig,
)
from tinylm.core import log
from tinylm.core.mesh import make_mesh
from tinylm.tools.bench import Workload
from tinylm.train.start import start_run

FLAGS = flags.FLAGS
flags.DEFINE_integer("pairs", 5, "turns of each")
flags.DEFINE_list("dispatch", ["1", "10"], "train.steps_per_dispatch")
flags.DEFINE_integer("width", 32, "model.embed_dim")
STEPS = 600


def config_of(dispatch: int, store: str) -> Config:
    """Return a config of two layers."""
    return Config(
        data=DataConfig(
            source="tales", tokenizer="byte", seq_len=64, batch_size=16, store_dir=store
        ),
        model=ModelConfig(embed_dim=FLAGS.width, num_layers=2, num_heads=2, unroll=0),
        train=TrainConfig(num_steps=STEPS, steps_per_dispatch=dispatch, log_every_steps=100),
        eval=EvalConfig(every_steps=0),
        checkpoint=CheckpointConfig(every_steps=0),
        sample=SampleConfig(max_tokens=0),
        writers=WritersConfig(plot=False),
    )


def loop_ms(dispatch: int, store: str) -> float:
    """Return milliseconds a step between the first and the last line of a run's log."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = start_run(config_of(dispatch, store), folder)
        trainer.run()
        logged = (pathlib.Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [line for line in map(json.loads, logged) if line.get("split") == "train"]
    return (
        1e3
        * (lines[-1]["unix_secs"] - lines[0]["unix_secs"])
        / (lines[-1]["step"] - lines[0]["step"])
    )


def bare_ms(work: Workload) -> float:
    """Return milliseconds a step of the step alone."""
    state, placed = work.blueprint.init(0), work.place()
    state, metrics = jax.block_until_ready(work.run(state, placed))
    begun = time.perf_counter()
    for _ in range(STEPS // work.count):
        state, metrics = work.run(state, placed)
    jax.block_until_ready(metrics)
    return 1e3 * (time.perf_counter() - begun) / STEPS


def main(_) -> None:
    """Compare."""
    log.start(True)
    with tempfile.TemporaryDirectory() as store:
        for dispatch in map(int, FLAGS.dispatch):
            loop_ms(dispatch, store)  # prepares the data, fills the compile cache
            config = config_of(dispatch, store)
            config = config.resolve(257)
            work = Workload(config, make_mesh(config.mesh))
            turns = [(bare_ms(work), loop_ms(dispatch, store)) for _ in range(FLAGS.pairs)]
            bare, loop = map(statistics.median, zip(*turns, strict=True))
            ratio = statistics.median(ours / theirs for theirs, ours in turns)
            print(
                (
                    f"{dispatch:3} a dispatch: bare {bare:.2f} ms a step, loop {loop:.2f}, "
                    f"{ratio:.3f} times"
                ),
                flush=True,
            )


if __name__ == "__main__":
    app.run(main)
