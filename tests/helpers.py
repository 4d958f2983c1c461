"""Small models and batches that the tests share, and a way to run commands as a user would."""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylm.core.batch import BatchRows, HostBatch, batch_of_ids, stack_steps
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.model.config import ModelConfig
from tinylm.train.config import Config, OptimizerConfig, TrainConfig
from tinylm.train.state import make_blueprint
from tinylm.train.step import make_train_steps
from tinylm.view.plot import save

ROOT = pathlib.Path(__file__).resolve().parent.parent
MESHES = [(1, 1), (8, 1), (4, 2), (2, 4), (1, 8)]


# Flags of a run that trains in seconds, dropout on.
SMALL = [
    "--config=tales",
    "--config.data.source=tales:300",
    "--config.data.tokenizer=byte",
    "--config.data.packing=stream",
    "--config.data.seq_len=32",
    "--config.data.batch_size=8",
    "--config.model.embed_dim=32",
    "--config.model.num_layers=2",
    "--config.model.dropout=0.1",
    "--config.optimizer.name=adamw",
    "--config.optimizer.learning_rate=0.003",
    "--config.optimizer.warmup_steps=5",
    "--config.train.num_steps=40",
    "--config.train.steps_per_dispatch=4",
    "--config.train.log_every_steps=1",
    "--config.eval.every_steps=20",
    "--config.eval.max_batches=4",
    "--config.checkpoint.every_steps=10",
    "--config.sample.max_tokens=8",
    "--config.sample.prompts=('a',)",
]


def tiny_model(**changes) -> ModelConfig:
    """Return a resolved model of 65 tokens and a context of 16."""
    config = ModelConfig(**{"embed_dim": 32, "num_layers": 2, "num_heads": 4, **changes})
    config = config.resolve(65, 16)
    config.check()
    return config


def random_batch(seed: int, rows: int = 8, length: int = 16, micro: int = 1) -> HostBatch:
    """Return a host batch [micro, rows / micro, length] with a different number of targets in each
    row.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 65, (micro, rows // micro, length + 1)).astype(np.int32)
    weights = (np.arange(length) >= rng.integers(0, length // 2, (*ids.shape[:2], 1))).astype(
        np.float32
    )
    return batch_of_ids(ids, weights)


def packed_batch(seed: int, rows: int, length: int) -> HostBatch:
    """Return a host batch [1, rows, length] of rows that hold documents of any length."""
    rng = np.random.default_rng(seed)
    shape = (1, rows, length)
    begins = rng.random(shape) < 0.06
    begins[..., 0] = True
    segments = np.cumsum(begins, axis=-1).astype(np.int32)
    places = np.broadcast_to(np.arange(length), shape)
    positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=-1)
    ids = rng.integers(0, 65, (1, rows, length + 1)).astype(np.int32)
    return {
        "tokens": ids[..., :-1],
        "targets": ids[..., 1:],
        "weights": (rng.random(shape) < 0.8).astype(np.float32),
        "segments": segments,
        "positions": positions.astype(np.int32),
    }


def train(
    mesh_config: MeshConfig,
    model: ModelConfig,
    batches: list[HostBatch],
    *,
    group: int = 1,
    compiler_options: dict[str, bool] | None = None,
    **kwargs,
):
    """Train on host batches, `group` a dispatch; return (losses, gradient norms, final state) on
    the host.
    """
    optimizer = OptimizerConfig(**{"learning_rate": 1e-3, "warmup_steps": 2, **kwargs})
    config = Config(
        model=model, optimizer=optimizer, mesh=mesh_config, train=TrainConfig(num_steps=20)
    )
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        blueprint = make_blueprint(config, mesh)
        steps = make_train_steps(blueprint)
        if compiler_options:
            steps = jax.jit(steps, donate_argnums=0, compiler_options=compiler_options)
        state, losses, norms = blueprint.init(3), [], []
        for start in range(0, len(batches), group):
            part = batches[start : start + group]
            num_rows = part[0]["tokens"].shape[1]
            placed = BatchRows(mesh, num_rows).place(stack_steps(part))
            state, metrics = steps(state, placed, len(part), 7, len(batches))
            losses += np.asarray(metrics["loss"])[: len(part)].tolist()
            norms += np.asarray(metrics["grad_norm"])[: len(part)].tolist()
        return losses, norms, jax.tree.map(np.asarray, state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SmallState:
    """What Checkpoints needs of a TrainState."""

    step: jax.Array
    params: dict
    opt_state: dict
    guard: dict


def small_state(step: int) -> SmallState:
    """Return a state of a few numbers, among them the step."""
    params, opt_state = {"w": jnp.full(4, step, jnp.float32)}, {"m": jnp.ones(4)}
    return SmallState(jnp.int32(step), params, opt_state, {"best": jnp.float32(0)})


def call_command(module: str, *arguments: str) -> subprocess.CompletedProcess:
    """Call `main` of a command in this process, on its eight devices; return what it printed.

    For tests of what a command says and does; `run_command` is for those of a process of its own,
    which sees one device, and a shell's signals, locale and environment.
    """
    with (
        contextlib.redirect_stdout(io.StringIO()) as stdout,
        contextlib.redirect_stderr(io.StringIO()) as stderr,
        contextlib.chdir(ROOT),
    ):
        exit_code = importlib.import_module(module).main(arguments)
    return subprocess.CompletedProcess(
        [module, *arguments], exit_code, stdout.getvalue(), stderr.getvalue()
    )


def run_command(
    module: str, *arguments: str, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Run `python -m module` from the root of the tree; return the finished process."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def lines(workdir, split="train"):
    """Return {step: loss} of a run, the last line of a step counting."""
    found = {}
    for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["split"] == split:
            found[record["step"]] = record["loss"]
    return found


def session_folder(tmp_path_factory) -> pathlib.Path:
    """Return the temporary folder that all workers of a session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(folder: pathlib.Path, make: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Let one worker of a session make a folder while the others that need it wait; no test may
    change it.
    """
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        whole = folder.with_name(f"{folder.name}.whole")
        if not whole.exists():
            make(folder)
            whole.touch()
    return folder


def png_of(figure: Any) -> bytes:
    """Return the file that the product writes of a figure."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "figure.png")
        save(figure, path)
        return path.read_bytes()


def until(condition: Callable[[], bool], secs: float = 240) -> None:
    """Wait for a condition that comes sooner, however busy the machine is."""
    deadline = time.monotonic() + secs
    while not condition():
        assert time.monotonic() < deadline, f"did not come within {secs} s"
        time.sleep(0.05)


def finished(workdir, step: int) -> bool:
    """Say whether the checkpoint of a step is written to its end."""
    folder = pathlib.Path(workdir) / "checkpoints"
    return (folder / str(step) / "checksums").exists() and not (
        folder / f"{step}.unfinished"
    ).exists()


def state_digest(workdir, step: int) -> str:
    """Return a hash of every array of a checkpoint and of its path, whatever the mesh that wrote
    it.
    """
    import orbax.checkpoint as ocp

    digest = hashlib.sha256()
    for item in "params", "train":
        folder = (pathlib.Path(workdir) / "checkpoints" / str(step) / item).absolute()
        reader = ocp.PyTreeCheckpointer()
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
            reader.metadata(folder).item_metadata.tree,
        )
        tree = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            digest.update(
                jax.tree_util.keystr(path).encode()
                + str((leaf.dtype, leaf.shape)).encode()
                + leaf.tobytes()
            )
    return digest.hexdigest()
