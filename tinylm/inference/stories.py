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
    """The beginning of a story."""

    prompt: str
    names: tuple[str, ...]  # which the story should keep
    rest: str = ""  # how it goes on, where that is known


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

# Of a beginning.
_FEWEST_WORDS = 8
# `.` or `!"` before a space
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]*(?=\s)")
# `Lily` in `named Lily`: not at the begin of a sentence, where every word has a capital.
_NAME = re.compile(r"(?<=[\w,;] )[A-Z][a-z]+")


def beginnings(texts: Iterable[str]) -> list[Beginning]:
    """Cut each text after its first sentences, which have _FEWEST_WORDS at least.

    A text that has no more than that is left out.
    """
    found = []
    for text in texts:
        for end in _SENTENCE_END.finditer(text):
            prompt = text[: end.end()]
            if len(prompt.split()) < _FEWEST_WORDS:
                continue
            rest = text[end.end() :]
            if rest.strip():
                names = dict.fromkeys(_NAME.findall(prompt))
                found.append(Beginning(prompt, tuple(names), rest))
            break
    return found


def measure(
    stories: Sequence[str], names: Sequence[Sequence[str]], ended: Sequence[bool]
) -> dict[str, float | None]:
    """Measure stories that were written after prompts.

    Args:
      stories: without their prompts.
      names: those in the prompt of each story.
      ended: whether each story came to an end.

    Returns:
      `stories`, their number, and `words`, of a story; `repetition`, the share of 4-grams of words
      that stood in the same story before; `distinct_N`, the share of different ones among all
      N-grams of all stories; `names_kept`, the share of the prompts' names that come again (None
      where they have none); `ended`, the share of stories.
    """
    words_of = [re.findall(r"\w+", story.lower()) for story in stories]
    num_words = sum(len(words) for words in words_of)

    num_grams = 0
    num_new = 0
    for words in words_of:
        grams = ngrams(words, 4)
        num_grams += len(grams)
        num_new += len(set(grams))

    distinct = {}
    for n in (1, 2, 3):
        all_grams = [gram for words in words_of for gram in ngrams(words, n)]
        distinct[f"distinct_{n}"] = _share(len(set(all_grams)), len(all_grams))

    num_names = 0
    num_kept = 0
    for words, wanted in zip(words_of, names, strict=True):
        num_names += len(wanted)
        num_kept += sum(name.lower() in words for name in wanted)

    return {
        "stories": len(stories),
        "words": _share(num_words, len(stories)),
        # Where nothing is long enough for a 4-gram, nothing is repeated.
        "repetition": 1 - _share(num_new, num_grams, empty=1.0),
        **distinct,
        "names_kept": _share(num_kept, num_names) if num_names else None,
        "ended": _share(sum(ended), len(ended)),
    }


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return all runs of n words."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def _share(part: float, whole: float, empty: float = 0.0) -> float:
    return part / whole if whole else empty
