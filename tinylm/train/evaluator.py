"""What a run learns about its model while it trains: the loss over the validation split, the share
of pairs that are answered exactly, and samples of what the model makes of fixed prompts.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinylm.core.errors import UserError
from tinylm.data import Data, Validation
from tinylm.inference.decode import Decoder, check_prompts
from tinylm.inference.evaluation import (
    check_pairs,
    evaluate,
    exact_match,
    final_answers,
    make_eval_step,
)
from tinylm.train.config import Config
from tinylm.train.state import Blueprint


class Evaluator:
    """The compiled programs of one run that read its parameters."""

    def __init__(self, config: Config, data: Data, mesh: Mesh, blueprint: Blueprint):
        """Put the parts together; compile nothing yet."""
        self.config = config
        self.data = data
        self.mesh = mesh
        self.eval_step = make_eval_step(blueprint.graph)
        self.decoder = Decoder(
            blueprint.graph, config.model.context, data.tokenizer.eot_id, data.vocab_size
        )
        self.prompts = encode_prompts(config, data.tokenizer)
        self.pairs = check_evaluation(config, data)

    def evaluate(self, params: dict, before_batch: Callable[[], None]) -> dict[str, float]:
        """Evaluate as the `eval` section says.

        Args:
          params: of the model.
          before_batch: called before each batch, by every process equally often. What it raises
            ends the evaluation.

        Returns:
          `loss` over the validation split, in nats per target token (left out where the batches
          hold none), and `exact_match`, the share of pairs answered exactly, where it is asked for.
        """
        c = self.config
        assert self.data.valid is not None, "an evaluation needs a validation split"

        def eval_step(*arguments: Any) -> tuple[jax.Array, jax.Array]:
            before_batch()
            return self.eval_step(*arguments)

        nats, count = evaluate(
            eval_step,
            params,
            self.data.valid,
            self.mesh,
            rows=c.micro_batch_rows,
            micro_batches=c.train.accumulation_steps,
            max_batches=c.eval.max_batches,
        )
        found = {}
        if count:
            found["loss"] = nats / count
        if self.pairs:
            found["exact_match"] = self._exact_match(params, before_batch)
        return found

    def _exact_match(self, params: dict, before_batch: Callable[[], None]) -> float:
        """Return the share of pairs that the model answers exactly."""
        tokenizer = self.data.tokenizer
        is_right = None
        if self.config.eval.answer_pattern:
            is_right = final_answers(tokenizer, self.config.eval.answer_pattern)
        return exact_match(
            self.decoder,
            params,
            self.pairs,
            start_id=tokenizer.eot_id,
            rows=self.config.data.batch_size,
            is_right=is_right,
            before_batch=before_batch,
        )

    def samples(self, params: dict) -> list[str]:
        """Return each prompt with what the model makes of it."""
        c = self.config.sample
        rows = self.decoder.write(
            params, self.prompts, max_tokens=c.max_tokens, sampler=c.sampler, seed=self.config.seed
        )
        samples = []
        texts = sample_prompts(self.config)
        for text, prompt, written in zip(texts, self.prompts, rows, strict=True):
            samples.append(text + self.data.tokenizer.decode_after(prompt, written))
        return samples


def check_evaluation(config: Config, data: Validation) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the pairs that `eval.exact_match` asks for.

    Raises UserError for evaluations that a resolved config asks for and its data don't allow.
    """
    c = config.eval
    if c.patience and not data.valid:
        raise UserError(
            f"eval.patience={c.patience} needs a validation split; set data.valid_fraction or "
            "data.valid_source."
        )
    if not (c.exact_match and c.every_steps):
        return []
    pairs = data.answers(c.exact_match) if data.valid else []
    keys = ("eval.exact_match", "eval.answer_pattern")
    check_pairs(pairs, config.model.context, data.tokenizer, c.answer_pattern, keys)
    return pairs


def sample_prompts(config: Config) -> list[str]:
    """Return the prompts of the samples, in lower case where all texts of the run are."""
    if not config.sample.max_tokens:
        return []
    prompts = list(config.sample.prompts)
    return [text.lower() for text in prompts] if config.data.lowercase else prompts


def encode_prompts(config: Config, tokenizer: Any) -> list[list[int]]:
    """Return the ids of `sample.prompts`, each after an end of text.

    Raises UserError for a prompt that can't be used.
    """
    prompts = [[tokenizer.eot_id, *tokenizer.encode(text)] for text in sample_prompts(config)]
    check_prompts(prompts, config.model.context)
    return prompts
