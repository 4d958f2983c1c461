"""The sections of the config that inference owns: when and how to evaluate, and what to write while training."""

import dataclasses

from tinylm.core.errors import UserError
from tinylm.core.settings import setting
from tinylm.inference.samplers import Sampler


@dataclasses.dataclass
class EvalConfig:
    """Evaluation on the validation split."""

    every_steps: int = setting(500, "steps between evaluations (0: none)", free=True)
    max_batches: int = setting(0, "batches of an evaluation (0: the whole split)", free=True)
    exact_match: int = setting(
        0, "validation pairs to answer greedily and compare, token by token (0: none)", free=True
    )
    patience: int = setting(0, "stop after this many evaluations without a better loss (0: never)")

    def check(self) -> None:
        """Raise UserError for negative counts."""
        for name in ("every_steps", "max_batches", "exact_match", "patience"):
            if getattr(self, name) < 0:
                raise UserError(f"eval.{name}={getattr(self, name)} must be at least 0.")


@dataclasses.dataclass
class SampleConfig:
    """What the model writes while it trains."""

    every_steps: int = setting(0, "steps between samples (0: only at the end)", free=True)
    prompts: tuple[str, ...] = setting(("",), "texts to go on from; an empty one starts a new text", free=True)
    max_tokens: int = setting(200, "most tokens of a sample (0: write none)", free=True)
    temperature: float = setting(0.8, "0: the most probable token; 1: the model's own distribution", free=True)
    top_k: int = setting(0, "draw from the k most probable tokens (0: all)", free=True)
    top_p: float = setting(1.0, "draw from the fewest tokens that have this probability together", free=True)

    @property
    def sampler(self) -> Sampler:
        """The sampler of these settings."""
        return Sampler(self.temperature, self.top_k, self.top_p)

    def check(self) -> None:
        """Raise UserError for values that no sampler could follow."""
        self.sampler.check(prefix="sample.")
        if not all(isinstance(text, str) for text in self.prompts):
            raise UserError(f"sample.prompts={self.prompts!r} must hold texts, for example ('Once',).")
        if self.every_steps < 0 or self.max_tokens < 0:
            raise UserError("sample.every_steps and sample.max_tokens must be at least 0.")
