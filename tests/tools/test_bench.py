"""The benchmark measures the trainer's own step; and what makes a step slow is counted, for time
can't be tested.
"""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers import ROOT, random_batch, tiny_model

from tinylm.bench import text_of
from tinylm.config import load_config
from tinylm.core.mesh import make_mesh
from tinylm.model.flops import count_parameters, train_flops_per_token
from tinylm.model.transformer import abstract_transformer
from tinylm.tools.bench import Workload, measure, time_steps
from tinylm.tools.plan import compile_step
from tinylm.tools.profile import kind_of, secs_by_kind
from tinylm.train.step import accumulate, number_rows

TINY = [
    "model.vocab_size=65",
    "model.embed_dim=32",
    "model.num_layers=2",
    "data.seq_len=16",
    "data.batch_size=8",
    "train.steps_per_dispatch=2",
    "mesh.data=1",
]


def tiny_config(*overrides):
    config = load_config("shakespeare_char_cpu", [*TINY, *overrides])
    config = config.resolve(65)
    return config


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return the figures of a benchmark, its traces, and what the compile cache did."""
    config, traces = tiny_config(), tmp_path_factory.mktemp("traces")
    events = []

    def listen(event, **_):
        if event.startswith("/jax/compilation_cache/cache_"):
            events.append(event.rpartition("_")[2])

    # These programs compile too fast to be kept otherwise.
    shortest_secs = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.monitoring.register_event_listener(listen)
    try:
        found = measure(config, make_mesh(config.mesh), dispatches=3, profile=str(traces))
    finally:
        jax.monitoring.unregister_event_listener(listen)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest_secs)
    return found, traces, events


def test_the_figures_of_a_benchmark_agree_with_each_other(measured):
    found, traces, _ = measured
    assert found["tokens_per_sec"] == pytest.approx(8 * 16 / found["step_ms"] * 1e3)
    flops = train_flops_per_token(tiny_config().model, 16) * found["tokens_per_sec"]
    assert found["mfu"] == pytest.approx(flops / found["peak_flops"])
    assert found["step_ms_p10"] <= found["step_ms"] <= found["step_ms_p90"]
    assert 0 < found["input_wait_ms"] < found["host_ms"]
    assert min(found["first_step_secs"], found["first_step_warm_secs"]) > 0
    assert sum(found["time_by_kind"].values()) == pytest.approx(1)
    assert found["time_by_kind"]["matmuls"] > 0
    assert list(traces.rglob("*.xplane.pb"))
    assert "MFU" in text_of(found)
    assert "chips.py" in text_of({**found, "mfu": None})


@pytest.mark.parametrize(("every", "count", "dispatches"), [(1, 2, 3), (5, 1, 4), (10, 4, 7)])
def test_a_step_takes_its_part_of_the_sync_of_workers(every, count, dispatches, monkeypatch):
    """By a clock that shows a second for each step, and twelve more for a sync."""
    clock = [0.0]

    class Work:
        config = tiny_config(f"train.sync_every_steps={every}")
        steps = 0

        def place(self):
            return {}

        def run(self, state, placed):
            for _ in range(count):
                self.steps += 1
                clock[0] += 1 if self.steps % every else 13
            return state, {}

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    work = Work()
    work.count = count
    timings, _ = time_steps(work, None, dispatches)
    np.testing.assert_allclose(timings.step, 1 + 12 / every)
    np.testing.assert_allclose(timings.host, timings.step)


def test_the_first_start_compiles_and_the_second_takes_its_programs(measured):
    """As JAX tells of its compile cache; the times of both tell it on a quiet machine alone."""
    _, _, events = measured
    num_programs = len(events) // 2
    assert num_programs > 0
    assert events == ["misses"] * num_programs + ["hits"] * num_programs


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dot.12", "matmuls"),
        ("ynn_fusion.3", "matmuls"),
        ("gemm_fusion_dot.1", "matmuls"),
        ("loop_transpose_fusion", "transposes and copies"),
        ("copy_bitcast_fusion.7", "transposes and copies"),
        ("wrapped_scatter", "gathers and scatters"),
        ("input_reduce_fusion.2", "reductions"),
        ("all-reduce-start.1", "communication"),
        ("multiply_tanh_fusion", "element by element"),
        ("loop_convert_fusion_4", "element by element"),
        ("MemcpyD2D", "transposes and copies"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "matmuls"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3", "attention"),
    ],
)
def test_operations_are_told_apart_by_name(name, kind):
    assert kind_of(name) == kind


# As of a GPU: kernels on a stream, with and without a mark; what the host did for them; a summary.
GPU_TRACE = """
planes { id: 1 name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "nvjet_hsh_128x256_64x4_NNT" } }
  event_metadata { key: 2 value { id: 2 name: "input_reduce_fusion_2" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  lines { id: 1 name: "Stream #13(Compute)"
    events { metadata_id: 1 duration_ps: 3000000000000 }
    events { metadata_id: 2 duration_ps: 1000000000000 stats { metadata_id: 1 str_value: "x" } } }
  lines { id: 2 name: "XLA Ops" events { metadata_id: 1 duration_ps: 4000000000000 } } }
planes { id: 2 name: "/host:CPU"
  event_metadata { key: 1 value { id: 1 name: "launch" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  lines { id: 1 name: "main" events { metadata_id: 1 duration_ps: 5000000000000
    stats { metadata_id: 1 str_value: "custom-call.1" } } } }
"""


def test_of_a_gpu_the_kernels_on_its_streams_count(tmp_path):
    trace = jax.profiler.ProfileData.text_proto_to_serialized_xspace(GPU_TRACE)
    (tmp_path / "host.xplane.pb").write_bytes(trace)
    assert secs_by_kind(str(tmp_path)) == pytest.approx({"matmuls": 3.0, "reductions": 1.0})


@pytest.mark.slow
def test_the_script_for_gpus_runs_through_on_a_cpu(tmp_path):
    """A lent GPU leaves no time for a slip of the pen. Without nanoGPT, which is only looked for."""
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 500, encoding="utf-8")
    out = tmp_path / "out"
    command = [
        str(ROOT / "benchmarks" / "gpu.sh"),
        "--tiny",
        f"--out={out}",
        f"--shakespeare={text}",
    ]
    environment = {**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, env=environment, check=True)
    lines = (out / "figures.jsonl").read_text(encoding="utf-8").splitlines()
    figures = [json.loads(line) for line in lines]
    ends = [figure for figure in figures if figure["name"].endswith(" ended with")]
    assert len(ends) == 12
    assert all(end["value"] == 0 for end in ends), ends
    wrong = [figure for figure in figures if figure["value"] is False or "error" in figure]
    assert not wrong


@pytest.fixture
def compilations():
    """Names of what is compiled while the test runs."""
    seen = []

    def note(event, secs, **kwargs):
        if event.endswith("backend_compile_duration"):
            seen.append(kwargs.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield seen
    jax.monitoring.unregister_event_duration_listener(note)


def test_steps_compile_once_wait_for_nothing_and_are_not_copied(compilations):
    """A shorter dispatch is the same program, metrics stay on the device, and the state is given
    away.
    """
    config = tiny_config("model.num_layers=1")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        work = Workload(config, mesh)
        with contextlib.closing(work.batches):
            placed, state = work.place(), work.blueprint.init(0)
            for work.count in 2, 1, 2:
                before = jax.tree.leaves(state)
                with jax.transfer_guard_device_to_host("disallow"):
                    state, metrics = work.run(state, placed)
                assert all(leaf.is_deleted() for leaf in before), (
                    "the state is copied at every dispatch"
                )
    assert all(isinstance(metric, jax.Array) for metric in metrics.values())
    assert len(compilations) == 2, compilations  # one program makes the state, one the steps


def dot_flops(jaxpr, times=1):
    """Return the FLOPs of all matrix products of a program, loops included."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += (
                2 * times * eqn.outvars[0].aval.size * math.prod(shape[dim] for dim in contracting)
            )
        inside = times * eqn.params.get("length", 1)
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            value = getattr(value, "jaxpr", value)
            total += dot_flops(value, inside) if hasattr(value, "eqns") else 0
    return total


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": 2, "mlp": "swiglu"}, {"tie_embeddings": False}]
)
def test_a_step_multiplies_as_much_as_the_formula_says(changes):
    """The formula leaves out the hidden half of attention and the padding of the vocabulary, which
    are computed, and the gradients of the norms' scales, which are products with ones on CPU.
    """
    config = tiny_config().editable_copy()
    config.model = tiny_model(**changes)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        blueprint = Workload(config, mesh).blueprint
        batch, key = jax.tree.map(jnp.asarray, random_batch(0)), jax.random.key(0)
        rows = number_rows(batch)
        program = jax.make_jaxpr(lambda params: accumulate(blueprint, params, batch, rows, key))(
            blueprint.abstract.params
        )
    c, tokens = config.model, batch["tokens"].size
    hidden = c.num_layers * 4 * c.num_heads * c.head_dim * (16 - 1) / 2
    padding = 2 * c.embed_dim * (c.padded_vocab - c.vocab_size)
    scales = 2 * c.embed_dim * (2 * c.num_layers + 1)
    expected = tokens * (train_flops_per_token(c, 16) + 3 * (hidden + padding) + scales)
    assert dot_flops(program.jaxpr) == pytest.approx(expected)


def test_the_compiled_step_transposes_and_communicates_no_more_than_it_did():
    """The count is that of jax 0.10 on CPU; lower it when the step gets better, and ask why when it
    gets worse.
    """
    config = tiny_config("model.unroll=1", "train.steps_per_dispatch=1")
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        text = compile_step(config, Workload(config, mesh).blueprint, mesh).as_text()
    assert not re.search(
        r"all-(gather|reduce|to-all)|reduce-scatter|collective-permute|infeed|outfeed|send\(", text
    )
    assert len(re.findall(r" transpose\(", text)) <= 17


def test_the_best_config_keeps_to_the_budget_that_it_names():
    config = load_config("shakespeare_char_best")
    config = config.resolve(65)
    shapes = traverse_util.flatten_dict(abstract_transformer(config.model)[1], sep="/")
    assert (
        count_parameters({path: leaf.shape for path, leaf in shapes.items()}, config.model)
        <= 830_000
    )
    assert config.train.num_steps * config.data.batch_size * config.data.seq_len <= 2000 * 768
    assert config.eval.max_batches == 0, (
        "the loss that it names is that of the whole validation tenth"
    )
