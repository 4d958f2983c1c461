"""Scores over real rows: packing doesn't change the loss, and exact match counts whole answers."""

import dataclasses
import json

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
from tinylm.inference.evaluation import (
    check_pairs,
    evaluate,
    exact_match,
    final_answers,
    make_eval_step,
)
from tinylm.inference.samplers import Sampler
from tinylm.model.config import ModelConfig
from tinylm.model.transformer import abstract_transformer, init_parameters


@pytest.fixture(scope="module")
def addition(tmp_path_factory):
    """Data of sums below 10, one a row and packed, and a model for it."""
    store = str(tmp_path_factory.mktemp("stores"))
    settings = {
        "source": "addition:10",
        "tokenizer": "char",
        "seq_len": 20,
        "batch_size": 4,
        "store_dir": store,
    }
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
            evaluate(step, params, data[packing].valid, mesh, rows=4)
            for packing in ("single", "packed")
        )
    assert len(data["packed"].valid) < len(data["single"].valid)
    assert packed_count == count
    np.testing.assert_allclose(packed_nats, nats, rtol=1e-5)


def test_exact_match_counts_whole_answers(addition):
    """A completion counts when the greedy answer is it and ends there, whatever else is in the
    batch.
    """
    data, config, graph, params = addition
    decoder = Decoder(graph, config.context, data["single"].tokenizer.eot_id, config.vocab_size)
    pairs = data["single"].answers()
    start = data["single"].tokenizer.eot_id
    prompts = [[start, *prompt.tolist()] for prompt, _ in pairs]
    answers = decoder.write(params, prompts, max_tokens=6, sampler=Sampler(0.0))
    ended = [
        (prompt, np.array(answer))
        for (prompt, _), answer in zip(pairs, answers, strict=True)
        if len(answer) < 6
    ]
    wrong = [(prompt, np.append(answer, 1)) for prompt, answer in ended]
    assert ended, "the model ends no answer; take another seed"
    assert exact_match(decoder, params, ended, start_id=start, rows=4) == 1.0
    assert exact_match(decoder, params, wrong, start_id=start, rows=4) == 0.0
    batches = []
    settings = {"start_id": start, "rows": 4, "before_batch": lambda: batches.append(1)}
    assert exact_match(decoder, params, ended + wrong, **settings) == 0.5
    assert len(batches) == -(-len(ended + wrong) // 4), (
        "a training looks between them whether it is to stop"
    )


@pytest.mark.parametrize("pattern", ["= *([0-9]+)", "[0-9]+$", "([0-9]+)"])
def test_final_answers_are_compared_alone(addition, pattern):
    """However they were worked out, and by whatever tokens they are spelled."""
    tokenizer = addition[0]["single"].tokenizer
    is_right = final_answers(tokenizer, pattern)
    prompt, completion = (np.array(tokenizer.encode(text)) for text in ("1+4=", "2+3=5"))
    for answer, right in (
        ("5", False),
        ("4+1=5", True),
        ("1+1=2 5+0=5", True),
        ("2+3=15", False),
        ("=", False),
    ):
        if "=" in pattern or answer != "5":
            ids = [tokenizer.encode(character)[0] for character in answer if character != " "]
            assert is_right(prompt, completion, ids) == right, answer


def test_final_answers_count_in_exact_match(addition):
    data, config, graph, params = addition
    tokenizer = data["single"].tokenizer
    decoder = Decoder(graph, config.context, tokenizer.eot_id, config.vocab_size)
    pairs = data["single"].answers(8)
    settings = {"start_id": tokenizer.eot_id, "rows": 4}
    anything = exact_match(
        decoder, params, pairs, is_right=final_answers(tokenizer, "^"), **settings
    )
    assert anything == 1.0, "the empty beginning of both"
    assert (
        exact_match(
            decoder, params, pairs, is_right=final_answers(tokenizer, "[0-9]+$"), **settings
        )
        < 1.0
    )


@pytest.mark.parametrize(
    ("pairs", "pattern", "wanted"),
    [
        ([], "", "--exact_match needs validation pairs"),
        (
            [("1+1=" * 5, "2")],
            "",
            r"a prompt of 21 tokens.* must be shorter than the context \(20\)",
        ),
        (
            [("1+1=", "2"), ("1+2=", "3")],
            "#### (.+)",
            r"--answer_pattern=#### \(\.\+\) finds nothing in .*'2'",
        ),
    ],
)
def test_pairs_that_cannot_be_counted_are_refused(addition, pairs, pattern, wanted):
    tokenizer = addition[0]["single"].tokenizer
    encoded = [
        (np.array(tokenizer.encode(prompt)), np.array(tokenizer.encode(text)))
        for prompt, text in pairs
    ]
    with pytest.raises(UserError, match=wanted):
        check_pairs(encoded, 20, tokenizer, pattern, ("--exact_match", "--answer_pattern"))


def test_a_limit_counts_batches_whatever_the_micro_batches(addition):
    data, _, graph, params = addition
    mesh = make_mesh(MeshConfig(data=1))
    with jax.set_mesh(mesh):
        step = make_eval_step(graph)
        nats, count = evaluate(step, params, data["single"].valid, mesh, rows=4, max_batches=1)
        split = evaluate(
            step, params, data["single"].valid, mesh, rows=2, micro_batches=2, max_batches=1
        )
        whole = evaluate(step, params, data["single"].valid, mesh, rows=4)
    assert count < whole[1], "there is more than one batch"
    assert split == pytest.approx((nats, count), rel=1e-5)


@pytest.mark.parametrize("tokenizer", ["char", "bpe:260"])
def test_bytes_of_answers_alone_are_those_that_carry_loss(tmp_path, tokenizer):
    """Beside a long prompt, a document without one, all of which carries loss."""
    records = [{"prompt": f"Question {'x' * i}? ", "completion": f"ž{i}"} for i in range(40)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = {
        "tokenizer": tokenizer,
        "seq_len": 64,
        "batch_size": 1,
        "store_dir": str(tmp_path / "s"),
    }
    config = DataConfig(source=f"jsonl:{path}", packing="single", **settings)
    whole, answers = (
        open_data(dataclasses.replace(config, loss_on=loss_on), seed=0, progress=False)
        for loss_on in ("all", "answer")
    )
    held_out = [(p, c) for p, c in answers.answers()]
    texts = [answers.tokenizer.decode_after(p.tolist(), c.tolist()) for p, c in held_out]
    prompts = [answers.tokenizer.decode(p.tolist()) for p, _ in held_out]
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(c) + 1 for _, c in held_out)
    assert answers.valid_tokens == tokens
    assert answers.valid_bytes_per_token() == size / tokens
    in_all = size + sum(len(prompt) for prompt in prompts)
    assert whole.valid_bytes_per_token() == in_all / (
        tokens + sum(len(prompt) for prompt, _ in held_out)
    )
    counted = sum(
        float(answers.valid.read(np.array([row]))["weights"].sum())
        for row in range(len(answers.valid))
    )
    assert counted == tokens


def test_bytes_are_those_of_the_sources_that_the_first_rows_are_of(tmp_path):
    """Of two sources, whose characters have one byte and two."""
    for name, character in (("a", "a"), ("b", "ž")):
        (tmp_path / f"{name}.txt").write_text("|".join([character * 31] * 40))
    config = DataConfig(
        source=f"0.5*text:{tmp_path}/a.txt, 0.5*text:{tmp_path}/b.txt",
        separator="|",
        tokenizer="char",
        seq_len=32,
        batch_size=2,
        packing="single",
        store_dir=str(tmp_path / "s"),
    )
    data = open_data(config, seed=0, progress=False)
    first, second = data.valid_rows
    assert first == second == len(data.valid) / 2
    assert data.valid_bytes_per_token(1) == data.valid_bytes_per_token(first) == 31 / 32
    assert (
        data.valid_bytes_per_token()
        == data.valid_bytes_per_token(2 * first)
        == pytest.approx(1.5 * 31 / 32)
    )
    assert data.valid_bytes_per_token(first + first // 2) == pytest.approx(
        (1 + 2 * 0.5) / 1.5 * 31 / 32
    )


def test_a_split_without_targets_has_no_loss(addition):
    data, _, graph, params = addition

    class Empty:
        def __len__(self):
            return 1

        def read(self, indices):
            return {
                **data["single"].valid.read(indices),
                "weights": np.zeros((len(indices), 20), np.float32),
            }

    mesh = make_mesh(MeshConfig(data=1))
    with jax.set_mesh(mesh):
        assert evaluate(make_eval_step(graph), params, Empty(), mesh, rows=4) == (0, 0)


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
