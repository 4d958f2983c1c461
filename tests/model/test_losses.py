"""The loss in pieces is the loss at once, and z-loss is its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import random_batch, tiny_model, train

from tinylm.core.mesh import MeshConfig, activation_sharding, make_mesh
from tinylm.inference.evaluation import make_eval_step
from tinylm.model.losses import next_token_loss
from tinylm.model.transformer import abstract_transformer, init_parameters
from tinylm.tools.programs import read_collectives
from tinylm.train.config import Config
from tinylm.train.state import make_blueprint


def compiled(config, params, batch):
    """Return the compiled loss and gradient of a model."""
    graph = abstract_transformer(config)[0]
    return (
        jax.jit(jax.value_and_grad(lambda p: next_token_loss(nnx.merge(graph, p), batch)[0]))
        .lower(params)
        .compile()
    )


def test_a_chunked_loss_is_the_plain_one_and_never_has_all_logits():
    rng, length, vocab = np.random.default_rng(0), 64, 4096
    ids = rng.integers(0, vocab, (4, length + 1))
    batch = {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "weights": (rng.random((4, length)) < 0.7).astype(np.float32),
    }
    results, sizes = [], []
    for chunks in (1, 8):
        config = tiny_model(vocab_size=vocab, context=length, init_std=0.3, loss_chunks=chunks)
        params = jax.jit(functools.partial(init_parameters, config, 0))()
        program = compiled(config, params, batch)
        results.append(program(params))
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    (plain, plain_grads), (pieces, grads) = results
    np.testing.assert_allclose(pieces, plain, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), grads, plain_grads
    )
    assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize(
    ("mesh", "tied"),
    [
        (MeshConfig(data=2, model=2, fsdp=True), True),
        pytest.param(MeshConfig(data=2, model=2, fsdp=True), False, marks=pytest.mark.slow),
        pytest.param(
            MeshConfig(replica=2, data=2, model=2, fsdp=True), True, marks=pytest.mark.slow
        ),
        pytest.param(MeshConfig(data=2, model=2), True, marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=1), True, marks=pytest.mark.slow),
    ],
)
def test_chunks_train_alike_on_a_mesh(mesh, tied):
    batches = [random_batch(i, micro=2) for i in range(3)]
    options = {"dropout": 0.1, "tie_embeddings": tied}
    losses = [
        train(mesh, tiny_model(loss_chunks=chunks, **options), batches)[0] for chunks in (1, 4)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


def test_pieces_gather_the_output_matrix_once_and_sum_its_gradients_once():
    """With fsdp the embedding is gathered for the output, and its gradients are summed, as bfloat16
    and float32; one text of 16 tokens is little.
    """
    vocab = 4096
    model = tiny_model(
        vocab_size=vocab, num_layers=1, loss_chunks=8, compute_dtype="bfloat16", mlp_dim=32
    )
    mesh = make_mesh(MeshConfig(data=2, fsdp=True))
    tokens = jax.ShapeDtypeStruct(
        (2, 16), jnp.int32, sharding=activation_sharding(mesh, ("batch", None), (2, 16))
    )
    batch = {"tokens": tokens, "targets": tokens, "weights": tokens}
    with jax.set_mesh(mesh):
        blueprint = make_blueprint(Config(model=model, mesh=MeshConfig(fsdp=True)), mesh)

        def loss(params, batch):
            return next_token_loss(nnx.merge(blueprint.graph, params), batch)[0]

        gradient = jax.jit(jax.grad(loss), out_shardings=blueprint.shardings.params)
        program = gradient.lower(blueprint.abstract.params, batch).compile()
    sent_bytes = sum(one.bytes_per_step for one in read_collectives(program.as_text(), mesh))
    matrix_numbers = vocab * model.embed_dim
    # A CPU has no bfloat16 products, so its compiler may gather in float32.
    assert sent_bytes < 1.2 * (4 + 4) * matrix_numbers / 2


def test_pieces_may_have_rows_that_the_mesh_does_not_divide():
    """As in `evaluate`, on other devices than those that the run was trained on."""
    batch = {name: x[0, :3] for name, x in random_batch(0).items()}
    sums = []
    for mesh_config in (MeshConfig(data=1), MeshConfig(data=2, fsdp=True)):
        mesh = make_mesh(mesh_config)
        with jax.set_mesh(mesh):
            config = Config(model=tiny_model(loss_chunks=4), mesh=mesh_config)
            blueprint = make_blueprint(config, mesh)
            found = make_eval_step(blueprint.graph)(blueprint.init(0).params, batch)
            sums.append(jax.device_get(found))
    np.testing.assert_allclose(sums[1], sums[0], rtol=1e-5)


def test_z_loss_is_trained_but_not_reported():
    batch = random_batch(0)
    config = tiny_model(init_std=0.3, z_loss=0.1)
    plain, heavy = (
        train(MeshConfig(data=1), tiny_model(init_std=0.3, z_loss=z), [batch]) for z in (0.0, 0.1)
    )
    np.testing.assert_allclose(heavy[0], plain[0], rtol=1e-6)
    graph, params = abstract_transformer(config)[0], jax.jit(lambda: init_parameters(config, 3))()

    def defined(params):
        logits = nnx.merge(graph, params)(batch["tokens"][0])
        log_z = jnp.log(jnp.sum(jnp.exp(logits), axis=-1))
        picked = jnp.take_along_axis(logits, batch["targets"][0][..., None], axis=-1)[..., 0]
        weights = batch["weights"][0]
        return jnp.sum((log_z - picked + 0.1 * log_z**2) * weights) / weights.sum()

    grads = jax.tree.leaves(jax.jit(jax.grad(defined))(params))
    np.testing.assert_allclose(
        heavy[1][0], np.sqrt(sum(np.sum(np.square(g)) for g in grads)), rtol=1e-4
    )
    assert abs(heavy[1][0] / plain[1][0] - 1) > 0.01
