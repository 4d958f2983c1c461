"""The embedded corpus: log p is exact, every text has one derivation, tales agree with themselves,
splits are apart.
"""

import collections
import itertools
import math
import re
import statistics
import time

import pytest
from derivations import TALES, ParsedGrammar
from hypothesis import given, settings
from hypothesis import strategies as st

from tinylm.data.sources import tales

SMALL = {
    "start": """{name} {verb} {toy}. {Toy} is
        {toy.size}{end} | 2* So {name}, {he} {verb} it{end}""",
    "name": "Al; who=he | 2* Bo; who=she",
    "verb": "3* sees | wants",
    "toy by name.who": (
        "he: red top; size=small | 2* red bus; size=big / she: red top; size=small | kite; "
        "size=wide"
    ),
    "he by name.who": "he: he / she: she | 2* her",
    "end": "! | 2* , says {name}.",
}
AMBIGUOUS = [
    {"start": "red | redder"},
    {"start": "a {x} | a b", "x": "b | c"},
    {"start": "{x} | {y}", "x": "a | b", "y": "b | c"},
    {"start": "{x}{z}", "x": "a", "z": "b | bb"},
    {"start": "{x}{z} | {y}c", "x": "a | b", "y": "ac | d", "z": "c | d"},
    {
        "start": "{x}{y}{x.of}g | b{x}{x.of}h",
        "x": "b; of=e | c; of=eg",
        "y": "b | c",
    },  # bce-g begins bc-eg-h
]
FIRST_TALE = (
    "In a quiet valley lived a kind rabbit named Ben. More than anything, Ben wanted to "
    "cook. But when he tried, he "
    'spilled the soup. "I will teach you," said a wise hen. After five days, Ben could '
    "cook! Everyone in the valley "
    "said that Ben was the kindest rabbit of all."
)
SUPERLATIVES = {
    "kind": "kindest",
    "brave": "bravest",
    "clever": "cleverest",
    "gentle": "gentlest",
    "merry": "merriest",
    "friendly": "friendliest",
    "polite": "politest",
    "funny": "funniest",
}


@pytest.fixture(scope="module")
def many() -> list[tuple[str, float]]:
    return [tales.tale(index) for index in range(10_000)]


def forms(*pieces: str) -> st.SearchStrategy[str]:
    form = st.lists(st.sampled_from(pieces), min_size=2, max_size=4).map("".join)
    return st.lists(form, min_size=1, max_size=2).map(" | ".join)


@st.composite
def grammars(draw) -> dict[str, str]:
    """Draw a grammar of few letters: `y` depends on `x`, `z` is made of both; often two forms begin
    alike.
    """
    facts = st.sampled_from(["a", "b", "ab", "ba"])
    table = st.dictionaries(st.sampled_from("abc"), facts, min_size=1, max_size=2).map(
        lambda values: " | ".join(f"{text}; of={fact}" for text, fact in values.items())
    )
    return {
        "start": draw(
            forms("a", "b", "{x}", "{y}", "{z}", "{x.of}", "{y.of}").map(lambda ways: "{x}" + ways)
        ),
        "x": draw(table),
        "y by x.of": " / ".join(f"{fact}: {draw(table)}" for fact in ["a", "b", "ab", "ba"]),
        "z": draw(forms("a", "c", "{x}", "{y}")),
    }


def test_derivations_parse_back(many):
    for text, log_prob in many[:1_500]:
        assert TALES.log_prob(text) == log_prob


@pytest.mark.parametrize(
    "change", [(" wise hen", " wise pony"), (" he ", " she "), ("kindest", "bravest"), (".", "")]
)
def test_text_outside_the_grammar_is_refused(change):
    assert FIRST_TALE.replace(*change) != FIRST_TALE
    for text in (FIRST_TALE.replace(*change), FIRST_TALE + " ", FIRST_TALE[:-1], ""):
        with pytest.raises(ValueError, match="not a text of the grammar"):
            TALES.log_prob(text)


def test_small_grammar_is_a_distribution():
    grammar = ParsedGrammar(SMALL, "start")
    derivations = list(grammar.derivations())
    texts = dict(derivations)
    entropy, number = grammar.outlook()
    assert number == len(texts) == len(derivations)
    assert sum(math.exp(log_prob) for log_prob in texts.values()) == pytest.approx(1, abs=1e-12)
    assert entropy == pytest.approx(
        -sum(math.exp(log_prob) * log_prob for log_prob in texts.values()), abs=1e-12
    )
    assert all(grammar.log_prob(text) == log_prob for text, log_prob in derivations)
    assert {"Al sees red bus. Red bus is big!", "So Bo, her wants it, says Bo."} < set(texts)


def test_samples_follow_log_prob():
    grammar = ParsedGrammar(SMALL, "start")
    # A multiple of the product of total weights along every derivation: each has its exact share.
    numbers = 648
    counts = collections.Counter(grammar.sample(number) for number in range(numbers))
    assert set(counts) == set(grammar.derivations())
    assert all(
        log_prob == pytest.approx(math.log(count / numbers))
        for (_, log_prob), count in counts.items()
    )


@pytest.mark.parametrize("symbols", AMBIGUOUS)
def test_ambiguous_grammar_is_refused(symbols):
    with pytest.raises(ValueError, match="may begin the other"):
        ParsedGrammar(symbols, "start")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(grammars())
def test_what_is_not_refused_is_prefix_free(symbols):
    try:
        texts = [text for text, _ in ParsedGrammar(symbols, "start").derivations()]
    except (ValueError, KeyError):  # ambiguous; or a fact before its symbol, or `z` said twice
        return
    assert not any(other.startswith(one) for one, other in itertools.permutations(texts, 2))


def test_fact_before_its_symbol_is_refused():
    with pytest.raises(ValueError, match=r"\{toy.size\} comes before \{toy\}"):
        ParsedGrammar({"start": "{toy.size} {toy}", "toy": "top; size=small"}, "start").outlook()


def test_mean_of_log_prob_meets_entropy(many):
    surprises = [-log_prob for _, log_prob in many]
    standard_error = statistics.stdev(surprises) / math.sqrt(len(surprises))
    entropy, number = TALES.outlook()
    assert abs(statistics.mean(surprises) - entropy) < 3 * standard_error
    assert 25 < entropy < math.log(number)


def test_too_many_tales_to_learn_by_heart(many):
    assert TALES.outlook()[1] >= 10**9
    assert len({text for text, _ in many}) > 0.99 * len(many)


def test_no_valid_tale_is_in_train(many):
    train, valid = list(tales.tales("train", 2_000)), list(tales.tales("valid", 100))
    assert train == [pair for pair in many if not tales.is_valid(pair[0])][:2_000]
    assert valid == [pair for pair in many if tales.is_valid(pair[0])][:100]
    assert not {text for text, _ in train} & {text for text, _ in valid}
    assert 0.045 < statistics.mean(tales.is_valid(text) for text, _ in many) < 0.055
    with pytest.raises(ValueError, match="split='test' must be 'train' or 'valid'"):
        tales.tales("test", 1)


def test_golden_first_tale():
    """Update it when a word or the sampler changes: every loss measured on the corpus changes with
    them.
    """
    text, log_prob = tales.tale(0)
    assert text == FIRST_TALE
    assert log_prob == pytest.approx(-21.525058754908976, rel=1e-12)
    assert tales.tale(0, seed=1)[0].startswith(
        "Once upon a time, a kind rabbit named Otto lived on a green hill. One"
    )


def test_tales_are_short_and_plain(many):
    for text, _ in many:
        assert text.isascii() and text.isprintable() and "  " not in text and text.strip() == text
        assert not re.search(r"[{}|=;/]", text)
        assert 40 <= len(text.split()) <= 90
    assert 300 < len({word for text, _ in many for word in re.findall(r"\w+", text)}) < 450


def test_pronouns_and_facts_agree(many):
    colors = "red|blue|green|yellow|golden|pink|silver|purple|brown|white"
    for text, _ in many:
        kind, name = re.search(r"(\w+) named (\w+)", text).groups()
        told = text.replace(
            "so happy that she gave", ""
        )  # the mother of what was lost, not the hero
        pronouns = set(re.findall(r"\b(?:she|her|he|his|him)\b", told.lower()))
        assert pronouns <= (
            {"she", "her"} if kind in ("girl", "mouse", "kitten", "fox") else {"he", "his", "him"}
        )
        friend = re.search(r"friend (?:named )?(\w+)", text.replace("best friends", ""))
        said = set(re.findall(r"(?:said|asked) ([A-Z]\w+)", text))
        assert said <= {name, friend and friend[1]}
        assert (
            len(
                set(
                    re.findall(
                        rf"\b(?:{colors}) (?:kite|flag|hat|scarf|ball|drum|top|bell)\b", text
                    )
                )
            )
            <= 1
        )
        best = re.search(r"was the (\w+) (\w+) of all", text)
        if best:
            trait = re.search(rf"\b(?:{'|'.join(SUPERLATIVES)})\b", text)[0]
            assert best.groups() == (SUPERLATIVES[trait], kind)


@pytest.mark.slow  # not long, but timed, which a busy machine disturbs
def test_tales_are_made_fast():
    start = time.process_time()
    collections.deque(map(tales.tale, range(3_000)), maxlen=0)
    assert time.process_time() - start < 0.3
