"""A run as a model of EleutherAI's harness (Gao et al. 2021), by likelihood and by what it writes.

    python -m tinylm.interop.lm_eval run --model=tinylm \\
        --model_args=workdir=runs/tales --tasks=lambada_openai

Flags are the harness's own; the model is named `tinylm` there. Every text begins as in training.
Rows are padded to powers of two, so that few programs are compiled.
"""

import gc
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylm.core.optional import optional_module
from tinylm.inference.decode import Decoder
from tinylm.inference.samplers import Sampler
from tinylm.run.open_run import open_run

_Template: Any = optional_module("lm_eval.api.model", "lm-eval").TemplateLM
_register = optional_module("lm_eval.api.registry", "lm-eval").register_model
_windows = optional_module("lm_eval.utils", "lm-eval").get_rolling_token_windows

# Ids of a context and of what follows it.
Pair = tuple[list[int], list[int]]
# Log probability in nats, and whether greedy decoding would write it. The harness takes both apart.
Score = tuple[float, bool]


@_register("tinylm")
class TinyLM(_Template):
    """A run as the harness sees a model."""

    def __init__(
        self, workdir: str, step: str = "best", batch_size: int | str = 8, **_harness_options: Any
    ):
        """Open the run.

        Args:
          workdir: of the run.
          step: best, latest or a number.
          batch_size: how many texts are scored at a time.
        """
        super().__init__()
        self.run = open_run(workdir, str(step))
        self.rows = int(batch_size)
        self.tokenizer = self.run.tokenizer
        self.context = self.run.model_config.context
        self.decoder = Decoder(
            self.run.graph,
            self.context,
            self.tokenizer.eot_id,
            self.tokenizer.vocab_size,
            self.run.end_ids,
        )

        def score(
            params: dict, tokens_BT: jax.Array, targets_BT: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            logits_BTV = nnx.merge(self.run.graph, params)(tokens_BT)
            target_logits_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
            log_p_BT = target_logits_BT1[..., 0] - jax.nn.logsumexp(logits_BTV, axis=-1)
            is_greedy_BT = jnp.argmax(logits_BTV, axis=-1) == targets_BT
            return log_p_BT, is_greedy_BT

        self._score = jax.jit(score)

    @property
    def eot_token_id(self) -> int:
        """The end of text."""
        return self.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """The id that every text begins with."""
        return self.run.start_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_harness_options: Any
    ) -> list[int]:
        """Return ids, the begin of a text first unless that is refused."""
        ids = self.tokenizer.encode(string)
        if add_special_tokens is False:
            return list(ids)
        return [self.prefix_token_id, *ids]

    def score_pairs(self, pairs: Sequence[Pair]) -> list[Score]:
        """Score continuations.

        A pair that is longer than the model's context loses its beginning.

        Args:
          pairs: (context ids, continuation ids); a context has at least one id.

        Returns:
          For each pair log p(continuation | context) in nats, and whether greedy decoding would
          write the continuation.
        """
        cut = [self._cut(context, continuation) for context, continuation in pairs]
        # Pairs of similar length share a batch, so that little is computed for padding.
        longest_first = sorted(range(len(cut)), key=lambda i: -_length(cut[i]))
        scores: dict[int, Score] = {}
        for start in range(0, len(cut), self.rows):
            batch = longest_first[start : start + self.rows]
            batch_scores = self._score_batch([cut[i] for i in batch])
            scores.update(zip(batch, batch_scores, strict=True))
        return [scores[i] for i in range(len(cut))]

    def _cut(self, context: list[int], continuation: list[int]) -> Pair:
        """Leave out the beginning of what doesn't fit; the last id is not read, only predicted."""
        continuation = continuation[-self.context :]
        room = max(1, self.context + 1 - len(continuation))
        return context[-room:], continuation

    def _score_batch(self, batch: list[Pair]) -> list[Score]:
        """Score up to `rows` pairs that fit into the context, the longest first."""
        # The last id is predicted and not read, so a row is one id longer than what is read.
        longest = _length(batch[0]) - 1
        next_power_of_2 = 1 << (longest - 1).bit_length()
        padded = min(self.context, next_power_of_2)
        ids_BT = np.zeros((self.rows, padded + 1), np.int32)
        for row, (context, continuation) in enumerate(batch):
            ids = [*context, *continuation]
            ids_BT[row, : len(ids)] = ids
        tokens_BT = ids_BT[:, :-1]
        targets_BT = ids_BT[:, 1:]
        with jax.set_mesh(self.run.mesh):
            log_p_BT, is_greedy_BT = self._score(self.run.params, tokens_BT, targets_BT)
        log_p_BT = np.asarray(log_p_BT)
        is_greedy_BT = np.asarray(is_greedy_BT)
        scores = []
        for row, (context, continuation) in enumerate(batch):
            # Position t predicts id t + 1, so the first id of the continuation is predicted at the
            # last one of the context.
            first = len(context) - 1
            scored = slice(first, first + len(continuation))
            total = log_p_BT[row, scored].sum(dtype=np.float64)
            is_greedy = is_greedy_BT[row, scored].all()
            scores.append((float(total), bool(is_greedy)))
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], **_harness_options: Any
    ) -> list[Score]:
        return self.score_pairs([(context, ids) for _, context, ids in requests])

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return log p of whole texts, long ones in windows that together hold each id once."""
        pairs: list[Pair] = []
        num_windows = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0])
            windows = list(_windows(ids, self.prefix_token_id, self.context, self.context // 2))
            num_windows.append(len(windows))
            for before, new in windows:
                # What the harness calls the context of a window overlaps with its new ids.
                pairs.append((before[: len(before) - len(new) + 1], new))
        scores = iter(self.score_pairs(pairs))
        totals = []
        for count in num_windows:
            totals.append(sum(log_p for log_p, _ in itertools.islice(scores, count)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each text, up to the first of the strings that end it.

        Greedy unless the request asks for samples.
        """
        return [self._write(*request.args) for request in requests]

    def _write(self, text: str, options: dict[str, Any]) -> str:
        """Return what follows one text."""
        max_tokens = int(options.get("max_gen_toks", 256))
        # The text leaves room for what is written, at most half of the context.
        room = min(max_tokens, self.context // 2)
        prompt = self.tok_encode(text)[-max(1, self.context - room) :]
        temperature = 0.0
        if options.get("do_sample"):
            temperature = float(options.get("temperature", 1.0))
        top_k = int(options.get("top_k", 0))
        top_p = float(options.get("top_p", 1.0))
        with jax.set_mesh(self.run.mesh):
            [ids] = self.decoder.write(
                self.run.params,
                [prompt],
                max_tokens=max_tokens,
                sampler=Sampler(temperature, top_k, top_p),
            )
        written = self.tokenizer.decode_after(prompt, ids)
        ends = options.get("until") or []
        if isinstance(ends, str):
            ends = [ends]
        for end in ends:
            written = written.split(end, 1)[0]
        return written


def _length(pair: Pair) -> int:
    """Return the number of ids of a pair."""
    context, continuation = pair
    return len(context) + len(continuation)


if __name__ == "__main__":
    # tinylm/__init__.py has turned it off, for a command of ours to turn it on again.
    gc.enable()
    optional_module("lm_eval.__main__", "lm-eval").cli_evaluate()
