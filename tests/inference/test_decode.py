"""Writing: prompts of unequal length, the end of a text, the edge of the context, ids that no tokenizer knows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_model

from tinylm.core.errors import UserError
from tinylm.inference.decode import Decoder
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
    for prompt, got in zip(prompts, decoder.write(params, prompts, max_tokens=8, sampler=GREEDY), strict=True):
        ids = list(prompt)
        for _ in range(8):
            padded = jnp.asarray([ids + [1] * (16 - len(ids))])
            ids.append(int(forward(padded)[0, len(ids) - 1, :60].argmax()))
        wanted = ids[len(prompt) :]
        assert got == (wanted[: wanted.index(END)] if END in wanted else wanted)


def test_a_text_goes_on_past_the_context(model):
    _, params, decoder = model
    chunks = list(decoder.stream(params, [[5 + i, 9, 3] for i in range(16)], max_tokens=50, sampler=Sampler(1.0)))
    rows = np.concatenate(chunks, axis=1)
    lengths = [list(row).index(END) if END in row else len(row) for row in rows]
    assert max(lengths) > 2 * 16
    assert rows.shape[1] <= 50


def test_only_known_ids_are_drawn_and_the_end_stays(model):
    _, params, decoder = model
    chunks = list(decoder.stream(params, [[i + 1] for i in range(32)], max_tokens=13, sampler=Sampler(50.0), seed=3))
    rows = np.concatenate(chunks, axis=1)
    assert rows.max() < 60
    assert len(np.unique(rows)) > 40
    for row in rows:
        if END in row:
            assert (row[list(row).index(END) :] == END).all()


def test_a_seed_decides_the_text(model):
    _, params, decoder = model
    texts = [decoder.write(params, [[4]], max_tokens=10, sampler=Sampler(1.0), seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("prompt", [[], list(range(16))])
def test_a_prompt_that_does_not_fit_is_refused(model, prompt):
    with pytest.raises(UserError, match="must be shorter than the context"):
        model[2].write(model[1], [prompt], max_tokens=1, sampler=GREEDY)
