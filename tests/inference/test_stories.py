"""The measures of stories, by hand, and that they tell good from bad."""

import re

import jax
import pytest
from helpers import tiny_model

from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.data import open_validation
from tinylm.data.config import DataConfig
from tinylm.data.tokenizers import ByteTokenizer
from tinylm.inference.stories import PROMPTS, Beginning, beginnings, measure
from tinylm.model.transformer import abstract_transformer, init_parameters
from tinylm.run.open_run import Run
from tinylm.tools.score import score_stories


def test_measures_by_hand():
    found = measure(
        ["Lily ran. Lily ran. Lily ran.", "Tom, sat!"], [("Lily",), ("Tom", "Anna")], [True, False]
    )
    assert found == {
        "stories": 2,
        "words": 4.0,
        "repetition": 1 - 2 / 3,  # (lily ran lily ran), (ran lily ran lily), and the first again
        "distinct_1": 4 / 8,
        "distinct_2": 3 / 6,
        "distinct_3": 2 / 4,
        "names_kept": 2 / 3,
        "ended": 0.5,
    }


def test_a_part_of_a_word_is_not_a_name():
    assert measure(["Timber! Annabel fell."], [("Tim", "Anna")], [True])["names_kept"] == 0


def test_nothing_written_has_no_measure_out_of_range():
    found = measure(["", ""], [("Tom",), ()], [True, True])
    assert all(0 <= value <= 1 for name, value in found.items() if name not in ("stories", "words"))
    assert found["repetition"] == 0


def test_the_prompts_hold_the_names_to_keep():
    for prompt, names, _ in PROMPTS:
        capitals = set(re.findall(r"\b[A-Z][a-z]+", prompt))
        assert set(names) <= capitals
        assert names


def test_a_beginning_is_whole_sentences_and_keeps_its_names():
    rest = " The cat ran away."
    assert beginnings([f"One day, Tom met Al. {rest}"]) == [], (
        "too few words, and then no end before the last"
    )
    assert beginnings([f"One day, Tom met a dog and Ann Lee.{rest}"]) == [
        Beginning("One day, Tom met a dog and Ann Lee.", ("Tom", "Ann", "Lee"), rest)
    ]
    assert beginnings([f'Tom was sad. "What is it?" asked a big Fox!{rest}'])[0][:2] == (
        'Tom was sad. "What is it?" asked a big Fox!',
        ("Fox",),
    )
    assert (
        beginnings(
            [
                "no end of a sentence in all of these words",
                "Only one sentence of more than eight words.",
            ]
        )
        == []
    )


def test_the_stories_of_a_run_begin_as_its_own_texts_and_are_compared_with_them(tmp_path):
    """A random model of bytes, after tales; what the texts themselves measure is said with it."""
    config = tiny_model(vocab_size=257, context=256)
    mesh = make_mesh(MeshConfig(data=1))
    params = jax.jit(lambda: init_parameters(config, 1))()
    tokenizer = ByteTokenizer()
    run = Run(
        folder=None,
        config={},
        step=7,
        mesh=mesh,
        model_config=config,
        graph=abstract_transformer(config)[0],
        params=params,
        tokenizer=tokenizer,
        start_id=tokenizer.eot_id,
    )
    settings = DataConfig(tokenizer="byte", seq_len=16, store_dir=str(tmp_path))
    data = open_validation(settings, "tales:10", tokenizer)
    found = score_stories(run, data, "tales", max_tokens=200)
    assert found["prompts"] == "64 beginnings of tales"
    assert found["stories"] == found["corpus"]["stories"] == 64
    assert found["corpus"]["names_kept"] > 0.8 > found["names_kept"]
    assert found["corpus"]["repetition"] < 0.1
    few = tmp_path / "few.txt"
    few.write_text(
        "<|endoftext|>".join(
            f"Number {i} was a very small number indeed. It slept." for i in range(7)
        )
    )
    with pytest.raises(UserError, match=r"--stories needs 8 texts .* text:.*few\.txt has 7"):
        source = f"text:{few}"
        score_stories(run, open_validation(settings, source, tokenizer), source)
