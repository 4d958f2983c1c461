"""Experts: equal to a loop over all of them, no token dropped, and the same on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_batch, tiny_model, train

from tinylm.core import expert_shards
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.model import grouped, layers
from tinylm.model.experts import Experts, even_out, load_metrics, totals
from tinylm.model.flops import count_active_parameters, count_parameters, forward_flops_per_token
from tinylm.model.grouped import from_slots, grouped_matmul, lay_out, to_slots
from tinylm.model.transformer import _REMAT
from tinylm.tools.programs import read_collectives

SMALL = {"num_experts": 4, "expert_dim": 16, "mlp": "swiglu"}
BALANCED = {
    **SMALL,
    "num_experts": 8,
    "shared_experts": 1,
    "dense_layers": 1,
    "num_layers": 3,
    "router_bias_rate": 0.01,
    "router_balance_loss": 0.05,
    "router_z_loss": 1e-3,
}
BATCHES = [random_batch(seed) for seed in range(20)]
ONE = MeshConfig(data=1)


def experts_and_input(**changes):
    """Return (graph, parameters, x_BTD) of a layer whose weights are large."""
    config = tiny_model(init_std=0.5, **{**SMALL, **changes})
    graph, params = nnx.split(Experts(config, rngs=nnx.Rngs(params=0)))
    x_BTD = jax.random.normal(jax.random.key(1), (4, 16, config.embed_dim))
    return config, graph, nnx.to_pure_dict(params), x_BTD


def loop_over_experts(config, params, x_BTD):
    """Compute every expert for every token, in the plainest way, and weigh with 0 what isn't
    chosen.
    """
    logits_BTX = x_BTD @ params["router"]["kernel"]
    softmax = config.router == "softmax"
    scores_BTX = jax.nn.softmax(logits_BTX) if softmax else jax.nn.sigmoid(logits_BTX)
    order_BTX = scores_BTX + params["router"].get("bias", 0.0)
    # By rank: scores that are computed again for a comparison may differ in their last bit.
    rank_BTX = jnp.argsort(jnp.argsort(-order_BTX, axis=-1), axis=-1)
    weights_BTX = jnp.where(rank_BTX < config.experts_per_token, scores_BTX, 0.0)
    if config.router_normalize:
        weights_BTX /= weights_BTX.sum(-1, keepdims=True)
    y_BTD = jnp.zeros_like(x_BTD)
    for expert in range(config.num_experts):
        h_BTF = layers.activate(config.mlp, x_BTD @ params["gate"][expert])
        h_BTF = h_BTF * (x_BTD @ params["up"][expert])
        y_BTD += weights_BTX[..., expert, None] * (h_BTF @ params["down"][expert])
    return y_BTD


def value_and_grads(function, *args):
    """Return a function's result, and the gradients of a sum that weighs each number of it."""
    weigh = jax.random.normal(jax.random.key(2), jax.eval_shape(function, *args).shape)
    gradient = jax.grad(lambda *args: jnp.sum(function(*args) * weigh), argnums=(0, 1))
    return jax.jit(lambda *args: (function(*args), gradient(*args)))(*args)


def assert_close(ours, theirs, tolerance=1e-5):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        scale = max(1.0, float(jnp.abs(other).max()))
        np.testing.assert_allclose(one, other, atol=tolerance * scale, rtol=0)


VARIANTS = [
    {},
    {"router": "sigmoid", "experts_per_token": 3},
    {"router_normalize": False, "router_bias_rate": 0.0},
]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize(
    "mesh",
    [ONE, MeshConfig(data=4, model=2, fsdp=True), MeshConfig(replica=2, context=2, model=2)],
    ids=["one device", "data and model", "replica, context and model"],
)
def test_experts_equal_a_loop_over_all_of_them(changes, mesh):
    """With a bias that changes what is chosen, forward and gradient."""
    config, graph, params, x_BTD = experts_and_input(**changes)
    if "bias" in params["router"]:
        params["router"]["bias"] += jnp.asarray([0.5, 0.0, -0.5, 0.2])

    def ours(params, x_BTD):
        return nnx.merge(graph, params)(x_BTD).y_BTD

    expected = value_and_grads(
        lambda params, x: loop_over_experts(config, params, x), params, x_BTD
    )
    with jax.set_mesh(make_mesh(mesh)):
        found = value_and_grads(ours, params, x_BTD)
    assert_close(found, expected)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("level", [-100.0, 100.0])
def test_weights_and_gradients_are_finite_where_scores_are_0_or_1(router, level):
    """A bias picks two experts although the score of a third one is far greater."""
    config, graph, params, x_BTD = experts_and_input(router=router, router_bias_rate=0.001)
    x_BTD = jnp.zeros_like(x_BTD).at[..., 0].set(1.0)
    kernel = params["router"]["kernel"]
    logits_X = jnp.asarray([level + 100, level, level + 1, level])
    params["router"]["kernel"] = jnp.zeros_like(kernel).at[0].set(logits_X)
    params["router"]["bias"] = jnp.asarray([-5.0, 0.0, 0.1, -5.0])

    def sums_of(kernel_DX):
        router = nnx.merge(graph, params).router
        router.kernel[...] = kernel_DX
        choice, sums = router(x_BTD, jnp.ones(x_BTD.shape[:2]))
        balance = totals(jax.tree.map(lambda x: x[None], sums), config).balance
        return jnp.sum(choice.weights_BTC[..., 0]) + balance, choice

    gradient_DX, choice = jax.grad(sums_of, has_aux=True)(params["router"]["kernel"])
    assert set(np.unique(choice.experts_BTC)) == {1, 2}
    # Where sigmoids are 1, both count the same; elsewhere one logit more is e times the weight.
    larger = 0.5 if (router, level) == ("sigmoid", 100.0) else 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(choice.weights_BTC[..., 0], larger, rtol=1e-6)
    assert np.isfinite(gradient_DX).all()
    if larger != 0.5:
        assert np.abs(gradient_DX).max() > 0


@pytest.mark.parametrize("bias", [0.0, 9.0], ids=["room for all", "all at one device"])
def test_tokens_that_are_sent_to_experts_come_back_as_if_they_had_stayed(bias):
    """Each of four devices has two experts. Where all tokens choose those of one device, it has no
    room for them, and the experts go to the tokens.
    """
    config, graph, params, x_BTD = experts_and_input(num_experts=8, expert_parallel=True)
    params["router"]["bias"] += jnp.asarray([0.0, 0, bias, bias, 0, 0, 0, 0])

    def ours(params, x_BTD):
        return nnx.merge(graph, params)(x_BTD).y_BTD

    expected = value_and_grads(
        lambda params, x: loop_over_experts(config, params, x), params, x_BTD
    )
    with jax.set_mesh(make_mesh(MeshConfig(data=4, model=2, fsdp=True))):
        found = value_and_grads(ours, params, x_BTD)
        text = jax.jit(ours).lower(params, x_BTD).as_text()
    assert "stablehlo.case" in text, "tokens are sent where there is room"
    assert_close(found, expected)


def test_an_exchange_counts_by_the_rows_that_it_sends():
    """There and back, though on CPU all rows are gathered, and in another branch the experts."""
    _, graph, params, x_BTD = experts_and_input(num_experts=8, expert_parallel=True)

    def run(params, x_BTD):
        return nnx.merge(graph, params)(x_BTD).y_BTD

    mesh = make_mesh(MeshConfig(data=4, fsdp=True))
    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(params, x_BTD).compile().as_text()
    sent = {one.kind: one.bytes_per_step for one in read_collectives(text, mesh)}
    rows = 16 * 2  # of a device's tokens, two experts each
    assert sent["all-to-all"] == 2 * rows * 32 * 4 * 3 / 4
    matrix_bytes = 8 * 32 * 16 * 4
    assert sent["all-gather"] < matrix_bytes * 3 / 4


def gradients_of_layer(remat, **changes):
    """Return a function for the gradients of a layer whose backward pass finds what `remat` stores,
    and its arguments.
    """
    _, graph, params, x_BTD = experts_and_input(**changes)

    @_REMAT[remat]
    def run(params, x_BTD):
        return nnx.merge(graph, params)(x_BTD).y_BTD

    def gradients(params, x_BTD):
        return jax.grad(lambda *args: jnp.sum(run(*args) ** 2), argnums=(0, 1))(params, x_BTD)

    return gradients, (params, x_BTD)


@pytest.mark.parametrize(("remat", "exchanges"), [("none", 4), ("dots", 4), ("full", 6)])
def test_rows_are_sent_again_only_where_a_layer_is_computed_again_whole(remat, exchanges):
    gradients, args = gradients_of_layer(remat, num_experts=8, expert_parallel=True)
    mesh = make_mesh(MeshConfig(data=4, fsdp=True))
    with jax.set_mesh(mesh):
        text = jax.jit(gradients).lower(*args).compile().as_text()
    sent = {one.kind: one.bytes_per_step for one in read_collectives(text, mesh)}
    rows = 16 * 2  # of a device's tokens, two experts each
    assert sent["all-to-all"] == exchanges * rows * 32 * 4 * 3 / 4


@pytest.mark.parametrize(("remat", "products"), [("none", 9), ("dots", 9), ("full", 12)])
def test_products_by_expert_are_computed_again_only_in_a_whole_layer(remat, products):
    """Three maps have a product each in the forward pass and two in the backward pass. On CPU each
    is a loop.
    """
    gradients, args = gradients_of_layer(remat)
    with jax.set_mesh(make_mesh(ONE)):
        jaxpr = jax.make_jaxpr(gradients)(*args)
    assert str(jaxpr).count(" while[") == products


@pytest.mark.parametrize(
    ("platform", "size_in", "size_out"),
    [("cpu", 8, 5), pytest.param("tpu", 8, 5, id="ragged_dot"), ("tpu", 128, 256)],
)
def test_groups_meet_their_own_matrix_however_the_rows_are_shared_out(
    platform, size_in, size_out, monkeypatch
):
    """Also where all rows are of one group, none are of some, and rows are of no group. The kernel
    for TPUs, which sizes in whole tiles have, is interpreted.
    """
    kernel_calls = []

    def interpreted(*arguments):
        kernel_calls.append(arguments)
        return kernel(*arguments, interpret=True)

    kernel = grouped.megablox.gmm
    monkeypatch.setattr(grouped, "target_platform", lambda: platform)
    monkeypatch.setattr(grouped.megablox, "gmm", interpreted)
    rng = np.random.default_rng(0)
    x_TD = rng.normal(size=(40, size_in)).astype(np.float32)
    matrices_XDF = rng.normal(size=(3, size_in, size_out)).astype(np.float32)
    shared_out = (
        rng.integers(0, 3, 80),
        np.full(80, 1),
        rng.integers(0, 2, 80) * 2,
        rng.integers(0, 4, 80),
        np.full(80, 3),
    )

    @jax.jit
    def multiply(x_TD, matrices_XDF, group_M):
        layout = lay_out(group_M, 3)
        y_SF = grouped_matmul(to_slots(x_TD, layout), matrices_XDF, layout)
        return from_slots(y_SF, layout)

    def plainly(x_TD, matrices_XDF, group_M):
        with_none_XDF = jnp.concatenate([matrices_XDF, jnp.zeros((1, size_in, size_out))])
        x_MD = jnp.repeat(x_TD, 2, axis=0)
        return jnp.einsum("MD,MDF->MF", x_MD, with_none_XDF[group_M])

    for group_M in shared_out:
        ours = value_and_grads(multiply, x_TD, matrices_XDF, group_M)
        theirs = value_and_grads(plainly, x_TD, matrices_XDF, group_M)
        assert_close(ours, theirs)
    assert bool(kernel_calls) == (size_in == 128)


def test_no_token_is_dropped_where_all_choose_the_same_experts():
    config, graph, params, x_BTD = experts_and_input()
    params["router"]["bias"] += jnp.asarray([0.0, 9.0, 9.0, 0.0])
    made = nnx.merge(graph, params)(x_BTD, counted_BT=jnp.ones(x_BTD.shape[:2]))
    np.testing.assert_array_equal(made.routing.load_BX, [[0, 16, 16, 0]] * 4)
    assert_close(made.y_BTD, loop_over_experts(config, params, x_BTD))
    assert jnp.all(jnp.any(made.y_BTD != 0, axis=-1))


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_gathered_experts_are_not_kept_for_the_backward_pass(expert_parallel):
    """Or a device would have the experts of all layers whole."""
    sizes = {"num_experts": 8, "expert_dim": 64}
    config, graph, params, x_BTD = experts_and_input(**sizes, expert_parallel=expert_parallel)

    def run(params, x_BTD):
        return nnx.merge(graph, params)(x_BTD).y_BTD

    with jax.set_mesh(make_mesh(MeshConfig(data=8, fsdp=True))):
        _, backward = jax.eval_shape(lambda *args: jax.vjp(run, *args), params, x_BTD)
    kept = {leaf.shape for leaf in jax.tree.leaves(backward)}
    whole = config.num_experts * config.embed_dim * config.expert_dim
    # Each device's residuals are stacked on the first axis, where those of one device are whole.
    assert max(np.prod(shape) for shape in kept) < 8 * whole


def test_only_a_batch_that_is_split_tells_that_tokens_stay(monkeypatch):
    """A prompt stays in any case, and a line about it would stand in the text that is written."""
    said = []
    monkeypatch.setattr(expert_shards, "say_once", said.append)
    _, graph, params, x_BTD = experts_and_input(expert_parallel=True)

    def run(params, x_BTD):
        return nnx.merge(graph, params)(x_BTD).y_BTD

    # Eight devices don't divide four experts.
    with jax.set_mesh(make_mesh(MeshConfig(data=8, fsdp=True))):
        jax.eval_shape(run, params, x_BTD[:1])
        assert not said
        jax.eval_shape(run, params, jnp.concatenate([x_BTD, x_BTD]))
    assert len(said) == 1
    assert "does not divide model.num_experts" in said[0]


@pytest.fixture(scope="module")
def single():
    """Losses, gradient norms and state on one device."""
    return train(ONE, tiny_model(**BALANCED), BATCHES)


@pytest.mark.parametrize(
    ("mesh", "expert_parallel"),
    [
        (MeshConfig(data=4, model=2, fsdp=True), True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (MeshConfig(data=1, model=8), False),
                (MeshConfig(data=8), False),
                (MeshConfig(data=8, fsdp=True), False),
                (MeshConfig(data=8, fsdp=True), True),
                (MeshConfig(data=4, model=2), False),
                (MeshConfig(data=4, model=2, fsdp=True), False),
                (MeshConfig(data=2, model=4, fsdp=True), True),
                (MeshConfig(data=2, context=2, model=2), False),
                (MeshConfig(data=2, context=2, model=2, fsdp=True), True),
                (MeshConfig(data=1, context=8), False),
                (MeshConfig(data=2, context=4, fsdp=True), True),
                (MeshConfig(replica=2, data=4), False),
                (MeshConfig(replica=2, data=4, fsdp=True), True),
            ]
        ),
    ],
    ids=str,
)
def test_every_mesh_gives_the_same_losses_and_biases(single, mesh, expert_parallel):
    model = tiny_model(**BALANCED, expert_parallel=expert_parallel)
    losses, norms, state = train(mesh, model, BATCHES)
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)
    np.testing.assert_allclose(norms, single[1], rtol=1e-5)
    bias_LX = state.params["blocks"]["mlp"]["router"]["bias"]
    assert np.any(bias_LX)
    np.testing.assert_array_equal(bias_LX, single[2].params["blocks"]["mlp"]["router"]["bias"])


def test_accumulation_gives_the_same_losses_and_biases(single):
    """Micro-batches hold different numbers of targets; loads and losses are of the whole batch."""
    split = [
        {name: x.reshape(4, 2, *x.shape[2:]) for name, x in batch.items()} for batch in BATCHES
    ]
    losses, norms, state = train(ONE, tiny_model(**BALANCED), split)
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)
    np.testing.assert_allclose(norms, single[1], rtol=1e-4)
    np.testing.assert_array_equal(
        state.params["blocks"]["mlp"]["router"]["bias"],
        single[2].params["blocks"]["mlp"]["router"]["bias"],
    )


def test_the_losses_of_routers_are_trained(single):
    """Without them the gradients differ, and the reported loss is the cross-entropy alone."""
    without = dataclasses.replace(
        tiny_model(**BALANCED), router_balance_loss=0.0, router_z_loss=0.0
    )
    losses, norms, _ = train(ONE, without, BATCHES[:1])
    assert losses[0] == pytest.approx(single[0][0], rel=1e-6)
    assert norms[0] != pytest.approx(single[1][0], rel=1e-4)


def test_the_bias_falls_where_the_load_is_above_the_mean():
    config = tiny_model(**{**SMALL, "router_bias_rate": 0.25})
    params = {"blocks": {"mlp": {"router": {"bias": jnp.zeros((1, 4))}}}, "norm": {}}
    load_LX = jnp.asarray([[7.0, 4.0, 1.0, 4.0]])
    moved = even_out(params, load_LX, config)["blocks"]["mlp"]["router"]["bias"]
    np.testing.assert_array_equal(moved, [[-0.25, 0.0, 0.25, 0.0]])


def test_load_metrics_are_one_where_loads_are_even():
    even = load_metrics(jnp.full((2, 4), 8.0))
    assert {name: float(value) for name, value in even.items()} == pytest.approx(
        dict.fromkeys(even, 1.0)
    )
    one_expert = load_metrics(jnp.asarray([[8.0, 8.0, 8.0, 8.0], [32.0, 0.0, 0.0, 0.0]]))
    assert [float(value) for value in one_expert.values()] == [4.0, 0.0, 0.0]


def test_active_parameters_and_flops_are_those_that_a_token_meets():
    """A model whose tokens go to 2 of 4 experts has the active parameters and the FLOPs of one that
    has 2 experts in all, but for the router.
    """
    many = tiny_model(**{**BALANCED, "num_experts": 4})
    few = tiny_model(**{**BALANCED, "num_experts": 2})
    router_logits = 2 * 32 * 2 * 2  # two layers, two more logits of width 32
    more = forward_flops_per_token(many, 16) - forward_flops_per_token(few, 16)
    assert more == router_logits
    assert count_active(many) - count_active(few) == 2 * 2 * (32 + 1)
    matrices = 3 * 32 * 16
    assert count_all(many) - count_active(many) == 2 * 2 * matrices


def shapes_of(config):
    from flax import traverse_util

    from tinylm.model.transformer import abstract_transformer

    leaves = traverse_util.flatten_dict(abstract_transformer(config)[1], sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def count_active(config):
    return count_active_parameters(shapes_of(config), config)


def count_all(config):
    return count_parameters(shapes_of(config), config)
