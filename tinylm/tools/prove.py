"""The proofs that a user can run on a config: another mesh takes the same step, a killed run has
the same losses, any number of processes reads the same batches. Each returns a table; none touches
a run of the user's.

The killed run is real processes of the training command, ended by SIGKILL; the others run here.
"""

import dataclasses
import hashlib
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tinylm.core.batch import BatchRows, HostBatch, stack_steps
from tinylm.core.errors import UserError
from tinylm.core.mesh import AXES, MeshConfig, batch_shards, make_mesh
from tinylm.data import open_data
from tinylm.data.pipeline import train_batches
from tinylm.run.checkpoint import Checkpoints
from tinylm.run.folder import RunFolder
from tinylm.train.config import Config
from tinylm.train.init_from import take_over
from tinylm.train.state import make_blueprint
from tinylm.train.step import make_train_steps

MESH_LIMIT = {
    "float32": 1e-5,
    "bfloat16": 1e-2,
}  # relative difference of the loss that rounding may make in a step
NORM_LIMIT = {"float32": 1e-4, "bfloat16": 5e-2}  # and of the gradient's norm
RESUME_STEPS, RESUME_SAVE = 40, 5
MOVED_STEPS = 15  # on another mesh, after which rounding may have grown beyond MESH_LIMIT
HOSTS_STEPS = 3


@dataclasses.dataclass
class Proof:
    """A claim, whether it holds, and the table that shows it, its first row the heads."""

    claim: str
    holds: bool
    rows: Sequence[tuple[str, ...]]


def prove_mesh(config: Config) -> Proof:
    """Take one step on one device and on each mesh shape of all devices here."""
    data = open_data(config.data, seed=config.seed, tokenizer=take_over(config)[1])
    config = config.resolve(data.vocab_size)
    batch = next(_batches(config, data, np.arange(config.micro_batch_rows)))[1]
    one_loss, one_norm, one_params = _one_step(config, MeshConfig(data=1), batch)
    rows = [("mesh", "loss", "loss apart", "gradient norm apart", "parameters apart")]
    losses_apart, norms_apart = [], []
    for mesh in _meshes(jax.device_count(), config.micro_batch_rows):
        loss, norm, params = _one_step(config, mesh, batch)
        losses_apart.append(abs(loss / one_loss - 1))
        norms_apart.append(abs(norm / one_norm - 1))
        furthest = max(
            float(np.max(np.abs(a - b))) for a, b in zip(params, one_params, strict=True)
        )
        name = f"data {mesh.data} x model {mesh.model}{', fsdp' if mesh.fsdp else ''}"
        rows.append(
            (
                name,
                f"{loss:.7f}",
                f"{losses_apart[-1]:.1e}",
                f"{norms_apart[-1]:.1e}",
                f"{furthest:.1e}",
            )
        )
    limit, norm_limit = (
        MESH_LIMIT[config.model.compute_dtype],
        NORM_LIMIT[config.model.compute_dtype],
    )
    # A difference that is NaN is no difference within the limit.
    same = all(ratio <= limit for ratio in losses_apart) and all(
        ratio <= norm_limit for ratio in norms_apart
    )
    claim = (
        f"a step has the same loss on every mesh as on one device, within {limit:g}, and "
        "the same gradient norm, "
        f"within {norm_limit:g}"
    )
    return Proof(claim, same, rows)


def _meshes(devices: int, rows: int) -> list[MeshConfig]:
    """Return the shapes of all devices whose data axis divides the rows, plain and with fsdp."""
    shapes = [(devices // model, model) for model in range(1, devices + 1) if devices % model == 0]
    return [
        MeshConfig(data=d, model=m, fsdp=fsdp)
        for d, m in shapes
        if rows % d == 0
        for fsdp in {False, d > 1}
    ]


def _one_step(
    config: Config, mesh_config: MeshConfig, batch: HostBatch
) -> tuple[float, float, list]:
    """Return loss, gradient norm and updated parameters of the first step on a mesh."""
    mesh = make_mesh(mesh_config)
    config.check_mesh(batch_shards(mesh))
    batch_rows = BatchRows(mesh, config.micro_batch_rows)
    with jax.set_mesh(mesh):
        blueprint = make_blueprint(dataclasses.replace(config, mesh=mesh_config), mesh)
        steps = make_train_steps(blueprint)
        placed = batch_rows.place(stack_steps([batch]))
        state, metrics = steps(blueprint.init(config.seed), placed, 1, config.seed)
        params = [np.asarray(leaf) for leaf in jax.tree.leaves(state.params)]
    return float(metrics["loss"][0]), float(metrics["grad_norm"][0]), params


def prove_hosts(config: Config) -> Proof:
    """Make the first batches as 1, 2, 4, ... processes would, each its rows alone, and compare
    their hashes.
    """
    data = open_data(config.data, seed=config.seed, tokenizer=take_over(config)[1])
    rows = config.micro_batch_rows
    counts = [2**i for i in range(rows.bit_length()) if rows % 2**i == 0]
    table = {count: _hashes(config, data, count) for count in counts}
    heads = ("processes", *(f"batch {step}" for step in range(HOSTS_STEPS)))
    same = all(hashes == table[1] for hashes in table.values())
    return Proof(
        "the batches don't depend on the number of processes",
        same,
        [heads, *((str(count), *hashes) for count, hashes in table.items())],
    )


def _hashes(config: Config, data: Any, processes: int) -> list[str]:
    """Return a hash of each of the first batches, put together from the parts that `processes`
    make.
    """
    parts = [
        _batches(config, data, owned)
        for owned in np.split(np.arange(config.micro_batch_rows), processes)
    ]
    hashes = []
    for _ in range(HOSTS_STEPS):
        arrays = [next(part)[1] for part in parts]
        whole = [
            np.concatenate([array[name] for array in arrays], axis=1) for name in sorted(arrays[0])
        ]
        hashes.append(hashlib.sha256(b"".join(array.tobytes() for array in whole)).hexdigest()[:12])
    for part in parts:
        part.close()
    return hashes


def _batches(config: Config, data: Any, owned: np.ndarray):
    shape = (config.train.accumulation_steps, config.micro_batch_rows)
    return train_batches(data.train, batch_shape=shape, owned_rows=owned)


def prove_resume(config: Config, arguments: list[str]) -> Proof:
    """Train RESUME_STEPS steps with the training command; again with two SIGKILLs, each once
    another checkpoint is whole, and resumed on the same mesh and on another.

    Twice, since what is restored right may be saved wrong: then only the second resumption starts
    over.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, moved = (pathlib.Path(folder, name) for name in ("whole", "killed", "moved"))
        _finish(_train(arguments, whole))
        first = _kill_after_save(arguments, killed, 0)
        second = _kill_after_save(arguments, killed, first)
        shutil.copytree(killed, moved)
        _finish(_train(arguments, killed))
        other = _other_mesh(config)
        _finish(_train([*arguments, *other], moved))
        ours, theirs, there = _losses(whole), _losses(killed), _losses(moved)
    rows = [("step", "whole", "killed and resumed", f"resumed with {' '.join(other)}", "apart")]
    rows += [
        (
            str(step),
            repr(loss),
            repr(theirs.get(step)),
            repr(there.get(step)),
            f"{abs(there.get(step, 0.0) / loss - 1):.1e}",
        )
        for step, loss in ours.items()
    ]
    limit = MESH_LIMIT[config.model.compute_dtype]
    compared = {step: loss for step, loss in ours.items() if step <= second + MOVED_STEPS}
    near = ours.keys() == there.keys() and all(
        abs(there[step] / loss - 1) <= limit for step, loss in compared.items()
    )
    return Proof(
        f"a run that was killed once step {first} was saved, and again once step {second} "
        "was, has the same "
        f"losses, bit for bit, and within {limit:g} for {MOVED_STEPS} steps on another mesh",
        ours == theirs and near,
        rows,
    )


def _kill_after_save(arguments: list[str], workdir: pathlib.Path, after: int) -> int:
    """Train until a checkpoint of a later step than `after` is whole, then send SIGKILL; return
    that step.
    """
    process = _train(arguments, workdir)
    kept = Checkpoints(RunFolder(str(workdir)).checkpoints)
    while max(kept.steps(), default=0) <= after and process.poll() is None:
        time.sleep(0.02)
    saved = max(kept.steps(), default=0)
    kept.close()
    process.kill()
    error = process.communicate()[1]
    if process.returncode != -signal.SIGKILL:
        last = (error.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        why = (
            last
            if process.returncode
            else f"its {RESUME_STEPS} steps were over too soon; use a larger model"
        )
        raise UserError(f"the run could not be killed after a save: {why}")
    return saved


def _other_mesh(config: Config) -> list[str]:
    """Return the flags of another mesh: one device where the run has several, two simulated ones
    where it has one.
    """
    if np.prod(config.mesh.sizes(jax.device_count())) > 1:
        return [f"--config.mesh.{axis}=1" for axis in AXES]
    return [
        "--cpu_devices=2",
        f"--config.mesh.{AXES.data}=1",
        f"--config.mesh.{AXES.model}=2",
    ]


def _train(arguments: list[str], workdir: pathlib.Path) -> subprocess.Popen:
    short = {
        "train.stop_step": RESUME_STEPS,
        "train.log_every_steps": 1,
        "checkpoint.every_steps": RESUME_SAVE,
        "checkpoint.dir": "",
        "eval.every_steps": 0,
        "eval.patience": 0,
        "sample.every_steps": 0,
        "sample.max_tokens": 0,
    }
    settings = [f"--config.{key}={value}" for key, value in short.items()]
    command = [sys.executable, "-m", "tinylm.main", *arguments, *settings, f"--workdir={workdir}"]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )


def _finish(process: subprocess.Popen) -> None:
    """Wait for the training command; raise UserError with its last line where it fails."""
    error = process.communicate()[1]
    if process.returncode:
        why = error.strip().splitlines() or [f"exit code {process.returncode}"]
        raise UserError(f"training fails: {why[-1]}")


def _losses(workdir: pathlib.Path) -> dict[int, float]:
    """Return the train loss of each step."""
    metrics = RunFolder(str(workdir)).metrics()
    return {
        line["step"]: line["loss"]
        for line in metrics
        if line["split"] == "train" and "loss" in line
    }
