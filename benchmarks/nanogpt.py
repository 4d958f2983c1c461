"""Compare the train step with nanoGPT's: the same shapes and batch sizes, float32, AdamW.

They take turns on one machine.

git clone https://github.com/karpathy/nanoGPT
python benchmarks/nanogpt.py --checkout=nanoGPT [--python=PYTHON_THAT_HAS_TORCH] [--size=small]

Prints milliseconds a step as medians of `--pairs` turns, and the median of nanoGPT's time over ours
turn by turn, with float32 and with bfloat16 products; nanoGPT as it is and with `torch.compile`, in
float32. `small` is nanoGPT's setting for CPUs, `medium` its 10 M model with batches for a CPU.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
from absl import app, flags

from tinylm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.tools.bench import Workload

FLAGS = flags.FLAGS
flags.DEFINE_string("checkout", "nanoGPT", "folder of nanoGPT's repository")
flags.DEFINE_string("python", sys.executable, "a Python that has torch")
flags.DEFINE_integer("pairs", 5, "turns of each")
flags.DEFINE_list("size", ["small", "medium"], "which sizes")

# layers, heads, width, context, rows, steps of a turn, steps of a dispatch
SIZES = {"small": (4, 4, 128, 64, 12, 20, 10), "medium": (6, 6, 384, 256, 8, 2, 2)}


class Theirs:
    """nanoGPT in a process of its own, which makes steps when it is told to."""

    def __init__(self, python: str, job: dict[str, Any]):
        """Start it.

        Args:
          python: that has torch.
          job: what nanogpt_child.py reads: checkout, shape, rows, compiled, device.
        """
        child = pathlib.Path(__file__).with_name("nanogpt_child.py")
        self.process = subprocess.Popen(
            [python, str(child), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def secs(self, steps: int) -> float:
        """Return the seconds of some steps."""
        return self.answer(str(steps))

    def peak_bytes(self) -> int:
        """Return the most memory of a GPU that it has had."""
        return int(self.answer("memory"))

    def answer(self, request: str) -> float:
        """Ask the process for a number."""
        self.process.stdin.write(f"{request}\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("answer "):
            assert line, "nanoGPT's process ended"
        return float(line.split()[1])


def nanogpt_of(size: tuple, compiled: bool) -> Theirs:
    """Return nanoGPT of a size on the CPU."""
    num_layers, num_heads, width, context, rows, _, _ = size
    shape = {
        "n_layer": num_layers,
        "n_head": num_heads,
        "n_embd": width,
        "block_size": context,
        "vocab_size": 65,
        "dropout": 0.0,
        "bias": False,
    }
    job = {
        "checkout": FLAGS.checkout,
        "shape": shape,
        "rows": rows,
        "compiled": compiled,
        "device": "cpu",
    }
    return Theirs(FLAGS.python, job)


class Ours:
    """The trainer's step at the same shape."""

    def __init__(self, size: tuple, dtype: str):
        num_layers, num_heads, width, context, rows, _, count = size
        config = Config(
            data=DataConfig(seq_len=context, batch_size=rows),
            model=ModelConfig(
                embed_dim=width,
                num_layers=num_layers,
                num_heads=num_heads,
                norm="layernorm",
                position="learned",
                mlp="gelu",
                unroll=0,
                compute_dtype=dtype,
            ),
            optimizer=OptimizerConfig(beta2=0.99),
            train=TrainConfig(steps_per_dispatch=count),
        )
        config = config.resolve(65)
        self.work = Workload(config, make_mesh(MeshConfig(data=1)))
        self.state = self.work.blueprint.init(0)

    def secs(self, steps: int) -> float:
        """Return the seconds of some steps."""
        start = time.perf_counter()
        for _ in range(steps // self.work.count):
            self.state, metrics = self.work.run(self.state, self.work.place())
        jax.block_until_ready(metrics)
        return time.perf_counter() - start


def compare(name: str) -> None:
    """Print one size's figures."""
    size, ours = SIZES[name], ("float32", "bfloat16")
    theirs = {"plain": nanogpt_of(size, False), "compiled": nanogpt_of(size, True)}
    sides = {dtype: Ours(size, dtype) for dtype in ours} | theirs
    steps = size[5]
    for side in sides.values():
        side.secs(steps), side.secs(steps)  # compile, warm up
    turns = [
        {key: 1e3 * side.secs(steps) / steps for key, side in sides.items()}
        for _ in range(FLAGS.pairs)
    ]
    for key in sides:
        ratios = (
            f"{statistics.median(turn[key] / turn[dtype] for turn in turns):.2f} of {dtype}"
            for dtype in ours
        )
        shown = ", ".join(f"{turn[key]:.1f}" for turn in turns)
        median = statistics.median(turn[key] for turn in turns)
        print(
            f"{name:8} {key:10} {median:8.1f} ms a step ({shown}); {', '.join(ratios)}", flush=True
        )
    for side in theirs.values():
        side.process.kill()


def main(_) -> None:
    """Compare."""
    for name in FLAGS.size:
        compare(name)


if __name__ == "__main__":
    app.run(main)
