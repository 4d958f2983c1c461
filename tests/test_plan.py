"""A plan compiles the step that the trainer runs, allocates nothing, and says what it costs."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import jax
import pytest
from helpers import ROOT, call_command, run_command

from tinylm.config import load_config
from tinylm.core.chips import find_chip
from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.core.tpu_options import TPU_FLAGS, tpu_compiler_options
from tinylm.plan import topology_devices
from tinylm.tools.plan import make_plan
from tinylm.tools.plan_text import describe, describe_search
from tinylm.tools.search import search

TINY = [
    "--config=tales",
    "--config.model.vocab_size=256",
    "--config.model.embed_dim=64",
    "--config.model.unroll=1",
    "--config.model.num_layers=2",
]
KEYS = {
    "per_device_bytes",
    "chip_bytes",
    "flops_per_step",
    "collectives",
    "hidden_share",
    "step_secs_estimate",
    "fits",
}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler isn't installed (pip install libtpu)",
)


def plan(*arguments):
    done = run_command("tinylm.plan", *TINY, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def small(mesh, *changes):
    """Return a resolved config of two layers, and a mesh of four devices here."""
    settings = [flag.removeprefix("--config.") for flag in TINY[1:]]
    config = load_config(
        "tales", [*settings, *(f"mesh.{key}={value}" for key, value in mesh.items()), *changes]
    )
    config = config.resolve(256)
    return config, make_mesh(config.mesh, jax.devices()[:4])


def test_a_plan_for_simulated_devices_has_every_key_and_the_memory_of_fsdp():
    four = plan("--cpu_devices=4", "--config.mesh.fsdp=true")
    config, _ = small({"fsdp": True})
    one = make_plan(config, make_mesh(config.mesh, jax.devices()[:1]))
    assert set(four) >= KEYS
    assert one.collectives == []
    for kind in "params", "optimizer":
        assert four["per_device_bytes"][kind] == pytest.approx(
            one.per_device_bytes[kind] / 4, rel=0.05
        )
    assert {row["axis"] for row in four["collectives"]} == {"data"}
    assert all(
        row.keys() == {"kind", "axis", "bytes_per_step", "minimum_bytes", "hidden_share"}
        for row in four["collectives"]
    )
    assert four["flops_per_step"] == one.flops_per_step
    assert four["fits"] is True
    # Devices that share a memory have no links that could be hidden.
    assert four["hidden_share"] is None


@pytest.mark.parametrize(
    ("mesh", "axis"), [({"data": 4}, "data"), ({"replica": 2, "data": 2, "fsdp": True}, "replica")]
)
def test_gradients_cross_the_data_axis_or_the_slices_once_a_step_whatever_the_micro_batches(
    mesh, axis
):
    plan = make_plan(*small(mesh, "train.accumulation_steps=4"))
    (row,) = (row for row in plan.collectives if row.axis == axis and row.kind == "all-reduce")
    assert plan.traffic_from == "compiled program"
    assert row.bytes_per_step == pytest.approx(row.minimum_bytes, rel=0.01)


def test_a_program_that_cannot_be_printed_has_the_traffic_of_the_formula(monkeypatch):
    monkeypatch.setattr(jax.stages.Compiled, "as_text", lambda self: 1 / 0)
    plan = make_plan(*small({"data": 4}))
    assert plan.traffic_from == "formula"
    assert plan.collectives[0].bytes_per_step == plan.collectives[0].minimum_bytes > 0
    assert plan.per_device_bytes["activations"] > 0
    assert "from the formula" in describe(plan)
    assert "to experts" not in describe(plan)
    exchange = dataclasses.replace(plan.collectives[0], kind="all-to-all")
    assert "CPUs gather all for it" in describe(dataclasses.replace(plan, collectives=[exchange]))


def test_a_search_ranks_what_fits_and_its_formula_is_near_the_compiler():
    config = load_config("tales", [flag.removeprefix("--config.") for flag in TINY[1:]])
    config = config.resolve(256)
    rows = search(config, jax.devices()[:4], compiled=1)
    assert {(row.mesh["data"], row.mesh["model"], row.fsdp) for row in rows} == {
        (4, 1, True),
        (4, 1, False),
        (2, 2, True),
        (2, 2, False),
        (1, 4, False),
    }
    assert {row.remat for row in rows} == {"none", "dots", "full"}
    best = rows[0]
    assert best.fits is True
    assert best.as_json().keys() - rows[-1].as_json().keys() == {"fits"}, "not known by formula"
    assert best.compiled_bytes == pytest.approx(best.bytes, rel=0.5)
    assert best.batch_size % best.mesh["data"] == 0
    assert f"--config.mesh.data={best.mesh['data']} " in describe_search(rows)
    for mesh in (1, 4), (2, 2), (4, 1):
        batches = [
            next(
                row.batch_size
                for row in rows[1:]
                if (row.mesh["data"], row.mesh["model"]) == mesh and row.remat == remat
            )
            for remat in ("none", "full")
        ]
        assert batches[0] <= batches[1], "recomputing leaves room for more rows"


def test_compiled_rows_are_ranked_by_what_the_compiler_says(monkeypatch):
    """The row that the formula takes for the fastest is slower, and the next doesn't fit."""
    config = load_config("tales", [flag.removeprefix("--config.") for flag in TINY[1:]])
    config = config.resolve(256)
    by_formula = search(config, jax.devices()[:4], compiled=0)
    compiled = []

    def compile_one(config, row, devices):
        secs, fits = [(3.0, True), (1.0, False), (2.0, True)][len(compiled)]
        compiled.append(row)
        return dataclasses.replace(row, compiled_secs_per_token=secs, fits=fits)

    monkeypatch.setattr("tinylm.tools.search._compiled", compile_one)
    rows = search(config, jax.devices()[:4], compiled=3)
    assert [row.compiled_secs_per_token for row in rows[:3]] == [2.0, 3.0, 1.0]
    assert compiled == by_formula[:3] and rows[3:] == by_formula[3:]


def test_a_search_in_which_nothing_fits_says_so():
    config = load_config("tales", ["model.vocab_size=256", "data.seq_len=1000000000"])
    config = config.resolve(256)
    with pytest.raises(UserError, match="nothing fits"):
        search(config, jax.devices()[:2])


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("length", "context", "remat"), [(65_536, 4, "none"), (65_536, 16, "full"), (1024, 1, "full")]
)
def test_formulas_of_memory_and_of_long_rows_are_near_the_tpu_compiler(length, context, remat):
    plain = ["optimizer.name=adamw", "train.accumulation_steps=1"]
    config = load_config("llama:42m", [f"data.seq_len={length}", *plain]).resolve(0)
    devices = topology_devices("v5e:4x4", 1)
    (row,) = (
        row
        for row in search(config, devices, compiled=0)
        if (row.mesh["context"], row.mesh["model"], row.remat) == (context, 1, remat)
        and row.fsdp == (row.mesh["data"] > 1)
    )
    trial = config.editable_copy()
    trial.mesh = row.mesh_config
    trial.model.remat = remat
    trial.data.batch_size = row.batch_size
    trial.freeze()
    found = make_plan(trial, make_mesh(trial.mesh, devices))
    assert found.per_device_bytes["total"] == pytest.approx(row.bytes, rel=0.25)
    # Keys and values. Over all chips of a torus the compiler adds their gradients up whole.
    for sent in found.collectives:
        if sent.axis == "context" and sent.kind == "all-gather":
            assert sent.bytes_per_step == pytest.approx(sent.minimum_bytes, rel=0.15)


@pytest.mark.slow
@needs_libtpu
def test_fsdp_on_a_topology_sends_what_the_formula_says():
    wide = [
        "--config.model.embed_dim=1024",
        "--config.model.num_heads=16",
        "--config.data.seq_len=256",
    ]
    # Muon gathers whole matrices, which the formula doesn't have.
    plain = "--config.optimizer.name=adamw"
    found = plan("--topology=v5e:4x4", "--config.mesh.fsdp=true", plain, *wide)
    sent, least = (
        sum(row[key] for row in found["collectives"]) for key in ("bytes_per_step", "minimum_bytes")
    )
    assert 0.5 * least < sent < 1.15 * least
    assert found["chip_bytes"] == 16 * 2**30


@pytest.mark.slow
@needs_libtpu
def test_tokens_sent_to_experts_on_a_topology_are_what_the_formula_says():
    """The partitioner looks the embedding up by an all-to-all, too; experts are never gathered."""
    found = plan(
        "--topology=v5e:4x4",
        "--config.mesh.fsdp=true",
        "--config.optimizer.name=adamw",
        "--config.model.embed_dim=256",
        "--config.model.num_heads=2",
        "--config.model.num_layers=6",
        "--config.model.num_experts=16",
        "--config.model.expert_dim=256",
        "--config.model.expert_parallel=true",
        "--config.data.seq_len=256",
    )
    [row] = [row for row in found["collectives"] if row["kind"] == "all-to-all"]
    assert row["axis"] == "data"
    assert row["bytes_per_step"] == pytest.approx(row["minimum_bytes"], rel=0.15)
    expert_bytes = 2 * 6 * 2 * 16 * 256 * 256  # bfloat16, six layers of two maps
    gathered = sum(r["bytes_per_step"] for r in found["collectives"] if r["kind"] == "all-gather")
    assert gathered < expert_bytes


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("fsdp", ["false", "true"])
def test_one_all_reduce_crosses_slices(fsdp):
    """Each device of a slice sends a part of the gradients, once a step, whatever the micro-batches,
    and whether or not it holds all of them. Sizes are whole tiles, or what is sent would be padded.
    """
    found = plan(
        "--topology=v5e:2x2",
        "--slices=2",
        "--config.mesh.replica=2",
        f"--config.mesh.fsdp={fsdp}",
        "--config.train.accumulation_steps=2",
        "--config.model.embed_dim=256",
        "--config.model.num_heads=2",
    )
    assert found["traffic_from"] == "compiled program"
    (across,) = [row for row in found["collectives"] if "replica" in row["axis"]]
    assert (across["kind"], across["axis"]) == ("all-reduce", "replica")
    part_bytes = found["per_device_bytes"]["params"] / (1 if fsdp == "true" else 4)
    assert across["bytes_per_step"] == pytest.approx(part_bytes, rel=0.01)
    assert found["mesh"] == {"replica": 2, "data": 4, "context": 1, "model": 1}


MATRIX = """
import sys
import jax
from tinylm.core import log
log.start()
jax.config.update("jax_platforms", "cpu")
from tinylm.config import load_config
from tinylm.core.mesh import make_mesh
from tinylm.plan import topology_devices
from tinylm.tools.plan import make_plan
devices = topology_devices("v5e:2x2", 1)
for unroll, kernel, micro in [(0, "xla", 1), (1, "splash", 2), (2, "splash", 1), (0, "splash", 2)]:
    case = [f"model.unroll={unroll}", f"model.attention={kernel}", f"train.accumulation_steps={micro}"]
    print(*case, flush=True)
    config = load_config("tales", [*sys.argv[1:], *case])
    config = config.resolve(256)
    make_plan(config, make_mesh(config.mesh, devices))
print("all compiled")
"""


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    "mesh",
    [
        ["mesh.model=2"],
        ["mesh.model=4"],
        ["mesh.fsdp=True"],
        ["mesh.model=2", "mesh.fsdp=True"],
        ["mesh.replica=2", "mesh.fsdp=True"],
        ["mesh.replica=2", "mesh.model=2"],
    ],
)
def test_a_tpu_program_compiles_for_each_way_to_unroll_attend_and_accumulate(mesh):
    """The compiler aborts its process where it fails: what was printed last names the case."""
    small = [
        "model.vocab_size=256",
        "model.embed_dim=64",
        "model.num_layers=2",
        "data.seq_len=128",
        *mesh,
    ]
    done = subprocess.run(
        [sys.executable, "-c", MATRIX, *small], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout.endswith("all compiled\n"), done.stdout.splitlines()[-1] + done.stderr[:2000]
    if mesh[0] == "mesh.replica=2" or mesh == ["mesh.model=2"]:
        assert "model.unroll=0 counts as 1" in done.stderr, (
            "rows are summed by hand around the kernel"
        )


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "devices"), [("v4:2x2x1", 4), ("v5e:2x2", 4), ("v5p:2x2x1", 4), ("tpu7x:2x2x1", 8)]
)
def test_a_topology_has_the_devices_that_jax_counts_and_their_chip_is_known(topology, devices):
    found = topology_devices(topology, 1)
    assert len(found) == devices
    assert find_chip(found[0]) is not None


# A program of one layer whose parameters are split over so many chips that each has 8 columns.
MANY_CHIPS = [
    "mesh.fsdp=true",
    "model.embed_dim=2048",
    "model.num_layers=4",
    "model.unroll=1",
    "model.num_heads=32",
    "model.mlp_dim=8192",
    "data.batch_size=256",
    "data.seq_len=1024",
    "train.accumulation_steps=1",
    "optimizer.name=adamw",
]
TOPOLOGIES = {
    "TPU v5 lite": "v5e:16x16",
    "TPU v5": "v5p:4x8x8",
    "TPU v6 lite": "v6e:16x16",
    "TPU7x": "tpu7x:4x4x8",
}


def hidden_share_on_many_chips(kind):
    config = load_config("llama:110m", MANY_CHIPS)
    config = config.resolve(0)
    return make_plan(
        config, make_mesh(config.mesh, topology_devices(TOPOLOGIES[kind], 1))
    ).hidden_share


@pytest.mark.slow
@needs_libtpu
def test_a_flag_that_the_tpu_compiler_does_not_know_is_left_out(monkeypatch):
    mesh = make_mesh(MeshConfig(), topology_devices("v5e:2x2", 1))
    known = TPU_FLAGS[0]
    unknown = dataclasses.replace(known, name="xla_tpu_nobody_knows")
    monkeypatch.setattr("tinylm.core.tpu_options.TPU_FLAGS", (known, unknown))
    with jax.set_mesh(mesh):
        assert tpu_compiler_options(mesh) == {known.name: known.value}


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_each_flag_of_the_tpu_compiler_lets_products_hide_more(monkeypatch, kind):
    """Where this fails, the compiler has learned to do without the flag, or ignores it."""
    with_all = hidden_share_on_many_chips(kind)
    for flag in TPU_FLAGS:
        if kind not in flag.kinds:
            continue
        others = tuple(other for other in TPU_FLAGS if other != flag)
        monkeypatch.setattr("tinylm.core.tpu_options.TPU_FLAGS", others)
        without = hidden_share_on_many_chips(kind)
        print(f"{kind}: {with_all:.2f}, without {flag.name} {without:.2f}")
        assert with_all > without + 0.03
    assert {kind for flag in TPU_FLAGS for kind in flag.kinds} == set(TOPOLOGIES)


@pytest.mark.slow
@needs_libtpu
def test_a_mesh_axis_may_be_a_part_of_one_of_the_torus():
    mesh = make_mesh(MeshConfig(model=4), topology_devices("v5p:8x8x16", 1))
    assert dict(mesh.shape) == {"replica": 1, "data": 256, "context": 1, "model": 4}
    assert len(set(mesh.devices.flat)) == 1024


@pytest.mark.slow
@needs_libtpu
def test_a_model_that_does_not_fit_names_what_to_change():
    wide = ["--topology=v5e:1x1", "--config.model.embed_dim=8192", "--config.model.mlp_dim=32768"]
    done = run_command("tinylm.plan", *TINY, *wide)
    assert done.returncode == 0, done.stderr
    assert "does not fit" in done.stdout
    assert "mesh.fsdp=true" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            [
                "--cpu_devices=8",
                "--config.model.vocab_size=0",
                "--config.data.tokenizer=char",
                "--config.data.source=text:x",
            ],
            "typically 66 for",
        ),
        ([], "either --topology"),
        (["--topology=v5e:4x4", "--cpu_devices=8"], "either --topology"),
        (["--slices=2", "--cpu_devices=8"], "--slices=2 needs --topology"),
    ],
)
def test_mistakes_are_one_line(arguments, wanted):
    done = call_command("tinylm.plan", *TINY, *arguments)
    assert done.returncode == 2
    assert wanted in done.stderr
    assert done.stderr.count("\n") == 1
