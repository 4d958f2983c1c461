"""The laws that hold for a training step: any mesh, any grouping, any accumulation give the same
run.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import random_batch, tiny_model, train
from jax.sharding import AbstractMesh, AxisType

from tinylm.core.batch import BatchRows, stack_steps
from tinylm.core.collectives import look_up, sum_over_rows
from tinylm.core.mesh import AXES, MeshConfig, constrain, make_mesh, parameter_sharding
from tinylm.tools.plan import held_bytes
from tinylm.train.config import Config, OptimizerConfig, TrainConfig
from tinylm.train.state import make_blueprint
from tinylm.train.step import make_train_steps

BATCHES = [random_batch(seed) for seed in range(20)]
# Where bits count, loops are fused as they are for users: conftest takes an older way, which
# compiles faster.
AS_FOR_USERS = {"xla_cpu_use_fusion_emitters": True} if jax.__version_info__ < (0, 11) else None
DROPPING = tiny_model(dropout=0.1, conv_taps=4)


@pytest.fixture(scope="module")
def single():
    """The losses of one device, dropout on."""
    return train(MeshConfig(data=1), DROPPING, BATCHES, compiler_options=AS_FOR_USERS)


@pytest.mark.parametrize(
    ("data", "context", "model", "fsdp"),
    [
        (2, 1, 4, True),
        (1, 1, 8, False),
        pytest.param(2, 2, 2, False, marks=pytest.mark.slow),
        pytest.param(8, 1, 1, True, marks=pytest.mark.slow),
        pytest.param(4, 1, 2, False, marks=pytest.mark.slow),
        pytest.param(1, 8, 1, False, marks=pytest.mark.slow),
        pytest.param(2, 4, 1, True, marks=pytest.mark.slow),
    ],
)
def test_every_mesh_gives_the_same_losses(single, data, context, model, fsdp):
    mesh_config = MeshConfig(data=data, context=context, model=model, fsdp=fsdp)
    losses, norms, _ = train(mesh_config, DROPPING, BATCHES)
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)
    np.testing.assert_allclose(norms, single[1], rtol=1e-4)


def test_replicas_give_the_same_losses(single):
    losses, _, _ = train(MeshConfig(replica=2, data=2, model=2), DROPPING, BATCHES)
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)


@pytest.mark.parametrize("length", [16, 5])
def test_a_split_vocabulary_gives_the_same_rows_and_gradient_where_the_mesh_divides_the_length_or_not(
    length,
):
    rng = np.random.default_rng(0)
    table, ids = rng.normal(size=(128, 8)).astype(np.float32), rng.integers(0, 128, (4, length))
    weigh = jnp.asarray(rng.normal(size=(4, length, 8)), jnp.float32)

    def loss(table):
        return jnp.sum(jnp.sin(look_up(table, ids, "float32")) * weigh)

    plain = jax.value_and_grad(loss)(table)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, model=4))):
        meshed = jax.jit(jax.value_and_grad(loss))(table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, meshed)


def test_a_look_up_in_each_replica_takes_rows_in_parts_and_a_table_that_fsdp_splits():
    """XLA's partitioner would abort the process, as said in `look_up`."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 16, (1, 4, 8)))

    def loss(table, ids):
        x_BTD = constrain(look_up(table, ids[0], "float32"), "batch", "positions", None)
        return jnp.sum(jnp.sin(x_BTD) * jnp.arange(8))

    def summed(table, ids):
        return sum_over_rows(jax.value_and_grad(loss), (table,), (ids,), fsdp=True)

    plain = summed(table, ids)
    mesh = make_mesh(MeshConfig(replica=2, data=2, context=2, fsdp=True))
    with jax.set_mesh(mesh):
        placed = jax.device_put(table, parameter_sharding(mesh, True, ("vocab", "embed"), (16, 8)))
        meshed = jax.jit(summed)(placed, ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, meshed)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizers_give_the_same_state_on_a_mesh(name):
    """Every leaf: parameters by how far they were moved, what the optimizer and the guard keep by
    its size.
    """
    model = tiny_model(conv_taps=4)
    start = train(MeshConfig(data=1), model, [], name=name)[2]
    plain = train(MeshConfig(data=1), model, BATCHES[:4], name=name)[2]
    meshed = train(MeshConfig(data=4, model=2, fsdp=True), model, BATCHES[:4], name=name)[2]
    moved = jax.tree.map(np.subtract, plain.params, start.params)
    sizes = dataclasses.replace(plain, params=moved)
    for (path, size), ours, theirs in zip(
        jax.tree.leaves_with_path(sizes),
        jax.tree.leaves(plain),
        jax.tree.leaves(meshed),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        if ".params" in name:
            assert np.any(size), f"{name} was not moved"
        if not np.array_equal(
            ours, theirs
        ):  # as are the infinities of a loss that wasn't measured yet
            assert np.linalg.norm(np.ravel(ours - theirs)) <= 2e-4 * np.linalg.norm(
                np.ravel(size)
            ), name


def test_steps_in_one_dispatch_equal_single_steps_bit_for_bit(single):
    losses, _, state = train(
        MeshConfig(data=1), DROPPING, BATCHES, group=5, compiler_options=AS_FOR_USERS
    )
    assert losses == single[0]
    assert all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(single[2])))


def test_accumulation_equals_the_large_batch(single):
    """Micro-batches hold different numbers of target tokens, and dropout is on."""
    split = [
        {name: x.reshape(4, 2, *x.shape[2:]) for name, x in batch.items()} for batch in BATCHES
    ]
    assert len({float(part.sum()) for part in split[0]["weights"]}) > 1
    losses, norms, _ = train(MeshConfig(data=2), DROPPING, split)
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)
    np.testing.assert_allclose(norms, single[1], rtol=1e-4)


def test_dropout_changes_the_loss(single):
    assert train(MeshConfig(data=1), tiny_model(), BATCHES[:1])[0][0] != single[0][0]


def test_state_is_known_before_it_exists():
    config, mesh_config = tiny_model(), MeshConfig(data=4, model=2, fsdp=True)
    mesh = make_mesh(mesh_config)
    with jax.set_mesh(mesh):
        blueprint = make_blueprint(Config(model=config, mesh=mesh_config), mesh)
        state = blueprint.init(0)

    def same(abstract, leaf):
        assert (abstract.shape, abstract.dtype, abstract.sharding) == (
            leaf.shape,
            leaf.dtype,
            leaf.sharding,
        )

    jax.tree.map(same, blueprint.abstract, state)


@pytest.mark.parametrize("devices", [2, 8, 64, 256, 1024])
def test_fsdp_splits_the_state(devices):
    mesh = AbstractMesh((1, devices, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    config = tiny_model(embed_dim=1024, num_heads=16)
    abstract = make_blueprint(
        Config(model=config, mesh=MeshConfig(data=devices, fsdp=True)), mesh
    ).abstract
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    assert held_bytes(abstract) <= 1.05 * whole / devices


def test_initial_values_do_not_depend_on_the_mesh():
    states = []
    for mesh_config in (MeshConfig(data=1), MeshConfig(data=2, model=4, fsdp=True)):
        mesh = make_mesh(mesh_config)
        with jax.set_mesh(mesh):
            state = make_blueprint(Config(model=tiny_model(), mesh=mesh_config), mesh).init(0)
        states.append(jax.tree.map(np.asarray, state))
    assert all(map(np.array_equal, *map(jax.tree.leaves, states)))


def test_clipping_limits_the_update():
    """With a huge epsilon Adam's update is the gradient over it, so it shrinks as the gradient is
    clipped.
    """
    settings = {"beta1": 0.0, "epsilon": 1e3, "weight_decay": 0.0, "warmup_steps": 0}
    start = train(MeshConfig(data=1), tiny_model(), [], **settings)[2].params["embedding"]
    _, norms, free = train(MeshConfig(data=1), tiny_model(), BATCHES[:1], clip_norm=0.0, **settings)
    _, _, clipped = train(
        MeshConfig(data=1), tiny_model(), BATCHES[:1], clip_norm=norms[0] / 4, **settings
    )
    far, near = (np.abs(state.params["embedding"] - start).max() for state in (free, clipped))
    np.testing.assert_allclose(near, far / 4, rtol=0.05)


def is_schedule(node):
    return isinstance(node, optax.ScaleByScheduleState)


def without_schedules(opt_state):
    return jax.tree.map(
        lambda node: () if is_schedule(node) else node, opt_state, is_leaf=is_schedule
    )


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_with_nothing_to_learn_learns_nothing(name):
    """A batch without target tokens leaves all but the step and the schedule as they were, and then
    all goes on.
    """
    first, last = random_batch(0), random_batch(1)
    empty = {**random_batch(2), "weights": np.zeros_like(first["weights"])}
    settings = {"name": name, "weight_decay": 0.5}
    mesh, model = MeshConfig(data=1), tiny_model(num_layers=1)
    _, _, before = train(mesh, model, [first], **settings)
    losses, norms, after = train(mesh, model, [first, empty], **settings)
    assert np.isnan(losses[1])
    assert norms[1] == 0
    assert (after.step, after.guard.skipped, after.guard.bad_in_row) == (2, 0, 0)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    counts = [
        int(node.count)
        for node in jax.tree.leaves(after.opt_state, is_leaf=is_schedule)
        if is_schedule(node)
    ]
    assert set(counts) == {2}, "the schedule goes on"
    jax.tree.map(
        np.testing.assert_array_equal,
        without_schedules(after.opt_state),
        without_schedules(before.opt_state),
    )
    losses, _, _ = train(mesh, model, [first, empty, last], **settings)
    assert np.isfinite(losses[2])


def test_a_micro_batch_with_nothing_to_learn_adds_nothing():
    batch = random_batch(0, micro=2)
    batch["weights"][1] = 0
    alone = {key: value[:1] for key, value in batch.items()}
    model = tiny_model(num_layers=1)
    with_empty = train(MeshConfig(data=1), model, [batch])
    without = train(MeshConfig(data=1), model, [alone])
    np.testing.assert_allclose(with_empty[0], without[0], rtol=1e-6)
    np.testing.assert_allclose(with_empty[1], without[1], rtol=1e-5)


def test_update_ratios_are_those_of_the_steps_that_are_logged():
    config = Config(
        model=tiny_model(),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        train=TrainConfig(num_steps=9, log_every_steps=2),
    )
    mesh = make_mesh(MeshConfig(data=1))
    with jax.set_mesh(mesh):
        blueprint = make_blueprint(config, mesh)
        steps = make_train_steps(blueprint)
        state = blueprint.init(3)
        embeddings = [np.asarray(state.params["embedding"])]
        ratios = []
        for batch in BATCHES[:3]:
            placed = BatchRows(mesh, batch["tokens"].shape[1]).place(stack_steps([batch]))
            state, metrics = steps(state, placed, 1, 7, 3)
            embeddings.append(np.asarray(state.params["embedding"]))
            ratios.append(float(metrics["update_ratio/embedding"][0]))
    expected = [
        np.linalg.norm(after - before) / np.linalg.norm(before)
        for before, after in itertools.pairwise(embeddings)
    ]
    # Every second step is logged, and the last.
    assert ratios == [0, pytest.approx(expected[1], rel=1e-3), pytest.approx(expected[2], rel=1e-3)]


def test_a_run_that_goes_on_further_needs_no_new_program():
    """Compiling takes minutes for large models, and on GPU a program may be compiled to others."""
    programs = []
    for stop_step in (5, 7):
        train = TrainConfig(num_steps=9, stop_step=stop_step)
        config = Config(model=tiny_model(num_layers=1), train=train)
        mesh = make_mesh(MeshConfig(data=1))
        with jax.set_mesh(mesh):
            blueprint = make_blueprint(config, mesh)
            batch = stack_steps([BATCHES[0]])
            lowered = make_train_steps(blueprint).lower(blueprint.abstract, batch, 1, 7, stop_step)
            programs.append(lowered.as_text())
    assert programs[0] == programs[1]
