"""Measure how long a save stops the step loop, and how much memory it needs.

python benchmarks/save.py [CONFIG]

Takes a few steps of a 110 M-parameter model on this machine's CPU with a small batch (a larger one
makes steps longer, not saves), saves while it goes on, and prints one JSON object.
"""

import json
import pathlib
import resource
import sys
import tempfile
import threading
import time

import jax
import numpy as np

from tinylm.config import load_config
from tinylm.core.batch import BatchRows
from tinylm.core.mesh import make_mesh
from tinylm.run.checkpoint import CheckpointConfig, Checkpoints
from tinylm.run.folder import RunFolder
from tinylm.train.state import make_blueprint
from tinylm.train.step import make_train_steps

ROWS, LENGTH, STEPS = 2, 128, 4


def main() -> None:
    """Measure and print."""
    config = load_config(sys.argv[1] if len(sys.argv) > 1 else "llama:110m")
    config = config.resolve(config.model.vocab_size or 32000)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    ids = np.random.default_rng(0).integers(
        0, config.model.vocab_size, (1, 1, ROWS, LENGTH), np.int32
    )
    batch = {"tokens": ids, "targets": ids, "weights": np.ones(ids.shape, np.float32)}
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
        blueprint = make_blueprint(config, mesh)
        step = make_train_steps(blueprint)
        placed = BatchRows(mesh, ROWS).place(batch)
        state = blueprint.init(0)

        def steps(state):
            began = time.monotonic()
            for _ in range(STEPS):
                state, metrics = step(state, placed, 1, 0, STEPS)
                np.asarray(metrics["loss"])
            return state, (time.monotonic() - began) / STEPS

        state, _ = steps(state)  # compiles
        most, done = [0], threading.Event()
        watcher = threading.Thread(target=watch, args=(most, done))
        watcher.start()
        state, alone = steps(state)
        before = most[0]
        checkpoints = Checkpoints(RunFolder(folder).checkpoints, CheckpointConfig())
        began = time.monotonic()
        checkpoints.save(state, None)
        blocked = time.monotonic() - began
        state, secs_during_save = steps(state)
        checkpoints.close()
        whole = time.monotonic() - began
        done.set()
        watcher.join()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        written = sum(
            path.stat().st_size for path in pathlib.Path(folder).rglob("*") if path.is_file()
        )
    print(
        json.dumps(
            {
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
                "step_secs": round(alone, 3),
                "step_secs_during_save": round(secs_during_save, 3),
                "blocked_secs": round(blocked, 3),
                "save_secs": round(whole, 2),
                "blocked_of_100_steps": round(blocked / (blocked + 100 * alone), 5),
                "state_bytes": size,
                "written_bytes": written,
                "extra_memory_in_states": round((most[0] - before) / size, 2),
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def memory() -> int:
    """Return the bytes of memory that this process holds."""
    return (
        int(pathlib.Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        * resource.getpagesize()
    )


def watch(most: list[int], done: threading.Event) -> None:
    """Note the most memory held."""
    while not done.wait(0.02):
        most[0] = max(most[0], memory())


if __name__ == "__main__":
    main()
