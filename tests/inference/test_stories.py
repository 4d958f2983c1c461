"""The measures of stories, by hand, and that they tell good from bad."""

import re

from tinylm.inference.stories import PROMPTS, measure


def test_measures_by_hand():
    found = measure(["Lily ran. Lily ran. Lily ran.", "Tom, sat!"], [("Lily",), ("Tom", "Anna")], [True, False])
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


def test_a_part_of_a_word_is_no_name():
    assert measure(["Timber! Annabel fell."], [("Tim", "Anna")], [True])["names_kept"] == 0


def test_nothing_written_has_no_measure_out_of_range():
    found = measure(["", ""], [("Tom",), ()], [True, True])
    assert all(0 <= value <= 1 for name, value in found.items() if name not in ("stories", "words"))
    assert found["repetition"] == 0


def test_the_prompts_hold_the_names_to_keep():
    for prompt, names in PROMPTS:
        capitals = set(re.findall(r"\b[A-Z][a-z]+", prompt))
        assert set(names) <= capitals
        assert names
