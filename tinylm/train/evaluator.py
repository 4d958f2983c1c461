"""Looking at the model while it trains: its validation loss, pairs answered exactly, what it makes
of fixed prompts.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tinylm.core.errors import UserError
from tinylm.data import Validation
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


class Looks:
    """The compiled programs of one run that read its parameters."""

    def __init__(self, config: Config, data: Any, mesh: Mesh, blueprint: Blueprint):
        """Take the parts; compile nothing yet."""
        self.config, self.data, self.mesh = config, data, mesh
        self.eval_step = make_eval_step(blueprint.graph)
        self.decoder = Decoder(
            blueprint.graph, config.model.context, data.tokenizer.eot_id, data.vocab_size
        )
        self.prompts = encode_prompts(config, data.tokenizer)
        self.pairs = check_evaluation(config, data)

    def evaluate(self, params: dict, before_batch: Callable[[], None]) -> dict[str, float]:
        """Return `loss` over the validation split, nats per target token, and the share of exact
        answers if asked for.

        There is no `loss` where the batches hold no target token.
        `before_batch` is called before each batch, by every process equally often.
        """

        def step(*arguments):
            before_batch()
            return self.eval_step(*arguments)

        c = self.config
        rows = c.micro_batch_rows
        nats, count = evaluate(
            step,
            params,
            self.data.valid,
            self.mesh,
            rows=rows,
            micro_batches=c.train.accumulation_steps,
            max_batches=c.eval.max_batches,
        )
        found = {"loss": nats / count} if count else {}
        if not self.pairs:
            return found
        tokenizer = self.data.tokenizer
        share = exact_match(
            self.decoder,
            params,
            self.pairs,
            start_id=tokenizer.eot_id,
            rows=c.data.batch_size,
            is_right=final_answers(tokenizer, c.eval.answer_pattern)
            if c.eval.answer_pattern
            else None,
            before_batch=before_batch,
        )
        return {**found, "exact_match": share}

    def samples(self, params: dict) -> list[str]:
        """Return each prompt with what the model makes of it."""
        c = self.config.sample
        rows = self.decoder.write(
            params, self.prompts, max_tokens=c.max_tokens, sampler=c.sampler, seed=self.config.seed
        )
        texts = map(self.data.tokenizer.decode_after, self.prompts, rows)
        return [prompt + text for prompt, text in zip(c.prompts, texts, strict=True)]


def check_evaluation(config: Config, data: Validation) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the pairs that `eval.exact_match` asks for.

    Raises UserError for evaluations that a resolved config asks for and its data don't allow.
    """
    c = config.eval
    if c.patience and not data.valid:
        raise UserError(
            f"eval.patience={c.patience} needs a validation split; set data.valid_fraction "
            "or data.valid_source."
        )
    if not (c.exact_match and c.every_steps):
        return []
    pairs = data.answers(c.exact_match) if data.valid else []
    keys = ("eval.exact_match", "eval.answer_pattern")
    check_pairs(pairs, config.model.context, data.tokenizer, c.answer_pattern, keys)
    return pairs


def encode_prompts(config: Config, tokenizer: Any) -> list[list[int]]:
    """Return the ids of `sample.prompts`, each after an end of text; raise UserError for one that
    can't be used.
    """
    texts = config.sample.prompts if config.sample.max_tokens else ()
    prompts = [[tokenizer.eot_id, *tokenizer.encode(text)] for text in texts]
    check_prompts(prompts, config.model.context)
    return prompts
