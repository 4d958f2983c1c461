"""Looking at the model while it trains: its validation loss, pairs answered exactly, what it makes of fixed prompts."""

from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from tinylm.core.errors import UserError
from tinylm.inference.decode import Decoder, check_prompts
from tinylm.inference.evaluation import evaluate, exact_match, make_eval_step
from tinylm.train.config import Config
from tinylm.train.state import Blueprint


class Looks:
    """The compiled programs of one run that read its parameters."""

    def __init__(self, config: Config, data: Any, mesh: Mesh, blueprint: Blueprint):
        """Take the parts; compile nothing yet."""
        self.config, self.data, self.mesh = config, data, mesh
        self.eval_step = make_eval_step(blueprint.graph)
        self.decoder = Decoder(blueprint.graph, config.model.context, data.tokenizer.eot_id, data.vocab_size)
        self.prompts = encode_prompts(config, data.tokenizer)

    def evaluate(self, params: dict, before_batch: Callable[[], None]) -> dict[str, float]:
        """Return `loss` over the validation split, nats per target token, and the share of exact answers if asked for.

        `before_batch` is called before each batch, by every process equally often.
        """

        def step(*arguments):
            before_batch()
            return self.eval_step(*arguments)

        c = self.config
        rows = c.micro_batch_rows
        most = c.eval.max_batches * c.train.accumulation_steps  # micro-batches
        nats, count = evaluate(step, params, self.data.valid, rows, self.mesh, most)
        if not c.eval.exact_match:
            return {"loss": nats / count}
        pairs = self.data.answers(c.eval.exact_match)
        if not pairs:
            raise UserError("eval.exact_match needs validation pairs of prompt and completion; set it to 0.")
        share = exact_match(self.decoder, params, pairs, self.data.tokenizer.eot_id, c.data.batch_size)
        return {"loss": nats / count, "exact_match": share}

    def samples(self, params: dict) -> list[str]:
        """Return each prompt with what the model makes of it."""
        c = self.config.sample
        rows = self.decoder.write(
            params, self.prompts, max_tokens=c.max_tokens, sampler=c.sampler, seed=self.config.seed
        )
        texts = map(self.data.tokenizer.decode_after, self.prompts, rows)
        return [prompt + text for prompt, text in zip(c.prompts, texts, strict=True)]


def encode_prompts(config: Config, tokenizer: Any) -> list[list[int]]:
    """Return the ids of `sample.prompts`, each after an end of text; raise UserError for one that can't be used."""
    texts = config.sample.prompts if config.sample.max_tokens else ()
    prompts = [[tokenizer.eot_id, *tokenizer.encode(text)] for text in texts]
    check_prompts(prompts, config.model.context)
    return prompts
