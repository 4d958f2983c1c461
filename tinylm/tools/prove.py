"""The proofs that a user can run on a config.

Another mesh takes the same step; a killed run has the same losses; any number of processes reads
the same batches. Each returns a table, and none touches a run of the user's. The killed run is real
processes of the training command, ended by SIGKILL; the other proofs run in this process.
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
from collections.abc import Generator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from tinylm.core.batch import BatchRows, HostBatch, stack_steps
from tinylm.core.errors import UserError
from tinylm.core.mesh import AXES, MeshConfig, make_mesh
from tinylm.core.ring import has_stretches
from tinylm.data import Data, open_data
from tinylm.data.pipeline import train_batches
from tinylm.run.checkpoint import Checkpoints
from tinylm.run.folder import RunFolder
from tinylm.train.config import Config
from tinylm.train.init_from import take_over
from tinylm.train.local_steps import LocalState, fix_workers
from tinylm.train.state import make_blueprint
from tinylm.train.step import make_train_steps

# The relative differences that rounding may make in a step: of the loss, and of the gradient's
# norm.
MESH_LIMIT = {"float32": 1e-5, "bfloat16": 1e-2}
NORM_LIMIT = {"float32": 1e-4, "bfloat16": 5e-2}
# Steps between the checkpoints of the run that is killed.
SAVE_EVERY_STEPS = 5
# Steps that are compared after the last kill. On another mesh rounding grows, and may be beyond
# MESH_LIMIT after more of them.
COMPARED_STEPS = 15
# Batches that are compared.
HOSTS_STEPS = 3

Losses = dict[int, float]  # of each step


@dataclasses.dataclass
class Proof:
    """A claim, whether it holds, and the table that shows it; its first row has the heads."""

    claim: str
    holds: bool
    rows: Sequence[tuple[str, ...]]


def prove_mesh(config: Config) -> Proof:
    """Take one step on one device and on each mesh shape of all devices here."""
    data = open_data(config.data, seed=config.seed, tokenizer=take_over(config)[1])
    # Workers that train by themselves are as many on every mesh.
    config = fix_workers(config, make_mesh(config.mesh), None)
    config = config.resolve(data.vocab_size)
    every_row = np.arange(config.micro_batch_rows)
    _, batch = next(_batches(config, data, every_row))
    loss_limit = MESH_LIMIT[config.model.compute_dtype]
    norm_limit = NORM_LIMIT[config.model.compute_dtype]

    one_loss, one_norm, one_params = _one_step(config, _Case(MeshConfig(data=1)), batch)
    rows: list[tuple[str, ...]] = [
        ("mesh", "loss", "loss apart", "gradient norm apart", "parameters apart")
    ]
    holds = True
    for case in _cases(config, jax.device_count()):
        loss, norm, params = _one_step(config, case, batch)
        loss_apart = abs(loss / one_loss - 1)
        norm_apart = abs(norm / one_norm - 1)
        params_apart = 0.0
        for ours, theirs in zip(params, one_params, strict=True):
            params_apart = max(params_apart, float(np.max(np.abs(ours - theirs))))
        # Written so that a difference that is NaN is not within the limit.
        holds = holds and loss_apart <= loss_limit and norm_apart <= norm_limit
        apart = (loss_apart, norm_apart, params_apart)
        rows.append((str(case), f"{loss:.7f}", *(f"{difference:.1e}" for difference in apart)))
    claim = (
        f"a step has the same loss on every mesh as on one device, within {loss_limit:g}, and the "
        f"same gradient norm, within {norm_limit:g}"
    )
    return Proof(claim, holds, rows)


class _Case(NamedTuple):
    """A mesh, and whether tokens are sent there to the devices that have their experts."""

    mesh: MeshConfig
    expert_parallel: bool = False

    def __str__(self) -> str:
        """Return the axes of more than one device, as "data 4 x model 2, fsdp"."""
        sizes = {axis: getattr(self.mesh, axis) for axis in AXES}
        name = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        if self.mesh.fsdp:
            name += ", fsdp"
        if self.expert_parallel:
            name += ", tokens sent to experts"
        return name or "one device"


def _cases(config: Config, num_devices: int) -> list[_Case]:
    """Return shapes of all devices that divide rows and their positions, plain and with fsdp; with
    fsdp both ways in which tokens and experts meet.

    They are those of data with model, with context and with replica, and one of data, context and
    model.
    """
    shapes = []
    for size in range(1, num_devices + 1):
        data = num_devices // size
        if num_devices % size:
            continue
        shapes.append(MeshConfig(data=data, model=size))
        if size > 1:
            shapes.append(MeshConfig(data=data, context=size))
            shapes.append(MeshConfig(replica=size, data=data))
    if num_devices % 8 == 0:
        shapes.append(MeshConfig(data=num_devices // 4, context=2, model=2))

    num_workers = config.train.workers
    cases = []
    for mesh in shapes:
        row_parts = mesh.data * max(mesh.replica, num_workers)
        if config.micro_batch_rows % row_parts or num_workers % mesh.replica:
            continue
        if not has_stretches(config.data.seq_len, mesh.context):
            continue
        cases.append(_Case(mesh))
        if mesh.data == 1:
            continue
        with_fsdp = dataclasses.replace(mesh, fsdp=True)
        cases.append(_Case(with_fsdp))
        if config.model.num_experts and config.model.num_experts % mesh.data == 0:
            cases.append(_Case(with_fsdp, expert_parallel=True))
    return cases


class _Step(NamedTuple):
    """What a step gave, on the host."""

    loss: float
    grad_norm: float
    params: list[np.ndarray]  # after the update


def _one_step(config: Config, case: _Case, batch: HostBatch) -> _Step:
    """Take the first step on a mesh."""
    mesh = make_mesh(case.mesh)
    config.check_mesh(mesh)
    model = dataclasses.replace(config.model, expert_parallel=case.expert_parallel)
    config = dataclasses.replace(config, mesh=case.mesh, model=model)
    batch_rows = BatchRows(mesh, config.micro_batch_rows)
    with jax.set_mesh(mesh):
        blueprint = make_blueprint(config, mesh)
        train_steps = make_train_steps(blueprint)
        state = blueprint.init(config.seed)
        placed = batch_rows.place(stack_steps([batch]))
        # Of the last step workers that train by themselves tell in any case.
        state, metrics = train_steps(state, placed, 1, config.seed, 1)
        (loss,) = metrics["loss"].tolist()
        (grad_norm,) = metrics["grad_norm"].tolist()
        trained = state.params
        # The parameters of the run move at a sync alone; what learns in each step are the workers'.
        if isinstance(state.opt_state, LocalState):
            trained = state.opt_state.workers.params
        params = [np.asarray(leaf) for leaf in jax.tree.leaves(trained)]
    return _Step(loss, grad_norm, params)


def prove_hosts(config: Config) -> Proof:
    """Make the first batches as 1, 2, 4, ... processes would, each its own rows, and compare."""
    data = open_data(config.data, seed=config.seed, tokenizer=take_over(config)[1])
    num_rows = config.micro_batch_rows
    rows = [("processes", *(f"batch {step}" for step in range(HOSTS_STEPS)))]
    holds = True
    num_processes = 1
    alone = _hashes(config, data, num_processes)
    while num_rows % num_processes == 0:
        hashes = _hashes(config, data, num_processes)
        rows.append((str(num_processes), *hashes))
        holds = holds and hashes == alone
        num_processes *= 2
    return Proof("the batches don't depend on the number of processes", holds, rows)


def _hashes(config: Config, data: Data, num_processes: int) -> list[str]:
    """Return a hash of each of the first batches, put together from the parts of processes."""
    every_row = np.arange(config.micro_batch_rows)
    rows_of_processes = np.split(every_row, num_processes)
    parts = [_batches(config, data, owned_rows) for owned_rows in rows_of_processes]
    hashes = []
    for _ in range(HOSTS_STEPS):
        arrays = [next(part)[1] for part in parts]
        digest = hashlib.sha256()
        for name in sorted(arrays[0]):
            whole = np.concatenate([array[name] for array in arrays], axis=1)
            digest.update(whole.tobytes())
        hashes.append(digest.hexdigest()[:12])
    for part in parts:
        part.close()
    return hashes


def _batches(
    config: Config, data: Data, owned_rows: np.ndarray
) -> Generator[tuple[int, HostBatch], None, None]:
    """Return the training batches of a process that holds these rows of a micro-batch."""
    shape = (config.train.accumulation_steps, config.micro_batch_rows)
    return train_batches(data.train, batch_shape=shape, owned_rows=owned_rows)


def prove_resume(config: Config, arguments: list[str]) -> Proof:
    """Train with the training command, undisturbed and killed twice, and compare the losses.

        whole    ------------------------------------->
        killed   -----x
                    ---------x       SIGKILL once another checkpoint is whole
                        ------------------------------>   resumed on the same mesh
        moved           - - - - - - - - - - - - - - - >   resumed on another mesh

    Killed twice, since what is restored right may be saved wrong: then only the second resumption
    starts over. How long the runs are follows from where the last kill struck, so that each of the
    resumed ones has COMPARED_STEPS steps to take.

    Args:
      config: of the run.
      arguments: the flags that name it, for the training command.
    """
    other_mesh = _other_mesh(config)
    with tempfile.TemporaryDirectory() as folder:
        whole = pathlib.Path(folder, "whole")
        killed = pathlib.Path(folder, "killed")
        moved = pathlib.Path(folder, "moved")
        first = _kill_after_save(arguments, killed, after=0)
        second = _kill_after_save(arguments, killed, after=first)
        last_step = second + COMPARED_STEPS
        if last_step > config.train.num_steps:
            raise UserError(
                f"a run of {config.train.num_steps} steps is over before it is killed twice and "
                f"takes {COMPARED_STEPS} steps more; set train.num_steps to {last_step} at least."
            )
        # Without the metrics, so that all that is compared was trained on the other mesh.
        shutil.copytree(killed, moved, ignore=shutil.ignore_patterns("metrics.jsonl"))
        _finish(_train(arguments, killed, last_step))
        _finish(_train([*arguments, *other_mesh], moved, last_step))
        _finish(_train(arguments, whole, last_step))
        losses = _losses(whole, last_step)
        after_kills = _losses(killed, last_step)
        on_other_mesh = _losses(moved, last_step)

    # The other mesh of a single accelerator is made of CPUs, which multiply in longer floats.
    is_same_kind = jax.default_backend() == "cpu" or jax.device_count() > 1
    limit = MESH_LIMIT[config.model.compute_dtype if is_same_kind else "bfloat16"]
    other = " ".join(other_mesh)
    rows = [("step", "whole", "killed and resumed", f"resumed with {other}", "apart")]
    is_near = sorted(on_other_mesh) == [step for step in losses if step > second]
    for step, loss in losses.items():
        moved_loss = "-"
        apart = "-"
        if step in on_other_mesh:
            difference = abs(on_other_mesh[step] / loss - 1)
            is_near = is_near and difference <= limit
            moved_loss = repr(on_other_mesh[step])
            apart = f"{difference:.1e}"
        rows.append((str(step), repr(loss), repr(after_kills.get(step)), moved_loss, apart))
    claim = (
        f"a run that was killed once step {first} was saved, and again once step {second} was, has "
        f"the same losses, bit for bit, and within {limit:g} for {COMPARED_STEPS} steps on another "
        "mesh"
    )
    return Proof(claim, losses == after_kills and is_near, rows)


def _kill_after_save(arguments: list[str], workdir: pathlib.Path, after: int) -> int:
    """Train until a checkpoint of a later step than `after` is whole, then send SIGKILL.

    Returns that step.
    """
    process = _train(arguments, workdir)
    checkpoints = Checkpoints(RunFolder(str(workdir)).checkpoints)
    while max(checkpoints.steps(), default=0) <= after and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    _, error = process.communicate()
    # What was saved in the meantime counts, too: the next run goes on from there.
    saved = max(checkpoints.steps(), default=0)
    checkpoints.close()
    if process.returncode == -signal.SIGKILL:
        return saved
    if process.returncode == 0:
        raise UserError("the run could not be killed after a save: its steps were over too soon.")
    raise UserError(
        f"the run could not be killed after a save: {_last_line(error, process.returncode)}"
    )


def _other_mesh(config: Config) -> list[str]:
    """Return the flags of another mesh than the config's.

    One device where the run has several, two simulated ones where it has one.
    """
    if np.prod(config.mesh.sizes(jax.device_count())) > 1:
        return [f"--config.mesh.{axis}=1" for axis in AXES]
    return [
        "--cpu_devices=2",
        f"--config.mesh.{AXES.data}=1",
        f"--config.mesh.{AXES.model}=2",
    ]


def _train(
    arguments: list[str], workdir: pathlib.Path, stop_step: int = 0
) -> subprocess.Popen[str]:
    """Start the training command, up to `stop_step` (0: to its end), without what takes time."""
    settings = {
        "train.stop_step": stop_step,
        "train.log_every_steps": 1,
        "checkpoint.every_steps": SAVE_EVERY_STEPS,
        "checkpoint.dir": "",
        "eval.every_steps": 0,
        "eval.patience": 0,
        "sample.every_steps": 0,
        "sample.max_tokens": 0,
    }
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "tinylm.main", *arguments, *overrides, f"--workdir={workdir}"]
    return subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )


def _finish(process: subprocess.Popen[str]) -> None:
    """Wait for the training command; raise UserError with its last line where it fails."""
    _, error = process.communicate()
    if process.returncode:
        raise UserError(f"training fails: {_last_line(error, process.returncode)}")


def _last_line(error: str, exit_code: int) -> str:
    lines = error.strip().splitlines()
    return lines[-1] if lines else f"exit code {exit_code}"


def _losses(workdir: pathlib.Path, last_step: int) -> Losses:
    """Return the training loss of each step up to `last_step`, on which a loss is logged."""
    losses = {}
    for line in RunFolder(str(workdir)).metrics():
        if line["split"] == "train" and "loss" in line and line["step"] <= last_step:
            losses[line["step"]] = line["loss"]
    return losses
