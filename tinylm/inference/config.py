"""The sections of the config that inference owns: when and how to evaluate, and what to write while
training.
"""

import dataclasses
import re

from tinylm.core.errors import UserError
from tinylm.core.settings import Section, setting
from tinylm.inference.samplers import BOUNDS, Sampler


@dataclasses.dataclass
class EvalConfig(Section, name="eval"):
    """Evaluation on the validation split."""

    every_steps: int = setting(
        500,
        "steps between evaluations (0: none)",
        free=True,
        least=0,
        aliases=(
            "eval_interval",
            "eval_steps",
            "eval_every",
            "evaluation_interval",
            "val_check_interval",
        ),
    )
    max_batches: int = setting(
        0,
        "batches of an evaluation (0: the whole split)",
        free=True,
        least=0,
        aliases=("eval_iters", "max_eval_batches", "limit_val_batches"),
    )
    exact_match: int = setting(
        0,
        "validation pairs to answer greedily and compare, token by token (0: none)",
        free=True,
        least=0,
    )
    answer_pattern: str = setting(
        "",
        (
            "regular expression of the final answer, which alone is compared then, as '#### (.+)' "
            "(empty: compare all)"
        ),
        free=True,
    )
    patience: int = setting(
        0,
        "stop after this many evaluations without a better loss (0: never)",
        least=0,
        aliases=("early_stopping_patience",),
    )

    def check(self) -> None:
        """Raise UserError for values that can't work."""
        super().check()
        check_pattern("eval.answer_pattern", self.answer_pattern)


@dataclasses.dataclass
class SampleConfig(Section, name="sample"):
    """What the model writes while it trains."""

    every_steps: int = setting(
        0,
        "steps between samples (0: only at the end)",
        free=True,
        least=0,
        aliases=("sample_every", "sample_interval"),
    )
    prompts: tuple[str, ...] = setting(
        ("",),
        "texts to go on from; an empty one starts a new text",
        free=True,
        aliases=("start", "prompt"),
    )
    max_tokens: int = setting(
        200,
        "most tokens of a sample (0: write none)",
        free=True,
        least=0,
        aliases=("max_new_tokens", "max_length", "max_decode_tokens"),
    )
    temperature: float = setting(
        0.8,
        "0: the most probable token; 1: the model's own distribution",
        free=True,
        bounds=BOUNDS["temperature"],
        aliases=("decode_sampling_temperature",),
    )
    top_k: int = setting(
        0,
        "draw from the k most probable tokens (0: all)",
        free=True,
        bounds=BOUNDS["top_k"],
        aliases=("decode_sampling_top_k",),
    )
    top_p: float = setting(
        1.0,
        "draw from the fewest tokens that have this probability together",
        free=True,
        bounds=BOUNDS["top_p"],
        aliases=("decode_sampling_nucleus_p", "nucleus_p"),
    )

    @property
    def sampler(self) -> Sampler:
        """The sampler of these settings."""
        return Sampler(self.temperature, self.top_k, self.top_p)


def check_pattern(key: str, pattern: str) -> None:
    """Raise UserError for what is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}={pattern} must be a regular expression: {error}.") from error
