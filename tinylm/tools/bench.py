"""How fast a config trains: the trainer's own step and pipeline on random tokens, timed.

The cold and the warm start are two in one process, with an empty compile cache and with what the
first one left in it; both count the processor time of the process before it, its imports.
Dispatches are timed by the clock, the device kept busy as in training.
"""

import contextlib
import resource
import tempfile
import time
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from tinylm.core.batch import BatchRows, HostBatch, batch_of_ids, stack_steps
from tinylm.core.chips import peak_flops
from tinylm.core.mesh import sizes_by_name
from tinylm.data.pipeline import train_batches
from tinylm.model.flops import train_flops_per_token
from tinylm.tools.profile import secs_by_kind
from tinylm.train.config import Config
from tinylm.train.state import TrainState, make_blueprint
from tinylm.train.step import make_train_steps


class RandomRows:
    """Rows of random tokens: what a split reads like, without data."""

    def __init__(self, config: Config):
        """Read rows as `config` would cut them."""
        self.config = config

    def __len__(self) -> int:
        return 1 << 30

    def read(self, indices: np.ndarray) -> HostBatch:
        """Return examples that depend on their indices alone."""
        shape, top = (len(indices), self.config.data.seq_len + 1), self.config.model.vocab_size
        ids = np.random.default_rng(indices).integers(0, top, shape, np.int32)
        rows = batch_of_ids(ids, np.ones(ids[:, 1:].shape, np.float32))
        if self.config.data.packing == "packed":
            rows["segments"] = np.ones_like(rows["tokens"])
            rows["positions"] = np.cumsum(rows["segments"], axis=1, dtype=np.int32) - 1
        return rows


class Workload:
    """The steps of a resolved config on a mesh, and what feeds them."""

    def __init__(self, config: Config, mesh: Mesh):
        """Take the parts; compile nothing yet."""
        c, self.config, self.mesh = config, config, mesh
        self.count, micro = c.train.steps_per_dispatch, c.train.accumulation_steps
        self.blueprint = make_blueprint(config, mesh)
        self.steps = make_train_steps(self.blueprint)
        self.batch_rows = BatchRows(mesh, c.micro_batch_rows)
        self.batches = train_batches(
            RandomRows(c),
            batch_shape=(micro, c.micro_batch_rows),
            owned_rows=self.batch_rows.owned,
        )

    def place(self) -> dict[str, jax.Array]:
        """Put the batches of the next dispatch onto the mesh."""
        host = [next(self.batches)[1] for _ in range(self.count)]
        return self.batch_rows.place(stack_steps(host))

    def run(
        self, state: TrainState, placed: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Dispatch; return the state to be, and its metrics."""
        return self.steps(state, placed, self.count, self.config.seed)


def measure(config: Config, mesh: Mesh, dispatches: int = 20, profile: str = "") -> dict[str, Any]:
    """Return the figures of a resolved config as plain values; a trace is left in `profile` where
    that is named.
    """
    jax.set_mesh(mesh)
    before, (work, state, cold, warm) = time.process_time(), _starts(config, mesh)
    with contextlib.closing(work.batches), tempfile.TemporaryDirectory() as scratch:
        secs, waits, hosts, state = _steady(work, state, dispatches)
        kinds = _secs_by_kind(work, state, profile or scratch)
    low, median, high = (float(np.quantile(secs, q)) for q in (0.1, 0.5, 0.9))
    tokens = config.data.tokens_per_step
    flops = train_flops_per_token(config.model, config.data.seq_len) * tokens
    peak, device = peak_flops(list(mesh.devices.flat)), mesh.devices.flat[0]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "device": device.device_kind,
        "mesh": sizes_by_name(mesh),
        "tokens_per_sec": tokens / median,
        "step_ms": 1e3 * median,
        "step_ms_p10": 1e3 * low,
        "step_ms_p90": 1e3 * high,
        "noisy": high - low > 0.1 * median,  # small differences mean nothing then
        "mfu": flops / median / peak if peak else None,
        "peak_flops": peak,
        "first_step_secs": before + cold,
        "first_step_warm_secs": before + warm,
        "host_ms": 1e3 * float(np.median(hosts)),
        "input_wait_ms": 1e3 * float(np.median(waits)),
        "peak_memory_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use", resident),
        "time_by_kind": {kind: part / sum(kinds.values()) for kind, part in kinds.items()},
    }


def _starts(config: Config, mesh: Mesh) -> tuple[Workload, TrainState, float, float]:
    """Return a workload, its state, and the seconds from nothing to its first dispatch done: cold,
    then warm.
    """
    kept, secs = jax.config.values["jax_compilation_cache_dir"], []
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        for _ in range(2):
            jax.clear_caches()
            compilation_cache.reset_cache()
            begun = time.perf_counter()
            work = Workload(config, mesh)
            state, _ = jax.block_until_ready(
                work.run(work.blueprint.init(config.seed), work.place())
            )
            secs.append(time.perf_counter() - begun)
    jax.config.update("jax_compilation_cache_dir", kept)
    compilation_cache.reset_cache()
    return work, state, secs[0], secs[1]


def _steady(
    work: Workload, state: TrainState, dispatches: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, TrainState]:
    """Return seconds a step of each dispatch, of waiting for input and of all host work in it; and
    the state.

    A dispatch is waited for when the next one is under way, as in the trainer's loop.
    """
    marks = []
    state, pending = work.run(state, work.place())
    for _ in range(dispatches + 1):
        begun = time.perf_counter()
        placed = work.place()
        fed = time.perf_counter()
        state, metrics = work.run(state, placed)
        sent = time.perf_counter()
        jax.block_until_ready(pending)
        marks.append((begun, fed, sent, time.perf_counter()))
        pending = metrics
    begun, fed, sent, done = np.array(marks[1:]).T / work.count
    return done - begun, fed - begun, sent - begun, jax.block_until_ready(state)


def _secs_by_kind(work: Workload, state: TrainState, folder: str) -> dict[str, float]:
    """Return the seconds of each kind of operation in a dispatch, traced into `folder`."""
    placed = work.place()
    with jax.profiler.trace(folder):
        jax.block_until_ready(work.run(state, placed))
    return secs_by_kind(folder)
