"""Scores over real rows: packing doesn't change the loss, and exact match counts whole answers."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.data import open_data
from tinylm.data.config import DataConfig
from tinylm.inference.decode import Decoder
from tinylm.inference.evaluation import evaluate, exact_match, make_eval_step
from tinylm.inference.samplers import Sampler
from tinylm.model.config import ModelConfig
from tinylm.model.transformer import abstract_transformer, init_parameters


@pytest.fixture(scope="module")
def addition(tmp_path_factory):
    """Data of sums below 10, one a row and packed, and a model for it."""
    store = str(tmp_path_factory.mktemp("stores"))
    settings = {"source": "addition:10", "tokenizer": "char", "seq_len": 20, "batch_size": 4, "store_dir": store}
    data = {
        packing: open_data(DataConfig(packing=packing, **settings), seed=0, progress=False)
        for packing in ("single", "packed")
    }
    config = ModelConfig(embed_dim=32, num_layers=2, num_heads=4, init_std=0.3)
    config = config.resolve(data["single"].vocab_size, 20)
    graph = abstract_transformer(config)[0]
    return data, config, graph, jax.jit(lambda: init_parameters(config, 0))()


@pytest.mark.parametrize("devices", [1, 4])
def test_packed_loss_equals_separate_loss(addition, devices):
    data, _, graph, params = addition
    mesh = make_mesh(MeshConfig(data=devices))
    params = jax.device_put(params, jax.NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        step = make_eval_step(graph)
        (nats, count), (packed_nats, packed_count) = (
            evaluate(step, params, data[packing].valid, 4, mesh) for packing in ("single", "packed")
        )
    assert len(data["packed"].valid) < len(data["single"].valid)
    assert packed_count == count
    np.testing.assert_allclose(packed_nats, nats, rtol=1e-5)


def test_exact_match_counts_whole_answers(addition):
    """A completion counts when the greedy answer is it and ends there, whatever else is in the batch."""
    data, config, graph, params = addition
    decoder = Decoder(graph, config.context, data["single"].tokenizer.eot_id, config.vocab_size)
    pairs = data["single"].answers()
    start = data["single"].tokenizer.eot_id
    prompts = [[start, *prompt.tolist()] for prompt, _ in pairs]
    answers = decoder.write(params, prompts, max_tokens=6, sampler=Sampler(0.0))
    ended = [(prompt, np.array(answer)) for (prompt, _), answer in zip(pairs, answers, strict=True) if len(answer) < 6]
    wrong = [(prompt, np.append(answer, 1)) for prompt, answer in ended]
    assert ended, "the model ends no answer; take another seed"
    assert exact_match(decoder, params, ended, start, 4) == 1.0
    assert exact_match(decoder, params, wrong, start, 4) == 0.0
    assert exact_match(decoder, params, ended + wrong, start, 4) == 0.5


def test_a_split_without_targets_is_refused(addition):
    data, _, graph, params = addition

    class Empty:
        def __len__(self):
            return 1

        def read(self, indices):
            return {**data["single"].valid.read(indices), "weights": np.zeros((len(indices), 20), np.float32)}

    mesh = make_mesh(MeshConfig(data=1))
    with jax.set_mesh(mesh), pytest.raises(UserError, match="has no target tokens"):
        evaluate(make_eval_step(graph), params, Empty(), 4, mesh)


def test_no_gradient_crosses_a_packed_document(addition):
    """Of the logits of each document of a packed row, with respect to the inputs of the others."""
    data, config, graph, params = addition
    row = data["packed"].train.read(np.array([0]))
    segments = row["segments"][0]
    assert len(set(segments[segments > 0])) > 1

    def loss_of(table, segment):
        model = nnx.merge(graph, {**params, "embedding": table})
        ids = np.arange(20)[None]  # each position has a row of the embedding to itself
        x_BTD = model.features(ids, segments_BT=row["segments"], positions_BT=row["positions"])
        return (x_BTD[0] ** 2).sum(-1) @ (segments == segment)

    table = np.random.default_rng(0).normal(size=(config.padded_vocab, 32)).astype(np.float32)
    for segment in set(segments[segments > 0].tolist()):
        moved = np.abs(jax.jit(jax.grad(loss_of))(table, segment)[:20]).sum(-1) > 0
        np.testing.assert_array_equal(moved, segments == segment)
