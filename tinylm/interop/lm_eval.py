"""A run as a model of EleutherAI's harness (Gao et al. 2021), by likelihood and by what it writes.

python -m tinylm.interop.lm_eval run --model=tinylm --model_args=workdir=runs/tales --tasks=lambada_openai

Flags are the harness's own; the model is named `tinylm` there. Every text begins as in training.
Rows are padded to powers of two, so that few programs are compiled.
"""

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


@_register("tinylm")
class TinyLM(_Template):
    """The run in `workdir` at `step` (best, latest or a number), `batch_size` texts at a time."""

    def __init__(self, workdir: str, step: str = "best", batch_size: int | str = 8, **_: Any):
        """Open the run."""
        super().__init__()
        self.run, self.rows = open_run(workdir, str(step)), int(batch_size)
        self.tokenizer, self.context = self.run.tokenizer, self.run.model_config.context
        graph, tokenizer = self.run.graph, self.tokenizer
        self.decoder = Decoder(graph, self.context, tokenizer.eot_id, tokenizer.vocab_size, self.run.end_ids)

        def score(params, tokens_BT, targets_BT):
            logits_BTV = nnx.merge(graph, params)(tokens_BT)
            picked_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
            log_probability_BT = picked_BT1[..., 0] - jax.nn.logsumexp(logits_BTV, axis=-1)
            return log_probability_BT, jnp.argmax(logits_BTV, axis=-1) == targets_BT

        self._score = jax.jit(score)

    @property
    def eot_token_id(self) -> int:
        """The end of text."""
        return self.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """What begins every text."""
        return self.run.start_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return ids, the begin of a text first unless that is refused."""
        return [*([] if add_special_tokens is False else [self.prefix_token_id]), *self.tokenizer.encode(string)]

    def score_pairs(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return for each (context ids, ids) log p(ids | context), and whether greedy decoding would write them.

        What is longer than the model's context loses its beginning.
        """
        cut = [(ctx[-max(1, self.context + 1 - len(ids)) :], ids[-self.context :]) for ctx, ids in pairs]
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(cut)), key=lambda i: -len(cut[i][0]) - len(cut[i][1]))
        for start in range(0, len(order), self.rows):
            batch = order[start : start + self.rows]
            longest = sum(map(len, cut[batch[0]])) - 1
            ids_BT = np.full((self.rows, min(self.context, 1 << (longest - 1).bit_length()) + 1), 0, np.int32)
            for row, i in zip(ids_BT, batch, strict=False):
                row[: sum(map(len, cut[i]))] = [*cut[i][0], *cut[i][1]]
            with jax.set_mesh(self.run.mesh):
                scores_BT, hits_BT = map(np.asarray, self._score(self.run.params, ids_BT[:, :-1], ids_BT[:, 1:]))
            for i, scores, hits in zip(batch, scores_BT, hits_BT, strict=False):
                scored = slice(len(cut[i][0]) - 1, sum(map(len, cut[i])) - 1)
                found[i] = float(scores[scored].sum(dtype=np.float64)), bool(hits[scored].all())
        return [found[i] for i in range(len(cut))]

    def _loglikelihood_tokens(self, requests: Sequence[tuple], **_: Any) -> list[tuple[float, bool]]:
        return self.score_pairs([(ctx, ids) for _, ctx, ids in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return log p of whole texts, long ones in windows that together hold each id once."""
        texts = [self.tokenizer.encode(request.args[0]) for request in requests]
        windows = [list(_windows(ids, self.prefix_token_id, self.context, self.context // 2)) for ids in texts]
        pairs = [(before[: len(before) - len(ids) + 1], ids) for text in windows for before, ids in text]
        scores = iter(self.score_pairs(pairs))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each text, up to the first of the strings that end it; greedy unless asked otherwise."""
        return [self._write(*request.args) for request in requests]

    def _write(self, text: str, options: dict[str, Any]) -> str:
        most = int(options.get("max_gen_toks", 256))
        prompt = self.tok_encode(text)[-max(1, self.context - min(most, self.context // 2)) :]
        temperature = float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0
        with jax.set_mesh(self.run.mesh):
            sampler = Sampler(temperature, int(options.get("top_k", 0)), float(options.get("top_p", 1.0)))
            [ids] = self.decoder.write(self.run.params, [prompt], max_tokens=most, sampler=sampler)
        written, until = self.tokenizer.decode_after(prompt, ids), options.get("until") or []
        ends = [written.find(end) for end in ([until] if isinstance(until, str) else until) if end in written]
        return written[: min(ends, default=len(written))]


if __name__ == "__main__":
    optional_module("lm_eval.__main__", "lm-eval").cli_evaluate()
