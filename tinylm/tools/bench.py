"""How fast a config trains: the trainer's own step and pipeline on random tokens, timed.

The cold and the warm start are two in one process: the first with an empty compile cache, the
second with what the first one left in it. Both count the processor time that the process took
before, for its imports. Dispatches are timed by the clock, and the device is kept busy as in
training.
"""

import contextlib
import math
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from tinylm.core.batch import BatchRows, HostBatch, batch_of_ids, stack_steps
from tinylm.core.chips import peak_flops
from tinylm.core.mesh import sizes_by_name
from tinylm.core.vitals import device_bytes, resident_bytes
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
        num_rows = len(indices)
        seq_len = self.config.data.seq_len
        rng = np.random.default_rng(indices)
        ids = rng.integers(0, self.config.model.vocab_size, (num_rows, seq_len + 1), np.int32)
        weights = np.ones((num_rows, seq_len), np.float32)
        rows = batch_of_ids(ids, weights)
        if self.config.data.packing == "packed":
            rows["segments"] = np.ones_like(rows["tokens"])
            rows["positions"] = np.cumsum(rows["segments"], axis=1, dtype=np.int32) - 1
        return rows


class Workload:
    """The steps of a resolved config on a mesh, and what feeds them."""

    def __init__(self, config: Config, mesh: Mesh):
        """Take the parts; compile nothing yet."""
        self.config = config
        self.count = config.train.steps_per_dispatch
        self.blueprint = make_blueprint(config, mesh)
        self.steps = make_train_steps(self.blueprint)
        self.batch_rows = BatchRows(mesh, config.micro_batch_rows)
        self.batches = train_batches(
            RandomRows(config),
            batch_shape=(config.train.accumulation_steps, config.micro_batch_rows),
            owned_rows=self.batch_rows.owned,
        )

    def place(self) -> dict[str, jax.Array]:
        """Put the batches of the next dispatch onto the mesh."""
        host_batches = [next(self.batches)[1] for _ in range(self.count)]
        return self.batch_rows.place(stack_steps(host_batches))

    def run(
        self, state: TrainState, placed: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Dispatch; return the state to be, and its metrics."""
        config = self.config
        return self.steps(state, placed, self.count, config.seed, config.train.last_step)


class _Started(NamedTuple):
    """A workload after its first dispatch."""

    work: Workload
    state: TrainState
    cold_secs: float  # from nothing to the first dispatch done, with an empty compile cache
    warm_secs: float  # the same with a filled one


class Timings(NamedTuple):
    """Seconds a step, of each dispatch; or of all those from one sync to the next."""

    step: np.ndarray
    wait: np.ndarray  # of it, for input
    host: np.ndarray  # of it, all that the host does before the device is under way


def measure(config: Config, mesh: Mesh, dispatches: int = 20, profile: str = "") -> dict[str, Any]:
    """Return the figures of a resolved config as plain values.

    Args:
      config: what to run.
      mesh: where to run it.
      dispatches: that are timed.
      profile: folder to leave a trace in (empty: leave none).
    """
    jax.set_mesh(mesh)
    before_secs = time.process_time()
    work, state, cold_secs, warm_secs = _starts(config, mesh)
    with contextlib.closing(work.batches), tempfile.TemporaryDirectory() as scratch:
        timings, state = time_steps(work, state, dispatches)
        folder = profile or scratch
        placed = work.place()
        with jax.profiler.trace(folder):
            jax.block_until_ready(work.run(state, placed))
        kinds = secs_by_kind(folder)

    low_secs, median_secs, high_secs = np.quantile(timings.step, (0.1, 0.5, 0.9)).tolist()
    tokens = config.data.tokens_per_step
    flops = train_flops_per_token(config.model, config.data.seq_len) * tokens
    peak = peak_flops(list(mesh.devices.flat))
    device = mesh.devices.flat[0]
    # Devices that keep no account of their memory, as the CPU, are in that of the process.
    peak_bytes = device_bytes([device]) or resident_bytes()
    all_kinds_secs = sum(kinds.values())
    return {
        "device": device.device_kind,
        "mesh": sizes_by_name(mesh),
        "tokens_per_sec": tokens / median_secs,
        "step_ms": 1e3 * median_secs,
        "step_ms_p10": 1e3 * low_secs,
        "step_ms_p90": 1e3 * high_secs,
        # Small differences mean nothing then.
        "noisy": high_secs - low_secs > 0.1 * median_secs,
        "mfu": flops / median_secs / peak if peak else None,
        "peak_flops": peak,
        "first_step_secs": before_secs + cold_secs,
        "first_step_warm_secs": before_secs + warm_secs,
        "host_ms": 1e3 * float(np.median(timings.host)),
        "input_wait_ms": 1e3 * float(np.median(timings.wait)),
        "peak_memory_bytes": peak_bytes,
        "time_by_kind": {kind: secs / all_kinds_secs for kind, secs in kinds.items()},
    }


def _starts(config: Config, mesh: Mesh) -> _Started:
    """Start twice from nothing, first with an empty compile cache, then with a filled one."""
    users_cache = jax.config.values["jax_compilation_cache_dir"]
    starts_secs = []
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        for _ in range(2):
            jax.clear_caches()
            # The cache's folder is read when the cache is first used, so it has to forget the last.
            compilation_cache.reset_cache()
            begun = time.perf_counter()
            work = Workload(config, mesh)
            state = work.blueprint.init(config.seed)
            state, metrics = work.run(state, work.place())
            jax.block_until_ready((state, metrics))
            starts_secs.append(time.perf_counter() - begun)
    jax.config.update("jax_compilation_cache_dir", users_cache)
    compilation_cache.reset_cache()
    cold_secs, warm_secs = starts_secs
    return _Started(work, state, cold_secs, warm_secs)


def time_steps(work: Workload, state: TrainState, dispatches: int) -> tuple[Timings, TrainState]:
    """Time dispatches; return also the state after them.

    A dispatch is waited for when the next one is under way, as in the trainer's loop:

        begun       fed         sent               done, and begun again
          |- place --|-- run ----|-- wait for the --|
                                     last dispatch

    Where workers train by themselves, one dispatch in several has a sync. So dispatches are timed
    together, as many as always hold the same number of syncs, and more of them where need be.
    """
    sync_every_steps = work.config.train.sync_every_steps
    together = math.lcm(work.count, sync_every_steps) // work.count
    num_timings = math.ceil(dispatches / together)
    marks = []
    state, pending = work.run(state, work.place())
    for _ in range(num_timings * together + 1):
        begun = time.perf_counter()
        placed = work.place()
        fed = time.perf_counter()
        state, metrics = work.run(state, placed)
        sent = time.perf_counter()
        jax.block_until_ready(pending)
        marks.append((begun, fed, sent, time.perf_counter()))
        pending = metrics
    # The first is left out, since it waited for a dispatch that was sent before the timing began.
    secs = np.array(marks[1:]) / work.count
    begun_D, fed_D, sent_D, done_D = secs.reshape(num_timings, together, -1).mean(axis=1).T
    timings = Timings(step=done_D - begun_D, wait=fed_D - begun_D, host=sent_D - begun_D)
    return timings, jax.block_until_ready(state)
