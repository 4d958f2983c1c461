"""Writing: prompts of unequal length, the end of a text, the edge of the context, ids that no
tokenizer knows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_model

from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.inference.decode import Decoder, _bucket
from tinylm.inference.samplers import Sampler
from tinylm.model.transformer import abstract_transformer, init_parameters

GREEDY, END = Sampler(temperature=0.0), 0


@pytest.fixture(scope="module")
def model():
    """A graph, its parameters, and a decoder that knows 60 of the 65 ids."""
    config = tiny_model(init_std=0.3)
    graph = abstract_transformer(config)[0]
    return graph, jax.jit(lambda: init_parameters(config, 1))(), Decoder(graph, 16, END, 60)


def test_greedy_text_is_the_argmax_of_the_full_forward(model):
    graph, params, decoder = model
    prompts = [[5, 9, 3], [7]]
    forward = jax.jit(lambda tokens: nnx.merge(graph, params)(tokens))
    for prompt, got in zip(
        prompts, decoder.write(params, prompts, max_tokens=8, sampler=GREEDY), strict=True
    ):
        ids = list(prompt)
        for _ in range(8):
            padded = jnp.asarray([ids + [1] * (16 - len(ids))])
            ids.append(int(forward(padded)[0, len(ids) - 1, :60].argmax()))
        wanted = ids[len(prompt) :]
        assert got == (wanted[: wanted.index(END)] if END in wanted else wanted)


def test_a_cache_whose_slots_a_mesh_splits_gives_the_same_text(model):
    graph, params, decoder = model
    prompts = [[5, 9, 3], [7]]
    wanted = decoder.write(params, prompts, max_tokens=20, sampler=GREEDY)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, context=4, model=2))):
        on_mesh = Decoder(graph, 16, END, 60)
        writing = on_mesh._read(params, prompts, np.zeros(2, bool), 8, GREEDY)
        slots = writing.cache[0].keys_BKSH.sharding.shard_shape(writing.cache[0].keys_BKSH.shape)[2]
        got = on_mesh.write(params, prompts, max_tokens=20, sampler=GREEDY)
    assert slots == writing.cache[0].num_slots / 4
    assert got == wanted


def test_a_text_goes_on_past_the_context(model):
    """Where the context is full, its last half is read again: each token is the argmax of a full
    forward over that.
    """
    graph, params, decoder = model
    prompts = [[5 + i, 9, 3] for i in range(4)]
    stream = decoder.stream(params, prompts, max_tokens=40, sampler=GREEDY)
    rows = np.concatenate([ids for ids, _ in stream], axis=1)
    forward = jax.jit(lambda tokens: nnx.merge(graph, params)(tokens))
    seen = [list(prompt) for prompt in prompts]
    for t in range(rows.shape[1]):
        seen = [ids[-8:] if len(ids) == 16 else ids for ids in seen]
        padded = jnp.asarray([ids + [1] * (16 - len(ids)) for ids in seen])
        wanted = forward(padded)[:, len(seen[0]) - 1, :60].argmax(-1)
        for row, ids in enumerate(seen):
            if END not in rows[row, :t]:
                assert rows[row, t] == wanted[row], (row, t)
            ids.append(int(rows[row, t]))
    assert max(list(row).index(END) if END in row else len(row) for row in rows) > 2 * 16
    assert rows.shape[1] <= 40


def test_lengths_are_rounded_up_to_few_others():
    short = [_bucket(length) for length in range(1, 2**13 + 1)]
    assert set(short) == {16 << i for i in range(10)}
    for length in (2**13 + 1, 10_000, 2**17 + 1, 600_000, 2**20 - 1, 2**20, 2**20 + 1):
        assert length <= _bucket(length) <= 1.125 * length + 1024
    assert len({_bucket(length) for length in range(2**19 + 1, 2**20 + 1, 997)}) == 8


def test_only_known_ids_are_drawn_and_the_end_stays(model):
    _, params, decoder = model
    stream = decoder.stream(
        params, [[i + 1] for i in range(32)], max_tokens=13, sampler=Sampler(50.0), seed=3
    )
    rows = np.concatenate([ids for ids, _ in stream], axis=1)
    assert rows.max() < 60
    assert len(np.unique(rows)) > 40
    for row in rows:
        if END in row:
            assert (row[list(row).index(END) :] == END).all()


def test_any_of_several_ends_ends_a_text(model):
    """A second end is written as the first, with its own log-probability."""
    graph, params, decoder = model
    prompt = [[5, 9, 3]]
    plain = decoder.write(params, prompt, max_tokens=8, sampler=GREEDY)[0]
    assert plain[2] not in plain[:2], "greedy text repeats at once; take another prompt"
    ending = Decoder(graph, 16, END, 60, (61, plain[2]))
    assert ending.write(params, prompt, max_tokens=8, sampler=GREEDY)[0] == plain[:2]
    [(ids, scores)] = ending.stream(params, prompt, max_tokens=8, sampler=GREEDY, scored=True)
    [(_, plain_scores)] = decoder.stream(params, prompt, max_tokens=8, sampler=GREEDY, scored=True)
    assert ids[0].tolist() == [*plain[:2], *[END] * 6]
    np.testing.assert_array_equal(scores[0, :3], plain_scores[0, :3])


def test_a_seed_decides_the_text(model):
    _, params, decoder = model
    texts = [
        decoder.write(params, [[4]], max_tokens=10, sampler=Sampler(1.0), seed=seed)
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_scores_are_the_models_log_probabilities(model):
    graph, params, decoder = model
    sampler = Sampler(0.7, top_k=5, repetition_penalty=1.5)
    [(ids, scores)] = decoder.stream(
        params, [[5, 9, 3]], max_tokens=6, sampler=sampler, scored=True
    )
    text = [5, 9, 3, *ids[0]]
    logits = jax.jit(lambda tokens: nnx.merge(graph, params)(tokens))(jnp.asarray([text]))[
        0, 2:8, :60
    ]
    np.testing.assert_allclose(
        scores[0], jax.nn.log_softmax(logits)[np.arange(6), ids[0]], atol=1e-4
    )


def test_a_repetition_penalty_keeps_tokens_of_the_text_away(model):
    """The prompt's too: with a huge penalty no text has a token twice."""
    _, params, decoder = model
    prompts = [[7, 8], [9], [10, 11, 12], [13]]
    sampler = Sampler(0.0, repetition_penalty=1e9)
    plain = decoder.write(params, prompts, max_tokens=12, sampler=GREEDY)
    assert any(len(set(text)) < len(text) for text in plain), (
        "no text repeats by itself; take other prompts"
    )
    for prompt, ids in zip(
        prompts, decoder.write(params, prompts, max_tokens=12, sampler=sampler), strict=True
    ):
        assert len({*prompt, *ids}) == len(prompt) + len(ids)


def test_a_row_that_its_caller_ends_holds_the_end_and_others_go_on(model):
    _, params, decoder = model
    asked = []

    def ends(row, ids):
        asked.append((row, len(ids)))
        return row == 1 and len(ids) >= 4

    stream = decoder.stream(
        params, [[4], [5]], max_tokens=9, sampler=Sampler(1.0), chunk_tokens=2, ends=ends, seed=1
    )
    rows = np.concatenate([ids for ids, _ in stream], axis=1)
    free = decoder.write(params, [[4], [5]], max_tokens=9, sampler=Sampler(1.0), seed=1)
    assert rows[1, 4:].tolist() == [END] * (rows.shape[1] - 4)
    assert rows[0, : len(free[0])].tolist() == free[0]
    assert len(free[1]) > 4, "the row ends by itself; take another seed"
    assert (1, 6) not in asked


@pytest.mark.parametrize("prompt", [[], list(range(16))])
def test_a_prompt_that_does_not_fit_is_refused(model, prompt):
    with pytest.raises(UserError, match="must be shorter than the context"):
        model[2].write(model[1], [prompt], max_tokens=1, sampler=GREEDY)
