"""Schedules, which parameters are matrices, and what they are moved by."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_model

from tinylm.model.flops import count_parameters, forward_flops_per_token
from tinylm.model.transformer import abstract_transformer
from tinylm.train.config import OptimizerConfig
from tinylm.train.optimizer import is_matrix, make_optimizer, make_schedule


def rates(**settings):
    schedule = make_schedule(
        OptimizerConfig(learning_rate=1.0, min_ratio=0.1, warmup_steps=10, **settings), 110
    )
    return np.array([float(schedule(step)) for step in range(111)])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_to_the_peak_by_equal_steps(name):
    np.testing.assert_allclose(rates(schedule=name)[:10], np.arange(1, 11) / 10, rtol=1e-6)


def test_schedules_end_where_they_should():
    np.testing.assert_allclose(rates(schedule="cosine")[[10, 60, 110]], [1, 0.55, 0.1], atol=1e-6)
    np.testing.assert_allclose(rates(schedule="linear")[[10, 60, 110]], [1, 0.55, 0.1], atol=1e-6)
    np.testing.assert_allclose(rates(schedule="constant")[10:], 1)
    wsd = rates(schedule="wsd", decay_fraction=0.2)
    np.testing.assert_allclose(wsd[10:91], 1)
    np.testing.assert_allclose(wsd[[100, 110]], [0.55, 0.1], atol=1e-6)


def test_matrices_are_kernels_and_embeddings_alone():
    axes = abstract_transformer(
        tiny_model(bias=True, qkv_bias=True, norm="layernorm", tie_embeddings=False, conv_taps=2)
    )[2]
    matrices = {path for path, names in axes.items() if is_matrix(names)}
    assert matrices == {path for path in axes if path.endswith("kernel")} | {"embedding", "head"}


def test_muons_momentum_is_of_matrices_alone():
    """A gradient, then a tenth of it turned round: with momentum a matrix goes on as before,
    without it turns too.
    """
    axes = {"kernel": ("embed", "mlp"), "scale": ("embed",)}
    params = {
        name: jnp.asarray(np.random.default_rng(0).normal(size=[8] * len(axes[name])))
        for name in axes
    }
    second = {}
    for momentum in (0.0, 0.95):
        config = OptimizerConfig(
            name="muon", muon_momentum=momentum, weight_decay=0.0, clip_norm=0.0
        )
        optimizer = make_optimizer(config, 10, axes)
        first, state = optimizer.update(params, optimizer.init(params), params)
        second[momentum], _ = optimizer.update(
            jax.tree.map(lambda g: -g / 10, params), state, params
        )
    np.testing.assert_allclose(second[0.0]["scale"], second[0.95]["scale"])
    assert (
        jnp.vdot(first["kernel"], second[0.95]["kernel"])
        > 0
        > jnp.vdot(first["kernel"], second[0.0]["kernel"])
    )


def test_parameters_and_flops_are_counted_by_formula():
    """By hand: width 32, 2 layers, 4 heads of 8, mlp 128, 65 tokens, 16 positions."""
    config = tiny_model()
    shapes = {}

    def walk(tree, prefix=""):
        for name, leaf in tree.items():
            walk(leaf, f"{prefix}{name}/") if isinstance(leaf, dict) else shapes.update(
                {prefix + name: leaf.shape}
            )

    walk(abstract_transformer(config)[1])
    block = 4 * 32 * 32 + 2 * 32 * 128 + 2 * 32
    assert count_parameters(shapes, config) == 65 * 32 + 2 * block + 32
    flops = 2 * (2 * (4 * 32 * 32 + 2 * 32 * 128) + 4 * 32 * 8.5) + 2 * 32 * 65
    assert forward_flops_per_token(config, 16) == flops
    mixed = tiny_model(attention_window=(4,), local_heads=1)  # which sees 3.625 keys on average
    assert forward_flops_per_token(mixed, 16) == flops - 2 * 4 * 8 * (8.5 - 3.625)


def test_what_muon_leaves_over_is_moved_by_nesterov_adam_without_decay():
    """By hand (Dozat 2016): a first gradient g moves a scale by (b1 m + (1 - b1) g / (1 - b1)) /
    sqrt(v).
    """
    axes = {"kernel": ("embed", "mlp"), "scale": ("embed",)}
    params = {name: jnp.ones([8] * len(names)) for name, names in axes.items()}
    config = OptimizerConfig(
        name="muon", learning_rate=0.01, beta1=0.9, beta2=0.95, clip_norm=0.0, weight_decay=0.5
    )
    optimizer = make_optimizer(config, 10, axes)
    gradient = jax.tree.map(lambda p: p * jnp.linspace(-1, 1, 8), params)
    moved, _ = optimizer.update(gradient, optimizer.init(params), params)
    momentum = 0.9 * 0.1 / (1 - 0.9**2) + 0.1 / (1 - 0.9)
    expected = -0.01 * momentum * np.sign(np.linspace(-1, 1, 8))
    np.testing.assert_allclose(moved["scale"], expected, rtol=1e-4)
    assert momentum == pytest.approx(1.4737, abs=1e-4)


def test_normuon_evens_out_the_outputs_and_keeps_the_rest_of_muon():
    """A first update of two matrices of 4 inputs and 16 outputs, stacked: its outputs get one
    size, each matrix keeps its norm, and what isn't a matrix moves as with Muon.
    """
    axes = {"kernel": ("layers", "embed", "mlp"), "scale": ("embed",)}
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(2, 4, 16))), "scale": jnp.ones(4)}
    gradient = jax.tree.map(lambda p: p * jnp.linspace(0.1, 1, p.shape[-1]), params)
    moved = {}
    for decay in (0.0, 0.95):
        config = OptimizerConfig(name="muon", muon_beta2=decay, weight_decay=0.0)
        optimizer = make_optimizer(config, 10, axes)
        moved[decay], _ = optimizer.update(gradient, optimizer.init(params), params)

    def norms(update, dims):
        return np.linalg.norm(update["kernel"], axis=dims)

    outputs = norms(moved[0.95], 1)
    np.testing.assert_allclose(outputs, outputs[:, :1] * np.ones(16), rtol=1e-4)
    assert np.std(norms(moved[0.0], 1)) > 0.01 * np.mean(norms(moved[0.0], 1))
    np.testing.assert_allclose(norms(moved[0.95], (1, 2)), norms(moved[0.0], (1, 2)), rtol=1e-4)
    np.testing.assert_allclose(moved[0.95]["scale"], moved[0.0]["scale"])


@pytest.mark.parametrize("key", ["name", "schedule"])
def test_an_optimizer_or_schedule_that_is_not_here_is_refused(key):
    config = OptimizerConfig(**{key: "lion"})
    with pytest.raises(ValueError, match=f"optimizer.{key}='lion' has no"):
        make_optimizer(config, 10, {"kernel": ("embed", "mlp")})


@pytest.mark.parametrize("decay", [0.0, 0.95])
def test_muon_moves_each_experts_matrix_as_if_it_were_alone(decay):
    """Experts and layers are stacked; a router, whose outputs are experts, is left to Adam."""
    axes = {
        "up": ("layers", "experts", "embed", "mlp"),
        "down": ("layers", "experts", "mlp", "embed"),
        "router": ("layers", "embed", "experts"),
    }
    rng = np.random.default_rng(0)
    shapes = {"up": (2, 3, 4, 6), "down": (2, 3, 6, 4), "router": (2, 4, 3)}
    gradient = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    def moved(gradient, axes):
        config = OptimizerConfig(name="muon", muon_beta2=decay, weight_decay=0.0, clip_norm=0.0)
        optimizer = make_optimizer(config, 10, axes)
        return optimizer.update(gradient, optimizer.init(gradient), gradient)[0]

    together = moved(gradient, axes)
    for name in ("up", "down"):
        alone = {"kernel": gradient[name][1, 2]}
        one = moved(alone, {"kernel": axes[name][2:]})["kernel"]
        np.testing.assert_allclose(together[name][1, 2], one, rtol=1e-4, atol=1e-7)
    signs = np.sign(together["router"])
    np.testing.assert_array_equal(signs, -np.sign(gradient["router"]))
    np.testing.assert_allclose(
        np.abs(together["router"]), np.abs(together["router"]).mean(), rtol=1e-3
    )
