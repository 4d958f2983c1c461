"""How a model goes on with stories, measured without a judge.

No number says that a story is good. These say what is wrong with bad ones: they repeat themselves,
are all alike, forget who they are about, or never end. What is usual for a text, the texts that a
model learned from show: they are measured as well, from where their beginnings end, which are the
model's prompts. A model without a corpus gets the kind of prompts that TinyStories is judged by
(Eldan and Li 2023, section 4).
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Beginning(NamedTuple):
    """The beginning of a story, the names in it, which the story should keep, and how it goes on
    (if it is known).
    """

    prompt: str
    names: tuple[str, ...]
    rest: str = ""


PROMPTS = (
    Beginning(
        "Once upon a time, there was a little girl named Lily. One day, she found a shiny key.",
        ("Lily",),
    ),
    Beginning(
        "Tom and Anna were best friends. They wanted to build a tree house.", ("Tom", "Anna")
    ),
    Beginning("Sam had a big dog named Max. One morning, Max was gone.", ("Sam", "Max")),
    Beginning("It was raining, and Ben was sad. Then his sister Mia had an idea.", ("Ben", "Mia")),
    Beginning("A small frog named Fred wanted to fly. The other frogs laughed at him.", ("Fred",)),
    Beginning('"Can I have your red ball?" asked Sue. Jack shook his head.', ("Sue", "Jack")),
    Beginning("One night, Lucy saw a strange light in the garden. She was not afraid.", ("Lucy",)),
    Beginning("Grandma gave Tim a box and told him not to open it.", ("Tim",)),
)

_FEWEST_WORDS = 8  # of a beginning
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*(?=\s)")
_NAME = re.compile(
    r"(?<=[\w,;] )[A-Z][a-z]+"
)  # not at the begin of a sentence, where every word has a capital


def beginnings(texts: Iterable[str]) -> list[Beginning]:
    """Cut each text after its first sentences, eight words at least; a text that has no more than
    that is left out.
    """
    found = []
    for text in texts:
        for end in _SENTENCE_END.finditer(text):
            prompt, rest = text[: end.end()], text[end.end() :]
            if len(prompt.split()) >= _FEWEST_WORDS:
                if rest.strip():
                    found.append(
                        Beginning(prompt, tuple(dict.fromkeys(_NAME.findall(prompt))), rest)
                    )
                break
    return found


def measure(
    stories: Sequence[str], names: Sequence[Sequence[str]], ended: Sequence[bool]
) -> dict[str, float | None]:
    """Return measures of what was written after prompts that have `names`.

    `repetition` is the share of 4-grams of words that stood in the same story before, `distinct_N`
    the share of different ones among all N-grams of all stories, `names_kept` the share of the
    prompts' names that come again (None where they have none).
    """
    words = [re.findall(r"\w+", story.lower()) for story in stories]
    within = [ngrams(one, 4) for one in words]
    grams = {n: [gram for one in words for gram in ngrams(one, n)] for n in (1, 2, 3)}
    kept = [name.lower() in one for one, group in zip(words, names, strict=True) for name in group]
    return {
        "stories": len(stories),
        "words": _share(sum(map(len, words)), len(words)),
        "repetition": 1 - _share(sum(len(set(one)) for one in within), sum(map(len, within)), 1.0),
        **{f"distinct_{n}": _share(len(set(found)), len(found)) for n, found in grams.items()},
        "names_kept": _share(sum(kept), len(kept)) if kept else None,
        "ended": _share(sum(ended), len(ended)),
    }


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return all runs of n words."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _share(part: float, whole: float, empty: float = 0.0) -> float:
    return part / whole if whole else empty
