"""The inverse of the tales' grammar: all derivations, log p of a text that is given, and the
entropy, exactly.
"""

import math
from collections.abc import Iterator

from tinylm.data.sources.tales import _SYMBOLS, Env, Grammar, Parts, Slot


class ParsedGrammar(Grammar):
    """A grammar whose texts are also enumerated and read back."""

    def derivations(self, text: str | None = None) -> Iterator[tuple[str, float]]:
        """Yield (text, log p) of every derivation, or of those alone that give `text`."""
        stack: list[tuple[Parts, Env, str, float]] = [(self._start, {}, "", 0.0)]
        while stack:
            todo, env, said, log_prob = stack.pop()
            if not todo:
                if text in (None, said):
                    yield said, log_prob
                continue
            part, rest = todo[0], todo[1:]
            if isinstance(part, Slot) and part.symbol not in env:
                stack += [
                    (ahead, drawn, said, log_prob + step)
                    for step, ahead, drawn in self._ways(part, rest, env)
                ]
                continue
            said += part if isinstance(part, str) else env[part.symbol][part.fact]
            if text is None or text.startswith(said):
                stack.append((rest, env, said, log_prob))

    def log_prob(self, text: str) -> float:
        """Return log p (nats) of a text; raise ValueError for one outside the grammar."""
        found = [log_prob for _, log_prob in self.derivations(text)]
        assert len(found) < 2, f"{len(found)} derivations of {text!r}"
        if not found:
            raise ValueError(f"not a text of the grammar: {text!r}")
        return found[0]

    def outlook(self) -> tuple[float, int]:
        """Return the entropy of a text in nats, and the number of texts."""
        self._keys = [key for key, _ in self._symbols.values() if key]
        return self._outlook(self._start, {}, {})

    def _outlook(self, todo: Parts, env: Env, memo: dict) -> tuple[float, int]:
        """Entropy and number of what can follow; of `env` only the symbols drawn and the facts of
        keys matter.
        """
        if not todo:
            return 0.0, 1
        part, rest = todo[0], todo[1:]
        if isinstance(part, str) or part.symbol in env:
            return self._outlook(rest, env, memo)
        state = (
            todo,
            frozenset(env),
            tuple(env[key.symbol][key.fact] for key in self._keys if key.symbol in env),
        )
        if state not in memo:
            entropy, number = 0.0, 0
            for log_prob, ahead, drawn in self._ways(part, rest, env):
                entropy_ahead, number_ahead = self._outlook(ahead, drawn, memo)
                entropy += math.exp(log_prob) * (entropy_ahead - log_prob)
                number += number_ahead
            memo[state] = entropy, number
        return memo[state]

    def _ways(self, slot: Slot, rest: Parts, env: Env) -> Iterator[tuple[float, Parts, Env]]:
        """Yield for each form that the slot may draw: log p, what is then to say, what is then
        drawn.
        """
        for form in self._choice(slot, env).forms:
            yield form.log_prob, form.say(slot) + rest, {**env, slot.symbol: form.facts}


TALES = ParsedGrammar(_SYMBOLS, start="tale")
