"""Workers that train by themselves: the same run on any mesh and after any kill, syncs that are the
paper's, and nothing between replicas but those.
"""

import re
import shutil

import jax
import numpy as np
import pytest
from helpers import SMALL, lines, packed_batch, random_batch, state_digest, tiny_model

from tinylm.config import load_config
from tinylm.core.batch import BatchRows, stack_steps
from tinylm.core.errors import NumericError, UserError
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.data import pipeline
from tinylm.data.config import DataConfig
from tinylm.tools.plan import compile_step, held_bytes, make_plan
from tinylm.tools.programs import read_collectives
from tinylm.tools.search import search
from tinylm.train import feed, summary
from tinylm.train.config import Config, OptimizerConfig, TrainConfig
from tinylm.train.local_steps import deal_out, fix_workers
from tinylm.train.start import start_run
from tinylm.train.state import make_blueprint
from tinylm.train.step import make_train_steps
from tinylm.view.history import gather
from tinylm.view.plot import PANELS

BATCHES = [random_batch(seed) for seed in range(8)]
MODEL = tiny_model(dropout=0.1, num_layers=1)
FOUR = {"workers": 4, "sync_every_steps": 4}
# Adam with a huge epsilon: its update is the gradient over it.
LIKE_SGD = {"beta1": 0.0, "epsilon": 1e3, "learning_rate": 100.0, "weight_decay": 0.0}
LIKE_SGD |= {"clip_norm": 0.0}
AVERAGED = {"sync_every_steps": 1, "outer_learning_rate": 1.0, "outer_momentum": 0.0}


def make_config(mesh_config, *, model=MODEL, optimizer=None, **settings):
    optimizer = {"learning_rate": 1e-3, "warmup_steps": 2, **(optimizer or {})}
    return Config(
        model=model,
        mesh=mesh_config,
        data=DataConfig(batch_size=8, seq_len=16),
        optimizer=OptimizerConfig(**optimizer),
        train=TrainConfig(**{"num_steps": 20, "log_every_steps": 1, **settings}),
    )


def train(mesh_config, batches=BATCHES, *, model=MODEL, optimizer=None, **settings):
    """Train on host batches, one step each; return the metrics of the steps, and on the host the
    state before the first one and after each.
    """
    config = make_config(mesh_config, model=model, optimizer=optimizer, **settings)
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        blueprint = make_blueprint(config, mesh)
        steps = make_train_steps(blueprint)
        state = blueprint.init(3)
        states = [jax.device_get(state)]
        found = []
        for batch in batches:
            placed = BatchRows(mesh, batch["tokens"].shape[1]).place(stack_steps([batch]))
            state, metrics = steps(state, placed, 1, 7, len(batches))
            states.append(jax.device_get(state))
            found.append({name: float(values[0]) for name, values in metrics.items()})
        return found, states


def of(metrics, name="loss"):
    return [step[name] for step in metrics]


@pytest.fixture(scope="module")
def single():
    """Four workers on one device."""
    return train(MeshConfig(data=1), **FOUR)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(replica=2, data=2, model=2, fsdp=True),
        pytest.param(MeshConfig(replica=4, data=2), marks=pytest.mark.slow),
        pytest.param(MeshConfig(replica=2, data=1, model=4), marks=pytest.mark.slow),
    ],
)
def test_any_mesh_gives_the_same_run_of_as_many_workers(single, mesh):
    metrics, states = train(mesh, **FOUR)
    np.testing.assert_allclose(of(metrics), of(single[0]), rtol=1e-5)
    for name in ("grad_norm", "drift", "outer_grad_norm"):
        np.testing.assert_allclose(of(metrics, name), of(single[0], name), rtol=1e-4)
    for ours, theirs in zip(
        jax.tree.leaves(states[-1].params), jax.tree.leaves(single[1][-1].params), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "optimizer"),
    [
        (MeshConfig(replica=2, data=2, context=2, fsdp=True), "adamw"),
        (MeshConfig(replica=2, data=2, context=2, fsdp=True), "muon"),
        (MeshConfig(replica=2, data=1, context=2, model=2), "muon"),
    ],
)
def test_workers_with_experts_and_rows_in_parts_give_the_same_run(mesh, optimizer):
    """All axes at once: tokens are sent to experts, by devices that have a part of a row each, in
    which one document follows the other.
    """
    model = tiny_model(
        num_layers=1,
        dropout=0.1,
        num_experts=4,
        expert_dim=16,
        expert_parallel=mesh.fsdp,
        loss_chunks=2,
        remat="dots",
    )
    settings = {"workers": 2, "sync_every_steps": 2, "optimizer": {"name": optimizer}}
    batches = [packed_batch(seed, rows=8, length=16) for seed in range(3)]
    alone, _ = train(MeshConfig(data=1), batches, model=model, **settings)
    together, _ = train(mesh, batches, model=model, **settings)
    np.testing.assert_allclose(of(together), of(alone), rtol=1e-5)
    for name in ("grad_norm", "drift", "outer_grad_norm", "router/busiest"):
        np.testing.assert_allclose(of(together, name), of(alone, name), rtol=1e-4)


@pytest.mark.slow
def test_accumulation_gives_the_same_run_of_workers():
    """Each worker has the same rows in two micro-batches."""
    plain = tiny_model(num_layers=1)
    whole, _ = train(MeshConfig(data=1), BATCHES[:4], model=plain, **FOUR)
    split = []
    for batch in BATCHES[:4]:
        # Row i of worker w: micro-batch i has one row of each worker.
        split.append({name: x.reshape(4, 2, -1).swapaxes(0, 1) for name, x in batch.items()})
    found, _ = train(MeshConfig(data=1), split, model=plain, accumulation_steps=2, **FOUR)
    np.testing.assert_allclose(of(found), of(whole), rtol=1e-5)


def test_workers_that_are_averaged_after_each_step_train_as_one_where_updates_add_up():
    """So it is for gradient descent, where all have as many targets: the mean of updates is the
    update of the mean.
    """
    full = []
    for batch in BATCHES:
        full.append({**batch, "weights": np.ones_like(batch["weights"])})
    as_one, _ = train(MeshConfig(data=1), full, optimizer=LIKE_SGD)
    averaged, _ = train(MeshConfig(data=1), full, optimizer=LIKE_SGD, workers=4, **AVERAGED)
    apart, _ = train(MeshConfig(data=1), full, optimizer=LIKE_SGD, workers=4, sync_every_steps=4)
    np.testing.assert_allclose(of(averaged), of(as_one), rtol=1e-5)
    assert abs(of(apart)[3] / of(as_one)[3] - 1) > 1e-4


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_workers_with_the_same_rows_train_as_one_with_any_optimizer(name):
    model = tiny_model(num_layers=1)
    same = []
    for batch in BATCHES[:4]:
        same.append({key: np.tile(x[:, :2], (1, 4, 1)) for key, x in batch.items()})
    as_one, _ = train(MeshConfig(data=1), same, model=model, optimizer={"name": name})
    averaged, _ = train(
        MeshConfig(data=1), same, model=model, optimizer={"name": name}, workers=4, **AVERAGED
    )
    np.testing.assert_allclose(of(averaged), of(as_one), rtol=1e-5)
    np.testing.assert_allclose(of(averaged, "grad_norm"), of(as_one, "grad_norm"), rtol=1e-4)


def test_a_sync_is_a_step_of_nesterov_with_the_mean_difference(single):
    """By hand in NumPy. A run without a sync shows where workers were before one."""
    before, after = single[1][0], single[1][4]
    settings = {**FOUR, "sync_every_steps": 10, "log_every_steps": 3}
    metrics, alone = train(MeshConfig(data=1), BATCHES[:4], **settings)
    # Nothing is told, which replicas would have to exchange, of steps that aren't written down.
    assert [loss > 0 for loss in of(metrics)] == [False, False, True, True]
    own = alone[4].opt_state.workers.params["embedding"]
    outer = before.params["embedding"]
    difference = outer - own.mean(0)
    moved = after.params["embedding"] - outer
    np.testing.assert_allclose(moved, -0.7 * (difference + 0.9 * difference), rtol=1e-3, atol=1e-7)
    # The second sync has a momentum: what it was, times 0.9, and the new difference.
    first = after.opt_state.outer_state[0].trace["embedding"]
    second = single[1][8].opt_state.outer_state[0].trace["embedding"]
    moved = single[1][8].params["embedding"] - after.params["embedding"]
    step = (second - 0.9 * first) + 0.9 * second
    np.testing.assert_allclose(moved, -0.7 * step, rtol=1e-3, atol=1e-7)
    # All begin again at the outer parameters, which stay as they are between syncs.
    for state in single[1][4:8]:
        np.testing.assert_array_equal(state.params["embedding"], after.params["embedding"])
    for worker in after.opt_state.workers.params["embedding"]:
        np.testing.assert_array_equal(worker, after.params["embedding"])
    assert of(single[0], "outer_grad_norm")[2] == 0 < of(single[0], "outer_grad_norm")[3]
    assert of(single[0], "drift")[3] > of(single[0], "outer_grad_norm")[3]


def test_the_biases_of_experts_go_to_the_mean_of_the_workers():
    """Each worker moves them by the rate, up or down, and a sync moves them no further."""
    experts = tiny_model(num_layers=1, num_experts=4, expert_dim=16, router_bias_rate=0.5)
    settings = {"workers": 2, "sync_every_steps": 1}
    _, states = train(MeshConfig(data=1), BATCHES[:1], model=experts, **settings)
    bias_LX = states[1].params["blocks"]["mlp"]["router"]["bias"]
    assert set(np.abs(bias_LX).flat) <= {0.0, 0.25, 0.5}
    assert np.abs(bias_LX).max() > 0


def test_nothing_crosses_between_replicas_but_in_a_sync_and_a_log():
    """A sync sends what a step of plain data parallelism sends (divided among the devices of a
    replica), so per step it is as many times less as there are steps from sync to sync.
    """
    mesh_config = MeshConfig(replica=4, data=2)
    mesh = make_mesh(mesh_config)
    sent = []
    for settings in ({}, {"sync_every_steps": 5}):
        config = make_config(mesh_config, **settings)
        with jax.set_mesh(mesh):
            program = compile_step(config, make_blueprint(config, mesh), mesh).as_text()
        # A step runs the branches of a conditional only where there is something to sync or log.
        always = re.sub(r"branch_computations={[^}]*}", "", program)
        sent.append((between_replicas(program, mesh), between_replicas(always, mesh)))
    (_, as_one), (in_a_sync, in_each_step) = sent
    assert as_one > 1000
    assert in_each_step == 0
    # Data parallelism adds up over replicas and data in one go, which sends (n - 1) / n of 8. In a
    # sync the two devices of a replica send a half each.
    gradients = as_one * (3 / 4) / (7 / 8) / 2
    assert gradients <= in_a_sync <= gradients + 200
    plan = make_plan(config, mesh)
    (row,) = [row for row in plan.collectives if "replica" in row.axis]
    assert row.bytes_per_step == in_a_sync / 5
    assert row.minimum_bytes == pytest.approx(gradients / 5, rel=1e-3)


def test_a_device_holds_what_the_formula_says_and_a_search_knows_it():
    """2 P for the outer parameters and their momentum, and with AdamW 3 P for each worker."""
    config = make_config(MeshConfig(replica=2), sync_every_steps=5, workers=6)
    blueprint = make_blueprint(config, make_mesh(MeshConfig(replica=2, data=1)))
    held = held_bytes(blueprint.abstract)
    size = held_bytes(blueprint.abstract.params)
    assert held == pytest.approx((2 + 3 * 3) * size, rel=1e-2)
    # Of three old workers, which it doesn't divide, each replica holds a half.
    old = held_bytes(blueprint.with_workers(3).abstract)
    assert old == pytest.approx((2 + 1.5 * 3) * size, rel=2e-2)
    rows = search(config, jax.devices()[:4], compiled=0)
    for row in rows:
        assert row.bytes > held / row.mesh["data"]
        # Each worker gets as many rows as another.
        assert row.batch_size % (6 * row.mesh["data"]) == 0


def between_replicas(program, mesh):
    """Return the bytes that a device sends along the replica axis, as a program has them."""
    found = read_collectives(program, mesh)
    return sum(one.bytes_per_step for one in found if "replica" in one.axis)


def test_a_worker_passes_over_its_own_bad_step():
    bad = {**BATCHES[1], "weights": BATCHES[1]["weights"].copy()}
    bad["weights"][:, 2:4] = np.nan
    batches = [BATCHES[0], bad, *BATCHES[2:4]]
    metrics, states = train(MeshConfig(data=1), batches, on_bad_step="skip", **FOUR)
    assert np.isfinite(of(metrics)).all()
    assert of(metrics, "passed_over") == [0, 1, 1, 1]
    assert of(metrics, "passed_over_in_row") == [0, 1, 0, 0]
    old, new = (states[i].opt_state.workers.params["embedding"] for i in (1, 2))
    assert [bool(np.any(old[worker] != new[worker])) for worker in range(4)] == [True, False] + [
        True
    ] * 2
    assert np.isfinite(states[4].params["embedding"]).all()
    assert states[4].step == 4


def test_another_number_of_workers_goes_on_from_the_mean(single):
    """What the next sync would find is left, moments are averaged, counts of steps are kept."""
    old = single[1][6]
    new = deal_out(old.opt_state, 2)
    difference = old.params["embedding"] - old.opt_state.workers.params["embedding"].mean(0)
    for worker in new.workers.params["embedding"]:
        np.testing.assert_allclose(old.params["embedding"] - worker, difference, atol=1e-6)
    np.testing.assert_array_equal(new.workers.step, [6, 6])
    for ours, theirs in zip(
        jax.tree.leaves(new.workers.opt_state),
        jax.tree.leaves(old.opt_state.workers.opt_state),
        strict=True,
    ):
        assert ours.shape == (2, *theirs.shape[1:])
        np.testing.assert_allclose(ours[1], theirs.mean(0), rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(
        jax.tree.leaves(new.outer_state)[0], jax.tree.leaves(old.opt_state.outer_state)[0]
    )
    # At a sync the parameters are the same to the last bit, also where three are averaged.
    at_sync = deal_out(deal_out(single[1][4].opt_state, 3), 2).workers.params["embedding"]
    np.testing.assert_array_equal(at_sync[1], single[1][4].params["embedding"])


FLAGS = [flag.removeprefix("--config.") for flag in SMALL[1:]]
FEW = [
    "train.num_steps=12",
    "train.sync_every_steps=4",
    "eval.every_steps=4",
    "sample.max_tokens=0",
    "writers.plot=False",
    "model.num_layers=1",
    "mesh.data=1",
]


def run(workdir, *overrides):
    trainer = start_run(load_config("tales", [*FLAGS, *FEW, *overrides]), str(workdir))
    try:
        return trainer.run()
    finally:
        trainer.checkpoints.check(wait=True)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """A run of two workers, one a replica, and the same run stopped between two syncs."""
    whole = tmp_path_factory.mktemp("whole")
    run(whole, "mesh.replica=2")
    stopped = tmp_path_factory.mktemp("stopped")
    run(stopped, "mesh.replica=2", "train.stop_step=6")
    return whole, stopped


def test_a_run_that_stops_between_syncs_goes_on_with_the_same_bits(two_workers, tmp_path):
    whole, stopped = two_workers
    again = shutil.copytree(stopped, tmp_path / "again")
    run(again, "mesh.replica=2")
    assert state_digest(again, 12) == state_digest(whole, 12)
    assert lines(again) == lines(whole)


def test_another_mesh_goes_on_with_the_same_workers_and_another_number_where_asked(
    two_workers, tmp_path
):
    whole, stopped = two_workers
    again = shutil.copytree(stopped, tmp_path / "again")
    run(again, "mesh.replica=1", "train.stop_step=8")
    there = lines(whole)
    for step, loss in lines(again).items():
        assert loss == pytest.approx(there[step], rel=1e-5)
    outcome = run(again, "mesh.replica=4", "train.workers=4")
    assert outcome.step == 12
    assert lines(again)[9] == pytest.approx(there[9], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "split",
    [
        ["mesh.replica=2", "mesh.data=2", "mesh.fsdp=True"],
        ["mesh.replica=2", "mesh.model=2"],
    ],
    ids=["fsdp", "model"],
)
def test_parameters_are_split_and_made_whole_again_between_syncs(two_workers, tmp_path, split):
    """There and back between two syncs; and with another number of workers, back at a sync."""
    whole, stopped = two_workers
    again = shutil.copytree(stopped, tmp_path / "again")
    run(again, *split, "train.stop_step=10")
    run(again, "mesh.replica=1")
    alone = shutil.copytree(stopped, tmp_path / "alone")
    changed = shutil.copytree(stopped, tmp_path / "changed")
    for folder, mesh in (alone, ["mesh.replica=1"]), (changed, split):
        run(folder, *mesh, "train.workers=4", "train.stop_step=8")
        run(folder, "mesh.replica=1", "train.workers=2")
    for ours, theirs in (again, whole), (changed, alone):
        found = lines(ours)
        assert sorted(found) == list(range(1, 13))
        for step, loss in found.items():
            assert loss == pytest.approx(lines(theirs)[step], rel=1e-5)


def test_a_report_shows_how_far_workers_drift(two_workers):
    curves = gather(str(two_workers[0])).train
    for name in "drift", "outer_grad_norm":
        assert name in PANELS
        before_a_sync, *after = curves[name][3 - 1 :]
        assert before_a_sync == 0
        assert min(after) > 0


def test_the_moments_of_workers_are_not_taken_over(two_workers, tmp_path):
    start = [f"train.init_from={two_workers[0]}", "train.init_optimizer=True"]
    with pytest.raises(UserError, match="an optimizer for each of its workers"):
        run(tmp_path / "none", "train.sync_every_steps=1", *start)


def test_a_run_ends_at_a_bad_step_of_a_worker(monkeypatch, tmp_path):
    def batches(*arguments, **kwargs):
        for index, batch in pipeline.train_batches(*arguments, **kwargs):
            if index == 2:
                batch["weights"][:, :4] = np.nan
            yield index, batch

    monkeypatch.setattr(feed, "train_batches", batches)
    start = ["train.workers=2", "train.log_every_steps=10", "checkpoint.every_steps=3"]
    with pytest.raises(NumericError, match=r"passed over 1 bad steps up to step 4.* to skip, or"):
        run(tmp_path, *start)
    # The checkpoint of step 3 has the bad step in it, and nobody was told of it.
    again = shutil.copytree(tmp_path, tmp_path.with_name("again"))
    for start_again in start, [*start, "train.workers=4"]:
        with pytest.raises(NumericError, match="passed over 1 bad steps up to step 4"):
            run(again, *start_again)
    assert run(again, *start, "train.on_bad_step=skip", "train.stop_step=8").step == 8
    assert run(again, *start).step == 12


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.num_steps=13"], "num_steps=13 must be divisible by train.sync_every_steps=4"),
        (["train.workers=3", "mesh.replica=2"], "workers=3 must be divisible by mesh.replica=2"),
        (["train.workers=8", "mesh.data=2"], "batch_size=8 must be divisible by the number of wor"),
        (["train.on_bad_step=rollback"], "rollback doesn't go with train.sync_every_steps"),
        (["train.init_from=x", "train.init_optimizer=True"], "init_optimizer doesn't go with"),
        (["eval.patience=2", "eval.every_steps=6"], "that train.sync_every_steps=4 divides"),
    ],
)
def test_what_workers_cannot_do_is_said_at_the_start(overrides, message, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "none", *overrides)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("settings", "num_workers", "warning"),
    [
        (FOUR, 4, ""),
        ({}, 0, ""),
        (FOUR, 1, "one worker has no other to be averaged with"),
        ({**FOUR, "sync_every_steps": 5}, 4, "(eval.every_steps=8) come between syncs"),
    ],
)
def test_settings_of_workers_that_are_seldom_meant_are_warned_of(
    settings, num_workers, warning, monkeypatch
):
    config = make_config(MeshConfig(), **settings)
    config.eval.every_steps = 8
    said = []
    monkeypatch.setattr(summary, "say", said.append)
    summary.say_odd_syncs(config, num_workers)
    assert len(said) == bool(warning)
    assert warning in "".join(said)


def test_a_run_keeps_its_workers_and_one_that_trains_as_one_takes_none():
    mesh = make_mesh(MeshConfig(replica=2, data=1))
    as_one = make_config(MeshConfig(replica=2))
    four = make_config(MeshConfig(replica=2), **FOUR)
    unsaid = make_config(MeshConfig(replica=2), sync_every_steps=4)
    assert fix_workers(unsaid, mesh, None).train.workers == 2
    assert fix_workers(unsaid, mesh, four).train.workers == 4
    assert fix_workers(as_one, mesh, as_one).train.workers == 0
    with pytest.raises(UserError, match="whose devices train as one"):
        fix_workers(make_config(MeshConfig(replica=2), workers=2), mesh, as_one)
