"""How a model goes on with stories, measured without a judge: after the prompts of Eldan and Li (2023, section 4).

No number says that a story is good. These say what is wrong with bad ones: they repeat themselves, are all alike,
forget who they are about, or never end.
"""

import re
from collections.abc import Sequence

PROMPTS = (  # each with the names that its story should keep
    ("Once upon a time, there was a little girl named Lily. One day, she found a shiny key.", ("Lily",)),
    ("Tom and Anna were best friends. They wanted to build a tree house.", ("Tom", "Anna")),
    ("Sam had a big dog named Max. One morning, Max was gone.", ("Sam", "Max")),
    ("It was raining, and Ben was sad. Then his sister Mia had an idea.", ("Ben", "Mia")),
    ("A small frog named Fred wanted to fly. The other frogs laughed at him.", ("Fred",)),
    ('"Can I have your red ball?" asked Sue. Jack shook his head.', ("Sue", "Jack")),
    ("One night, Lucy saw a strange light in the garden. She was not afraid.", ("Lucy",)),
    ("Grandma gave Tim a box and told him not to open it.", ("Tim",)),
)


def measure(stories: Sequence[str], names: Sequence[Sequence[str]], ended: Sequence[bool]) -> dict[str, float]:
    """Return measures of what was written after prompts that have `names`.

    `repetition` is the share of 4-grams of words that stood in the same story before, `distinct_N` the share of
    different ones among all N-grams of all stories, `names_kept` the share of the prompts' names that come again.
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
        "names_kept": _share(sum(kept), len(kept)),
        "ended": _share(sum(ended), len(ended)),
    }


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return all runs of n words."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _share(part: float, whole: float, empty: float = 0.0) -> float:
    return part / whole if whole else empty
