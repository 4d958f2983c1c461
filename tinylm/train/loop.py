"""The training loop: a plain loop with visible "is it time" blocks (log, evaluate, sample, save).

The host runs ahead of the device: metrics of one dispatch are read after the next one is under way, and nothing else
waits but what must (evaluation, samples, the copy of a save). What must not repeat after a crash is in the state.
"""

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinylm.analysis.chips import peak_flops
from tinylm.analysis.flops import train_flops_per_token
from tinylm.core.distributed import is_main
from tinylm.core.errors import NumericError, Preempted, UserError
from tinylm.core.log import say
from tinylm.core.mesh import batch_shards, owned_rows, place_batch
from tinylm.core.stop import StopRequest
from tinylm.data.pipeline import train_batches
from tinylm.inference.decode import Decoder, check_prompts
from tinylm.inference.evaluation import evaluate, exact_match, make_eval_step
from tinylm.inference.samplers import Sampler
from tinylm.run.checkpoint import Checkpoints
from tinylm.run.folder import RunFolder
from tinylm.run.gather import gather
from tinylm.run.plot import draw_curves
from tinylm.train.config import Config
from tinylm.train.init_from import initial_state
from tinylm.train.optimizer import make_schedule
from tinylm.train.progress import Progress
from tinylm.train.state import Blueprint, TrainState
from tinylm.train.step import make_train_steps
from tinylm.train.trackers import Trackers


@dataclasses.dataclass
class Outcome:
    """How a run ended."""

    step: int
    loss: float | None  # last training loss logged, nats per target token
    valid_loss: float | None  # of the last evaluation
    best_loss: float
    seconds: float
    reason: str


class Trainer:
    """One run on one mesh: the parts that the loop's blocks share."""

    def __init__(self, config: Config, data: Any, mesh: Mesh, folder: RunFolder, blueprint: Blueprint):
        """Take the parts; compile nothing yet."""
        self.config, self.data, self.mesh, self.folder, self.blueprint = config, data, mesh, folder, blueprint
        self.schedule = make_schedule(config.optimizer, config.train.num_steps)
        self.train_steps = make_train_steps(blueprint, self.schedule)
        self.eval_step = make_eval_step(blueprint.graph)
        self.decoder = Decoder(blueprint.graph, config.model.context, data.tokenizer.eot_id, data.vocab_size)
        self.prompts = encode_prompts(config, data.tokenizer)
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
        self.flops_per_token = train_flops_per_token(config.model, config.data.seq_len)
        self.peak_flops = peak_flops(list(mesh.devices.flat))
        self.valid_loss: float | None = None
        self.train_loss: float | None = None
        self.pending: tuple[int, dict[str, jax.Array], int] | None = None
        self.guard = {"best_loss": math.inf, "evals_since_best": 0}  # on the host, as it is in the state
        self.last_samples: list[str] = []
        self.trackers = Trackers(config, folder)

    def restore_or_init(self) -> TrainState:
        """Return the state of the newest checkpoint, or a new one."""
        steps = self.checkpoints.steps()
        if not steps:
            return initial_state(self.config, self.blueprint)
        say(f"resuming from step {steps[-1]} in {self.folder.path}")
        return self.checkpoints.restore(steps[-1], self.blueprint.abstract)

    def run(self) -> Outcome:
        """Train to the last step, until patience ends or until asked to stop; return how it went.

        Raises Preempted, after a save, where the run was asked to stop.
        """
        config, started = self.config, time.perf_counter()
        state = self.restore_or_init()
        step, last, reason = int(state.step), config.train.last_step, "all steps done"
        saved, stop = step, StopRequest()
        self.guard = {name: value.item() for name, value in jax.device_get(state.guard).items()}
        self.progress = Progress(step, last)
        batches = self._batches(step)
        while step < last and not self._out_of_patience():
            state, step = self._dispatch(state, step, batches)
            improved = False
            if self.data.valid and self._due(step, config.eval.every_steps):
                state, improved = self._evaluate(state, step)
            if improved or self._due(step, config.checkpoint.every_steps):
                saved = self._save(state, step)
            if config.sample.every_steps and step % config.sample.every_steps == 0 and step < last:
                self.sample(state.params, step)
            if step < last and stop.reached(step):
                self._end(state, step, saved, batches)
                raise Preempted(f"asked to stop; step {step} is saved in {self.folder.path}, the same command goes on.")
        self._end(state, step, saved, batches)
        if config.sample.max_tokens:
            self.sample(state.params, step)
        if config.writers.plot and is_main():
            draw_curves([gather(str(self.folder.path))], self.folder.plot_file, ["loss"])
            self.trackers.put("picture", step, str(self.folder.plot_file))
        if self._out_of_patience():
            reason = f"no better validation loss in {config.eval.patience} evaluations"
        elif last < config.train.num_steps:
            reason = "train.stop_step is reached"
        seconds = time.perf_counter() - started
        return Outcome(step, self.train_loss, self.valid_loss, self.guard["best_loss"], seconds, reason)

    def _out_of_patience(self) -> bool:
        patience = self.config.eval.patience
        return patience > 0 and self.guard["evals_since_best"] >= patience

    def _dispatch(self, state: TrainState, step: int, batches: Iterator) -> tuple[TrainState, int]:
        """Send the device steps up to the next at which something is due; log the dispatch before, done by now."""
        count = min(self.config.train.steps_per_dispatch, self._next_stop(step) - step)
        placed = self._place([next(batches)[1] for _ in range(count)])
        state, metrics = self.train_steps(state, placed, count, self.config.seed)
        self._log_pending()
        if self._due(step + count, self.config.train.log_every_steps):
            self.pending = (step + count, metrics, count)
        return state, step + count

    def _end(self, state: TrainState, step: int, saved: int, batches: Iterator) -> None:
        """Write what is not yet written: metrics and the last step."""
        self._log_pending()
        if saved != step:
            self._save(state, step)
        self.progress.close()
        batches.close()  # type: ignore[attr-defined]
        self.checkpoints.close()

    def _batches(self, start: int):
        """Return the iterator of this process's host batches from step `start` on."""
        micro = self.config.train.accumulation_steps
        rows = self.config.data.batch_size // micro
        self.owned = owned_rows(self.mesh, rows)
        return train_batches(self.data.train, batch_shape=(micro, rows), owned_rows=self.owned, start=start)

    def _place(self, host: list[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
        """Stack host batches to [K, A, rows, T], K the same in every dispatch, and put them on the mesh."""
        missing = self.config.train.steps_per_dispatch - len(host)
        stacked = {name: np.stack([batch[name] for batch in host] + [host[-1][name]] * missing) for name in host[0]}
        rows = self.config.data.batch_size // self.config.train.accumulation_steps
        return place_batch(self.mesh, stacked, self.owned, rows, 2)

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and (step % every == 0 or step == self.config.train.last_step)

    def _next_stop(self, step: int) -> int:
        """Return the first step after `step` at which something is due."""
        c = self.config
        cadences = (c.train.log_every_steps, c.eval.every_steps, c.sample.every_steps, c.checkpoint.every_steps)
        return min([c.train.last_step, *[(step // every + 1) * every for every in cadences if every]])

    def _log_pending(self) -> None:
        """Write the metrics of the last step logged, waiting for the device if need be."""
        if self.pending is None:
            return
        (step, metrics, count), self.pending = self.pending, None
        values = {name: float(metric[count - 1]) for name, metric in jax.device_get(metrics).items()}
        if not math.isfinite(values["loss"] + values["grad_norm"]):
            raise NumericError(
                f"loss {values['loss']} and gradient norm {values['grad_norm']} at step {step} are not finite; "
                "start anew with a lower optimizer.learning_rate, by train.init_from if you like."
            )
        self.train_loss = values["loss"]
        speed = self.progress.tokens_per_sec(step, self.config.data.batch_size * self.config.data.seq_len)
        record = {
            "step": step,
            "split": "train",
            "loss": values["loss"],
            "grad_norm": values["grad_norm"],
            "learning_rate": values["learning_rate"],
            "tokens_per_sec": speed,
            "mfu": speed * self.flops_per_token / self.peak_flops if self.peak_flops else None,
            **{name: value for name, value in values.items() if name.startswith("update_ratio/")},
        }
        self._write(record)
        self.progress.show(step, f"loss {values['loss']:.4f}", speed, self.valid_loss)

    def _evaluate(self, state: TrainState, step: int) -> tuple[TrainState, bool]:
        """Evaluate; return the state with its guard brought up to date, and whether the loss is the best so far."""
        self._log_pending()
        with self.progress.pause():
            self.valid_loss = self.evaluate(state.params)
            matches = self._exact_match(state.params)
        floor = self.data.floor_nats_per_token
        known = {} if floor is None else {"floor": floor}
        self._write({"step": step, "split": "valid", "loss": self.valid_loss, **known, **matches})
        shown = "".join(f"  {name} {value:.2%}" for name, value in matches.items())
        self.progress.note(f"step {step}  validation loss {self.valid_loss:.4f}{self._floor()}{shown}")
        if step % self.config.eval.every_steps and step != self.config.train.num_steps:
            return state, False  # an extra look at train.stop_step, which an undisturbed run doesn't take
        improved = self.valid_loss < self.guard["best_loss"]
        self.guard = {
            "best_loss": self.valid_loss if improved else self.guard["best_loss"],
            "evals_since_best": 0 if improved else self.guard["evals_since_best"] + 1,
        }
        guard = {
            name: jax.device_put(np.asarray(value, state.guard[name].dtype), state.guard[name].sharding)
            for name, value in self.guard.items()
        }
        return dataclasses.replace(state, guard=guard), improved

    def evaluate(self, params: dict) -> float:
        """Return the loss over the validation split, nats per target token."""
        rows = self.config.data.batch_size // self.config.train.accumulation_steps
        nats, count = evaluate(self.eval_step, params, self.data.valid, rows, self.mesh, self.config.eval.max_batches)
        return nats / count

    def _exact_match(self, params: dict) -> dict[str, float]:
        """Return the share of validation pairs answered exactly, where the config asks for it."""
        if not self.config.eval.exact_match:
            return {}
        pairs = self.data.answers(self.config.eval.exact_match)
        if not pairs:
            raise UserError("eval.exact_match needs validation pairs of prompt and completion; set it to 0.")
        end_id = self.data.tokenizer.eot_id
        return {"exact_match": exact_match(self.decoder, params, pairs, end_id, self.config.data.batch_size)}

    def _floor(self) -> str:
        floor = self.data.floor_nats_per_token
        return "" if floor is None else f"  (floor of the corpus {floor:.4f})"

    def sample(self, params: dict, step: int) -> None:
        """Write what the model makes of the fixed prompts into samples.txt."""
        self._log_pending()
        c = self.config.sample
        sampler = Sampler(c.temperature, c.top_k, c.top_p)
        with self.progress.pause():
            rows = self.decoder.write(
                params, self.prompts, max_tokens=c.max_tokens, sampler=sampler, seed=self.config.seed
            )
        pairs = zip(c.prompts, rows, strict=True)
        self.last_samples = [prompt + self.data.tokenizer.decode(ids) for prompt, ids in pairs]
        if is_main():
            text = "".join(f"--- step {step} ---\n{sample}\n" for sample in self.last_samples)
            self.folder.append(self.folder.samples_file, text)
            self.trackers.put("text", step, self.last_samples)

    def _save(self, state: TrainState, step: int) -> int:
        """Begin to save; return the step."""
        self._log_pending()
        self.checkpoints.check()
        evaluated = self.data.valid and self._due(step, self.config.eval.every_steps)
        self.checkpoints.save(state, self.valid_loss if evaluated else None)
        return step

    def _write(self, record: dict[str, Any]) -> None:
        if is_main():
            record["unix_secs"] = round(time.time(), 3)
            self.folder.log(record)
            self.trackers.record(record)


def encode_prompts(config: Config, tokenizer: Any) -> list[list[int]]:
    """Return the ids of `sample.prompts`, each after an end of text; raise UserError for one that can't be used."""
    texts = config.sample.prompts if config.sample.max_tokens else ()
    prompts = [[tokenizer.eot_id, *tokenizer.encode(text)] for text in texts]
    check_prompts(prompts, config.model.context)
    return prompts


def mesh_summary(mesh: Mesh) -> str:
    """Return the mesh in words."""
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    device = mesh.devices.flat[0].device_kind
    return f"{mesh.size} x {device}" + (f" ({sizes}), batch split in {batch_shards(mesh)}" if sizes else "")
