"""Writing for people: a stop string ends text, ids and log-probabilities; what is shown is what is
returned.
"""

import jax
import pytest
from helpers import tiny_model

from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.data.tokenizers import BpeTokenizer
from tinylm.inference.samplers import Sampler
from tinylm.inference.text import numbered, settled, write_texts
from tinylm.model.transformer import abstract_transformer, init_parameters
from tinylm.run.open_run import Run

SAMPLER = Sampler(1.0)


@pytest.fixture(scope="module")
def run():
    """A random model whose tokens are bytes and pieces of words."""
    tokenizer = BpeTokenizer.train(
        ["the cat and the other cat sat there, and then the hat"] * 9, 280
    )
    config = tiny_model(vocab_size=tokenizer.vocab_size, init_std=0.3)
    params = jax.jit(lambda: init_parameters(config, 1))()
    mesh = make_mesh(MeshConfig(data=1))
    graph = abstract_transformer(config)[0]
    return Run(
        folder=None,
        config={},
        step=0,
        mesh=mesh,
        model_config=config,
        graph=graph,
        params=params,
        tokenizer=tokenizer,
        start_id=tokenizer.eot_id,
    )


def write(run, *stop, shown=None, seed=5):
    (text,) = write_texts(
        run,
        ["the "],
        max_tokens=40,
        sampler=SAMPLER,
        seed=seed,
        stop=stop,
        logprobs=True,
        show=None if shown is None else shown.append,
    )
    return text


@pytest.mark.parametrize("length", [1, 3, 14])
def test_ids_and_scores_end_where_a_stop_string_ends_the_text(run, length):
    free = write(run)
    assert len(free.ids) == 40, "the text ends by itself; take another seed"
    place = len(free.completion) // 2
    stop = free.completion[place : place + length]
    text = write(run, stop)
    assert text.completion == free.completion[: free.completion.index(stop)]
    assert text.ids == free.ids[: len(text.ids)]
    assert text.logprobs == pytest.approx(free.logprobs[: len(text.ids)], abs=1e-5)
    before = run.tokenizer.encode("the ")
    assert run.tokenizer.decode_after(before, text.ids).startswith(text.completion)
    assert not run.tokenizer.decode_after(before, text.ids[:-1]).startswith(text.completion)


@pytest.mark.parametrize("stop", [(), ("zz",), ("never there, " * 9,), "half"], ids=str)
def test_what_is_shown_piece_by_piece_is_the_text(run, stop):
    free = write(run)
    if stop == "half":
        place = len(free.completion) // 2
        stop = (free.completion[place : place + 30], "no such thing")
    shown = []
    text = write(run, *stop, shown=shown)
    assert "".join(shown) == text.completion
    assert len(shown) > 2


@pytest.mark.parametrize(
    ("text", "stop", "ready"),
    [
        ("one two", [], "one two"),
        ("one two", ["two"], "one "),
        ("one tw", ["two"], "one "),
        ("one tw", ["two three four five", "w"], "one t"),
        ("ab", ["abc and much more than that"], ""),
        ("x", ["a stop string longer than the text"], "x"),
        ("one\ufffd", ["zz"], "one"),
        ("aab", ["ab!", "aab?"], ""),
    ],
)
def test_only_what_may_change_is_held_back(text, stop, ready):
    assert settled(text, stop) == ready


def test_several_texts_are_numbered_and_apart():
    assert numbered(["one\n\ntwo"]) == "one\n\ntwo"
    assert numbered(["one\n\ntwo", "three"]) == (
        "--- sample 1 of 2 ---\none\n\ntwo\n\n--- sample 2 of 2 ---\nthree"
    )


def test_stop_at_the_first_character_leaves_nothing(run):
    free = write(run)
    text = write(run, free.completion[0])
    assert (text.completion, text.ids, text.logprobs) == ("", [], [])
