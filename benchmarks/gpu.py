"""The parts of gpu.sh, each a process of its own with a time limit; see there.

    facts, proofs, a killed run, kernels      side by side, for only their results count
    speed, peer, kernel times                 alone on the GPU, like all that follow
    shakespeare, decode, flags

A part that fails or is cut loses what it had still to do. What the parts tell each other (the best
batch) and what they need for themselves lies in a scratch folder, with one compile cache for all.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

HERE = pathlib.Path(__file__).resolve()
TOTAL_SECS = 480.0
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

# Overrides of every config with --tiny, so that a CPU takes seconds.
TINY_MODEL = ["model.embed_dim=32", "model.num_layers=2", "model.num_heads=2"]
TINY_TRAINING = [*TINY_MODEL, "data.seq_len=32", "data.batch_size=8"]

# XLA's flags for GPUs, tried one by one on the training step.
XLA_FLAGS = {
    "none": "",
    "deterministic": DETERMINISTIC,
    "no Triton products": "--xla_gpu_enable_triton_gemm=false",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "autotuned fusions": "--xla_gpu_experimental_enable_fusion_autotuner=true",
    "latency-hiding scheduler": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "cuDNN products": "--xla_gpu_cudnn_gemm_fusion_level=2",
    "Triton products": "--xla_gpu_triton_gemm_any=true",
    "no cuBLASLt": "--xla_gpu_enable_cublaslt=false",
    "no autotuning": "--xla_gpu_autotune_level=0",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a part is told."""

    part: str
    out: pathlib.Path
    scratch: pathlib.Path
    tiny: bool
    nanogpt: str
    shakespeare: str
    label: str

    def figure(self, name: str, value: Any, unit: str = "", **more: Any) -> None:
        """Print a figure, and append it to the file of all figures."""
        shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
        extra = "".join(f", {key} {text}" for key, text in more.items())
        print(f"{name}: {shown} {unit}{extra}", flush=True)
        line = {"part": self.part, "name": name, "value": value, "unit": unit, **more}
        with (self.out / "figures.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def config(self, name: str, *overrides: str, tiny: tuple[str, ...] = ()) -> Any:
        """Return a shipped config, resolved, with overrides; those of `tiny` come last."""
        from tinylm.config import load_config

        changes = [*overrides, *(tiny if self.tiny else ())]
        config = load_config(name, changes)
        return config.resolve(config.model.vocab_size or 1024)


# Parts whose results count, not their times.


def facts(job: Job) -> None:
    """Say what is here, and whether tinylm knows it."""
    import importlib.metadata

    import jax

    from tinylm.core.chips import find_chip
    from tinylm.core.platform import refuse_faulty

    job.figure("python", sys.version.split()[0])
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            job.figure(package, importlib.metadata.version(package))
    device = jax.devices()[0]
    job.figure("device", device.device_kind, count=jax.device_count(), platform=device.platform)
    job.figure("platform", device.client.platform_version.replace("\n", " "))
    chip = find_chip(device)
    job.figure("chip in core/chips.py", chip is not None, more=str(chip))
    job.figure("memory", (device.memory_stats() or {}).get("bytes_limit", 0), "bytes")
    refuse_faulty(jax.default_backend())
    with contextlib.suppress(FileNotFoundError):
        query = "--query-gpu=name,driver_version,memory.total,clocks.sm,power.limit"
        subprocess.run(["nvidia-smi", query, "--format=csv,noheader"], check=False)


def proof_of(config: str, *overrides: str) -> Callable[[Job], None]:
    """Return the part that proves the compiler of a config."""

    def proof(job: Job) -> None:
        from tinylm.core import text
        from tinylm.tools.compiler_proof import prove_compiler

        begun = time.monotonic()
        found = prove_compiler(job.config(config, *overrides, tiny=tuple(TINY_TRAINING)))
        print("\n".join(text.table(found.rows)))
        job.figure("proved", found.holds, secs=round(time.monotonic() - begun, 1))

    return proof


def resume(job: Job) -> None:
    """Kill a run after a checkpoint, resume it for 20 steps, and compare with an undisturbed one.

    In `train.deterministic` the losses and the parameters must be the same bits.
    """
    import jax
    import numpy as np

    from tinylm import open_run
    from tinylm.run.checkpoint import Checkpoints
    from tinylm.run.folder import RunFolder

    folders = {name: job.scratch / f"run-{name}" for name in ("killed", "whole")}

    def start(name: str, stop_step: int) -> subprocess.Popen:
        command = [
            *(sys.executable, "-m", "tinylm.main", "--config=tales"),
            # Far more than are taken before the kill.
            "--config.train.num_steps=5000",
            f"--config.train.stop_step={stop_step}",
            "--config.train.deterministic=true",
            "--config.train.log_every_steps=1",
            "--config.checkpoint.every_steps=10",
            "--config.eval.every_steps=0",
            "--config.sample.max_tokens=0",
            "--config.writers.plot=false",
            f"--config.data.store_dir={job.scratch / 'stores'}",
            f"--workdir={folders[name]}",
        ]
        if job.tiny:
            command += [f"--config.{change}" for change in TINY_MODEL]
        flags = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
        return subprocess.Popen(
            command, env={**os.environ, "XLA_FLAGS": flags}, stdout=subprocess.DEVNULL
        )

    process = start("killed", 0)
    checkpoints = Checkpoints(RunFolder(str(folders["killed"])).checkpoints)
    while not checkpoints.steps() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    job.figure("killed", process.wait() == -signal.SIGKILL)
    saved = max(checkpoints.steps())
    checkpoints.close()
    last = saved + 20
    job.figure("saved at step", saved)
    both = [start(name, last) for name in folders]
    job.figure("exit codes", [process.wait() for process in both])

    losses = {}
    params = {}
    for name, folder in folders.items():
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        # A step that was logged twice counts by its last line.
        losses[name] = {m["step"]: m["loss"] for m in found if m["split"] == "train"}
        params[name] = jax.device_get(jax.tree.leaves(open_run(str(folder), str(last)).params))
    job.figure("steps compared", len(losses["whole"]))
    job.figure("losses are the same bits", losses["killed"] == losses["whole"])
    is_same = all(map(np.array_equal, params["killed"], params["whole"]))
    job.figure("parameters are the same bits", is_same)


# Window, kv heads, texts of a row of the cases in which kernels are compared.
KERNEL_CASES = {
    "causal": (0, 12, 1),
    "window 256": (256, 12, 1),
    "4 kv heads": (0, 4, 1),
    "1 kv head": (0, 1, 1),
    "10 texts": (0, 12, 10),
    "200 texts": (0, 12, 200),
    "10 texts, window 256, 4 kv heads": (256, 4, 10),
}


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Inputs of attention and what may see what."""

    qkv: tuple  # q_BNTH, k_BKSH, v_BKSH in bfloat16
    weights: Any  # of the output, so that there is a gradient
    visibility: Any


def attention_case(job: Job, name: str, rows: int) -> AttentionCase:
    """Return the case of a name."""
    import jax.numpy as jnp
    import numpy as np

    from tinylm.model.visibility import Visibility

    window, kv_heads, num_texts = KERNEL_CASES[name]
    length, head_dim = (128, 16) if job.tiny else (1024, 64)
    rng = np.random.default_rng(0)
    arrays = []
    for heads in (12, kv_heads, kv_heads, 12):
        x = rng.normal(size=(rows, heads, length, head_dim)).astype(np.float32)
        arrays.append(jnp.asarray(x, jnp.bfloat16))
    segments = None
    if num_texts > 1:
        numbers = np.sort(rng.integers(1, num_texts + 1, (rows, length)), axis=1)
        segments = jnp.asarray(numbers, jnp.int32)
    visibility = Visibility(segments_BT=segments, window=window)
    return AttentionCase(tuple(arrays[:3]), arrays[3], visibility)


def with_gradients(kernel: Callable, case: AttentionCase) -> Callable:
    """Return the jitted function of q, k, v that gives the output and its three gradients."""
    import jax
    import jax.numpy as jnp

    from tinylm.model.kernels import AttentionOptions

    options = AttentionOptions(case.qkv[0].shape[-1] ** -0.5)

    def weighed(q: Any, k: Any, v: Any) -> tuple:
        out = kernel(q, k, v, case.visibility, options)
        weights = case.weights.astype(jnp.float32)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    def all_four(q: Any, k: Any, v: Any) -> list:
        gradient = jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True)
        (_, out), grads = gradient(q, k, v)
        return [out, *grads]

    return jax.jit(all_four)


def fused_kernel(job: Job) -> Callable:
    """Return cuDNN's attention; off a GPU what XLA makes of the same arguments."""
    import functools

    import jax

    from tinylm.model.kernels import cudnn_attention

    if jax.default_backend() == "gpu":
        return cudnn_attention
    print("needs a GPU: cuDNN's attention; its arguments go to XLA here")
    return functools.partial(cudnn_attention, implementation="xla")


def kernels(job: Job) -> None:
    """Compare cuDNN's and the plain kernel in bfloat16 with the plain one in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tinylm.model.kernels import plain_attention

    fused = fused_kernel(job)
    for name in KERNEL_CASES:
        case = attention_case(job, name, rows=2)
        wide = [x.astype(jnp.float32) for x in case.qkv]
        with jax.default_matmul_precision("highest"):
            exact = jax.device_get(with_gradients(plain_attention, case)(*wide))
        for kernel_name, kernel in (("plain", plain_attention), ("cudnn", fused)):
            found = jax.device_get(with_gradients(kernel, case)(*case.qkv))
            apart = {}
            for part, ours, theirs in zip("oqkv", found, exact, strict=True):
                off = np.linalg.norm(np.asarray(ours, np.float32) - theirs)
                apart[part] = f"{off / np.linalg.norm(theirs):.1e}"
            worst = max(float(figure) for figure in apart.values())
            # A wrong mask is off by tenths. NaN is not below the limit.
            job.figure(f"{name}, {kernel_name}", worst < 3e-2, worst=worst, **apart)


# Parts that are timed.


def secs_of(call: Callable[[], Any], times: int) -> float:
    """Return the median seconds of a call of some work on the device, after one to warm up."""
    import jax

    jax.block_until_ready(call())
    secs = []
    for _ in range(times):
        begun = time.perf_counter()
        jax.block_until_ready(call())
        secs.append(time.perf_counter() - begun)
    return statistics.median(secs)


def kernel_times(job: Job) -> None:
    """Time attention, forward and gradient, and what a mask would cost for packed rows."""
    import jax
    import jax.numpy as jnp

    from tinylm.model.kernels import plain_attention

    size = 256 if job.tiny else 8192
    square = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    secs = secs_of(lambda: product(square), 20)
    job.figure(f"product of {size} x {size} in bfloat16", 2 * size**3 / secs / 1e12, "TFLOP/s")

    fused = fused_kernel(job)
    on_gpu = jax.default_backend() == "gpu"

    def masked(q: Any, k: Any, v: Any, visibility: Any, options: Any) -> jax.Array:
        segments = visibility.segments_BT
        out = jax.nn.dot_product_attention(
            *(x.swapaxes(1, 2) for x in (q, k, v)),
            mask=segments[:, None, :, None] == segments[:, None, None, :],
            scale=options.scale,
            is_causal=True,
            implementation="cudnn" if on_gpu else "xla",
        )
        return out.swapaxes(1, 2)

    for name, kernel_name, kernel in (
        ("causal", "cudnn", fused),
        ("causal", "plain", plain_attention),
        ("10 texts", "cudnn", fused),
        ("10 texts", "cudnn with a mask", masked),
        ("10 texts", "plain", plain_attention),
    ):
        case = attention_case(job, name, rows=2 if job.tiny else 32)
        function = with_gradients(kernel, case)
        secs = secs_of(lambda function=function, case=case: function(*case.qkv), 20)
        job.figure(f"{name}, {kernel_name}", 1e3 * secs, "ms, forward and gradient")


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a step of GPT-2 124M is run."""

    rows: int
    remat: str = "none"
    unroll: int = 1
    loss_chunks: int = 1

    @property
    def text(self) -> str:
        """The shape in words."""
        return (
            f"{self.rows} rows, remat {self.remat}, unroll {self.unroll}, "
            f"logits in {self.loss_chunks}"
        )

    def config(self, job: Job) -> Any:
        """Return GPT-2 124M in this shape, with several steps a dispatch."""
        return job.config(
            "gpt2_124m",
            f"data.batch_size={self.rows}",
            f"model.remat={self.remat}",
            f"model.unroll={self.unroll}",
            f"model.loss_chunks={self.loss_chunks}",
            "train.accumulation_steps=1",
            "train.steps_per_dispatch=10",
            tiny=(*TINY_MODEL, "model.vocab_size=512", "data.seq_len=64"),
        )


def time_step(job: Job, shape: Shape, name: str, traces: str = "") -> float:
    """Measure the trainer's own step, and return tokens per second (0: it doesn't fit).

    Args:
      job: to report to.
      shape: of the step.
      name: of the figure.
      traces: folder for a profile (empty: none).
    """
    import jax

    from tinylm.core.chips import peak_flops
    from tinylm.core.mesh import make_mesh
    from tinylm.core.vitals import device_bytes, resident_bytes
    from tinylm.model.flops import train_flops_per_token
    from tinylm.tools.bench import Workload

    config = shape.config(job)
    mesh = make_mesh(config.mesh)
    secs = []
    with jax.set_mesh(mesh):
        work = Workload(config, mesh)
        with contextlib.closing(work.batches):
            state = work.blueprint.init(0)
            placed = work.place()
            begun = time.perf_counter()
            try:
                state, metrics = jax.block_until_ready(work.run(state, placed))
            except jax.errors.JaxRuntimeError as error:
                job.figure(name, 0.0, "tokens/s", error=str(error).splitlines()[0][:200])
                return 0.0
            first_secs = time.perf_counter() - begun
            for _ in range(2 if job.tiny else 8):
                begun = time.perf_counter()
                state, metrics = work.run(state, placed)
                # The next batches are made while the device computes, as in training.
                placed = work.place()
                jax.block_until_ready(metrics)
                secs.append((time.perf_counter() - begun) / work.count)
            if traces:
                with jax.profiler.trace(traces):
                    jax.block_until_ready(work.run(state, placed))
            loss = float(metrics["loss"][-1])
    step_secs = statistics.median(secs)
    rate = config.data.tokens_per_step / step_secs
    devices = list(mesh.devices.flat)
    peak = peak_flops(devices)
    mfu = rate * train_flops_per_token(config.model, config.data.seq_len) / peak if peak else 0.0
    job.figure(
        name,
        rate,
        "tokens/s",
        step_ms=round(1e3 * step_secs, 2),
        mfu=round(mfu, 4),
        # Of the process, so of the largest step so far.
        peak_bytes=device_bytes(devices) or resident_bytes(),
        first_secs=round(first_secs, 1),
        spread=round((max(secs) - min(secs)) / step_secs, 3),
        loss=round(loss, 4),
        **dataclasses.asdict(shape),
    )
    return rate


def speed(job: Job) -> None:
    """Find the best way to run GPT-2 124M, and where the time of its step goes."""
    middle, large = (4, 8) if job.tiny else (32, 64)
    rates: dict[Shape, float] = {}

    def attempt(shape: Shape) -> None:
        traces = job.scratch / f"traces-{len(rates)}"
        rates[shape] = time_step(job, shape, f"tinylm, {shape.text}", str(traces))
        text = json.dumps(dataclasses.asdict(best()))
        (job.scratch / "best.json").write_text(text, encoding="utf-8")
        report_profile(job, str(traces), num_names=0 if len(rates) > 2 else 25)

    def best() -> Shape:
        return max(rates, key=lambda shape: rates[shape])

    attempt(Shape(middle, remat="dots"))
    attempt(Shape(middle))
    attempt(dataclasses.replace(best(), unroll=0))
    attempt(dataclasses.replace(best(), rows=large))
    # Logits made in pieces are made twice, but leave room.
    attempt(dataclasses.replace(best(), loss_chunks=8))
    job.figure("best", best().text)


def report_profile(job: Job, traces: str, num_names: int) -> None:
    """Report the time of each kind of operation, and of the operations that take most."""
    from tinylm.tools.profile import kind_of, operations

    by_kind: dict[str, float] = {}
    by_name: dict[str, float] = {}
    for name, secs in operations(traces):
        by_name[name] = by_name.get(name, 0.0) + secs
        by_kind[kind_of(name)] = by_kind.get(kind_of(name), 0.0) + secs
    whole = sum(by_kind.values()) or 1.0
    for kind, secs in sorted(by_kind.items(), key=lambda item: -item[1]):
        job.figure(f"  {kind}", secs / whole, "of the time of all operations")
    for name, secs in sorted(by_name.items(), key=lambda item: -item[1])[:num_names]:
        job.figure(f"    {name}", secs / whole, "of the time of all operations")


def best_shape(job: Job) -> Shape:
    """Return the best shape so far."""
    path = job.scratch / "best.json"
    if not path.exists():
        return Shape(4 if job.tiny else 32)
    return Shape(**json.loads(path.read_text(encoding="utf-8")))


def peer(job: Job) -> None:
    """Time nanoGPT at the best batch, compiled, and our own step once more after it."""
    from nanogpt import Theirs

    if not pathlib.Path(job.nanogpt, "model.py").exists():
        print("needs --nanogpt=CHECKOUT, with nanoGPT's model.py")
        return
    import jax

    shape = best_shape(job)
    model = shape.config(job).model
    on_gpu = jax.default_backend() == "gpu"
    names = {
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_embd": model.embed_dim,
        "block_size": model.context,
        "vocab_size": model.padded_vocab,
        "dropout": 0.0,
        "bias": True,
    }
    # Half the batch where the whole one doesn't fit.
    for rows in (shape.rows, shape.rows // 2):
        theirs = Theirs(
            sys.executable,
            {
                "checkout": job.nanogpt,
                "shape": names,
                "rows": rows,
                "compiled": on_gpu,
                "device": "cuda" if on_gpu else "cpu",
            },
        )
        try:
            first_secs = theirs.secs(3)
            theirs.secs(3)
            steps = 2 if job.tiny else 20
            secs = statistics.median(theirs.secs(steps) / steps for _ in range(3))
            memory = theirs.peak_bytes()
        except (AssertionError, OSError) as error:
            job.figure(f"nanoGPT, {rows} rows", 0.0, "tokens/s", error=str(error))
            continue
        finally:
            theirs.process.kill()
            theirs.process.wait()
        job.figure(
            f"nanoGPT, {rows} rows",
            rows * model.context / secs,
            "tokens/s",
            step_ms=round(1e3 * secs, 2),
            peak_bytes=memory,
            first_secs=round(first_secs, 1),
        )
        break
    time_step(job, shape, f"tinylm again, {shape.text}")


def step(job: Job) -> None:
    """Time one step; XLA_FLAGS are those of the process that calls."""
    time_step(job, best_shape(job), job.label)


def flags(job: Job) -> None:
    """Time the step with XLA's flags one by one, each in a process of its own."""
    labels = list(XLA_FLAGS)[:2] if job.tiny else list(XLA_FLAGS)
    for label in labels:
        flag = XLA_FLAGS[label]
        given = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        command = [*command_of(job, "step"), f"--label=XLA flags: {label}"]
        try:
            done = subprocess.run(
                command, env={**os.environ, "XLA_FLAGS": given}, check=False, timeout=60
            )
        except subprocess.TimeoutExpired:
            job.figure(f"XLA flags: {label}", 0.0, "tokens/s", error="took more than 60 s")
            continue
        if done.returncode:
            job.figure(f"XLA flags: {label}", 0.0, "tokens/s", error=f"exit {done.returncode}")


def shakespeare(job: Job) -> None:
    """Train configs/shakespeare_char.py, and report each evaluation as it comes."""
    if not pathlib.Path(job.shakespeare).is_file():
        print("needs --shakespeare=input.txt")
        return
    workdir = job.scratch / "shakespeare"
    command = [
        *(sys.executable, "-m", "tinylm.main", "--config=shakespeare_char"),
        f"--config.data.source=text:{job.shakespeare}",
        f"--config.data.store_dir={job.scratch / 'stores'}",
        "--config.sample.max_tokens=0",
        "--config.writers.plot=false",
        f"--workdir={workdir}",
    ]
    if job.tiny:
        small = [*TINY_TRAINING, "train.num_steps=40", "optimizer.warmup_steps=5"]
        small += ["eval.every_steps=20", "eval.max_batches=4"]
        command += [f"--config.{change}" for change in small]
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    best = float("inf")
    for line in lines_as_they_come(workdir / "metrics.jsonl", process):
        metrics = json.loads(line)
        if metrics.get("split") != "valid":
            continue
        secs = time.monotonic() - begun
        best = min(best, metrics["loss"])
        job.figure(
            "validation loss",
            metrics["loss"],
            "nats a character",
            step=metrics["step"],
            secs=round(secs, 1),
            best=best,
        )
    job.figure("exit code", process.wait(), secs=round(time.monotonic() - begun, 1))


def lines_as_they_come(path: pathlib.Path, process: subprocess.Popen) -> Iterator[str]:
    """Yield the lines of a file that a process writes, until it ends."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.1)
    if not path.exists():
        return
    unfinished = ""
    with path.open(encoding="utf-8") as file:
        while True:
            has_ended = process.poll() is not None
            unfinished += file.read()
            *lines, unfinished = unfinished.split("\n")
            yield from lines
            if has_ended:
                return
            time.sleep(0.1)


def decode(job: Job) -> None:
    """Write with GPT-2 124M, one text and 64 at a time."""
    from decode import rate_alone

    config = Shape(1).config(job)
    for rows in (1, 64):
        num_tokens = 16 if job.tiny else 256
        rate = rate_alone(config, rows, num_tokens)
        job.figure(f"writing, {rows} rows", rate, "tokens/s over all rows")


# The order and limits of the parts.


@dataclasses.dataclass(frozen=True)
class Part:
    """A part and what it may take."""

    run: Callable[[Job], None]
    secs: float
    memory: str = "0.9"  # of the GPU, which JAX takes at once; "": as much as it needs by and by


# Parts of a stage run side by side.
STAGES: tuple[dict[str, Part], ...] = (
    {
        "facts": Part(facts, 60, memory=""),
        "proof: tales": Part(proof_of("tales"), 110, memory=""),
        "proof: bfloat16": Part(proof_of("gpt2_124m"), 110, memory=""),
        "proof: packed": Part(proof_of("gpt2_124m", "data.packing=packed"), 110, memory=""),
        "resume": Part(resume, 110, memory=""),
        "kernels": Part(kernels, 110, memory=""),
    },
    {"speed": Part(speed, 150)},
    # nanoGPT needs the rest of the memory.
    {"peer": Part(peer, 100, memory="")},
    {"kernel times": Part(kernel_times, 30)},
    {"shakespeare": Part(shakespeare, 120)},
    {"decode": Part(decode, 45)},
    {"flags": Part(flags, 300)},
)
PARTS = {name: part for stage in STAGES for name, part in stage.items()}


def command_of(job: Job, part: str) -> list[str]:
    """Return the command that runs a part in a process of its own."""
    command = [
        sys.executable,
        str(HERE),
        f"--run={part}",
        f"--out={job.out}",
        f"--scratch={job.scratch}",
        f"--nanogpt={job.nanogpt}",
        f"--shakespeare={job.shakespeare}",
    ]
    return [*command, "--tiny"] if job.tiny else command


class Running:
    """A part under way: its process, and the thread that passes its lines on."""

    def __init__(self, job: Job, name: str, limit_secs: float):
        """Start it."""
        self.job = job
        self.name = name
        self.begun = time.monotonic()
        self.ended = self.begun
        self.until = self.begun + limit_secs
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(job.scratch / "cache")}
        environment.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # the old name of the same
        memory = PARTS[name].memory
        if memory:
            environment["XLA_CLIENT_MEM_FRACTION"] = memory
        else:
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        # A session of its own, so that what it starts ends with it.
        self.process = subprocess.Popen(
            command_of(job, name),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self.pass_on)
        self.reader.start()

    def pass_on(self) -> None:
        """Print what the part prints, and keep it."""
        with (self.job.out / "log.txt").open("a", encoding="utf-8") as log:
            for line in self.process.stdout:
                text = f"[{self.name}] {line}"
                print(text, end="", flush=True)
                log.write(text)
                log.flush()
        self.ended = time.monotonic()

    def finish(self) -> None:
        """Wait until the part ends or its time is over; then end it with all that it started."""
        remaining = max(self.until - time.monotonic(), 0.0)
        try:
            code: int | str = self.process.wait(timeout=remaining)
        except subprocess.TimeoutExpired:
            code = "its time was over"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.reader.join()
        secs = self.ended - self.begun
        self.job.figure(f"{self.name} ended with", code, secs=round(secs, 1))


def run_all(job: Job, wanted: list[str]) -> None:
    """Run the stages one after another, as long as there is time."""
    until = time.monotonic() + TOTAL_SECS
    for stage in STAGES:
        names = [name for name in stage if name in wanted]
        remaining = until - time.monotonic()
        if names and remaining < 5:
            print(f"no time for {', '.join(names)}")
            continue
        running = [Running(job, name, min(stage[name].secs, remaining)) for name in names]
        for part in running:
            part.finish()


def main() -> None:
    """Run all parts, or with --run one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, help="folder for figures.jsonl and log.txt")
    parser.add_argument("--nanogpt", default="", help="nanoGPT's checkout")
    parser.add_argument("--shakespeare", default="", help="the text, input.txt")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--run", default="", help="one part, in this process")
    parser.add_argument("--scratch", default="", help="with --run: the folder that parts share")
    parser.add_argument("--label", default="", help="with --run=step: the name of the figure")
    given = parser.parse_args()
    wanted = given.parts.split(",")
    unknown = [name for name in wanted if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}.")

    out = pathlib.Path(given.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(given.scratch or tempfile.mkdtemp(prefix="tinylm-gpu-"))
    job = Job(
        part=given.run or "all",
        out=out,
        scratch=scratch,
        tiny=given.tiny,
        nanogpt=given.nanogpt,
        shakespeare=given.shakespeare,
        label=given.label,
    )
    if given.run:
        run = step if given.run == "step" else PARTS[given.run].run
        run(job)
        return
    try:
        run_all(job, wanted)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
