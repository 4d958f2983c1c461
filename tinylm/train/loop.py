"""The training loop: a plain loop with visible "is it time" blocks (log, evaluate, sample, save).

The host runs ahead of the device: metrics of one dispatch are read after the next one is under way,
and nothing else waits but what must (evaluation, samples, the copy of a save). So the host learns
of a bad step one dispatch late; it settles what it knows before anything that depends on it. What
must not repeat after a crash is in the state.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tinylm.core.chips import peak_flops
from tinylm.core.distributed import (
    BARRIER_SECS,
    LEAVE_SECS,
    barrier,
    is_main,
    lost_peer,
    note_first_step,
)
from tinylm.core.errors import Preempted, one_line
from tinylm.core.log import say, say_once
from tinylm.core.mesh import owned_rows, place_batch
from tinylm.core.preemption import StopRequest
from tinylm.core.replicas import make_replica_check
from tinylm.core.watchdog import Watchdog
from tinylm.data.pipeline import train_batches
from tinylm.model.flops import train_flops_per_token
from tinylm.run.checkpoint import Checkpoints
from tinylm.run.folder import RunFolder
from tinylm.train import bad_steps as guard
from tinylm.train.config import Config
from tinylm.train.evaluator import Looks
from tinylm.train.goodput import Account
from tinylm.train.init_from import initial_state
from tinylm.train.optimizer import make_schedule
from tinylm.train.progress import Outcome, Progress
from tinylm.train.state import Blueprint, TrainState
from tinylm.train.step import make_train_steps
from tinylm.train.trackers import Trackers
from tinylm.view.plot import draw_loss


class Trainer:
    """One run on one mesh: the parts that the loop's blocks share."""

    def __init__(
        self, config: Config, data: Any, mesh: Mesh, folder: RunFolder, blueprint: Blueprint
    ):
        """Take the parts; compile nothing yet."""
        self.config, self.data, self.mesh, self.folder, self.blueprint = (
            config,
            data,
            mesh,
            folder,
            blueprint,
        )
        schedule = make_schedule(config.optimizer, config.train.num_steps)
        self.train_steps: Any = make_train_steps(blueprint, schedule, config.train)
        self.looks = Looks(config, data, mesh, blueprint)
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
        self.flops_per_token = train_flops_per_token(config.model, config.data.seq_len)
        self.peak_flops = peak_flops(list(mesh.devices.flat))
        self.train_loss: float | None = None
        self.valid_loss: float | None = None
        self.valid_step = -1
        self.compare_replicas = make_replica_check(mesh, blueprint.abstract.params)
        self.account = Account(folder)
        self.rows = config.micro_batch_rows
        self.owned = owned_rows(mesh, self.rows)  # of a micro-batch: those of this process
        self.step = (
            0  # as far as is known; where a dispatch is pending, as if no step of it were bad
        )
        self.settled = 0  # steps whose metrics were read
        self.pending: tuple[dict[str, jax.Array], int] | None = None
        self.bad_batch = -1  # that a rollback is to leave behind, where it is at least 0
        self.guard: dict[
            str, Any
        ] = {}  # the state's, on the host; it is brought up to date as steps settle
        self.last_samples: list[str] = []
        self.trackers = Trackers(config, folder)
        self.lock = contextlib.ExitStack()  # of the workdir, given free when the run ends

    def restore_or_init(self) -> TrainState:
        """Return the state of the newest checkpoint, or a new one."""
        step = self.checkpoints.newest()
        if step is not None:
            say(f"resuming from step {step} in {self.folder.path}")
            return self.checkpoints.restore(step, self.blueprint.abstract)
        return initial_state(self.config, self.blueprint)

    def run(self, stop: StopRequest | None = None) -> Outcome:
        """Train to the last step, until patience ends or until asked to stop; return how it went.

        Raises Preempted, after a save, where the run was asked to stop.
        """
        started = time.monotonic()
        with self.lock, contextlib.closing(Watchdog(self.config.train.hang_secs)) as self.watchdog:
            self.stop = stop or StopRequest()
            try:
                return self._train(started)
            except Exception as error:
                self._finish_save(error)
                raise

    def _train(self, started: float) -> Outcome:
        config, state = self.config, self._start(self.restore_or_init())
        self.progress = Progress(self.step, config.train.last_step)
        while True:
            improved = False
            if self._due(config.train.replicas_every_steps):
                self.compare_replicas(state.params)
            if (
                self._due(config.eval.every_steps)
                and self.data.valid
                and self.step > self.guard["evaluated_step"]
            ):
                state, improved = self._evaluate(state)
            if improved or (self._due(config.checkpoint.every_steps) and self.saved != self.step):
                state = self._save(state)
            if (
                config.sample.every_steps
                and self.step % config.sample.every_steps == 0
                and self.sampled != self.step
            ):
                self._sample(state.params)
            # Before the end is looked at: of the last evaluation or samples something may have been
            # left out.
            if self.stop.reached():
                break
            if self.step >= config.train.last_step or self._out_of_patience():
                break
            try:
                state = self._dispatch(state)
            except Preempted:  # while it waited for data
                break
            if self.step == config.train.last_step or any(map(self._due, self._cadences())):
                self._settle()
            if self.bad_batch >= 0:
                state = self._roll_back()
        if not self._end(state):
            raise Preempted(
                f"asked to stop; step {self.step} is saved in {self.folder.path}; give the "
                "same command."
            )
        reason = (
            "train.stop_step is reached" if self.step < config.train.num_steps else "all steps done"
        )
        if self._out_of_patience():
            reason = f"no better validation loss in {config.eval.patience} evaluations"
        seconds, best = time.monotonic() - started, self.guard["best_loss"]
        return Outcome(self.step, self.train_loss, self.valid_loss, best, seconds, reason)

    def _start(self, state: TrainState) -> TrainState:
        """Take over a state: where it is, and which batch comes next."""
        self.guard = guard.on_host(state.guard)
        self.step = self.settled = self.saved = self.sampled = int(state.step)
        shape, start = (
            (self.config.train.accumulation_steps, self.rows),
            self.step + self.guard["skipped"],
        )
        self.batches = train_batches(
            self.data.train, batch_shape=shape, owned_rows=self.owned, start=start
        )
        self.settled_at = time.monotonic()
        return state

    def _roll_back(self) -> TrainState:
        """Return the state of the last checkpoint, with the batches up to the bad one left out."""
        past, in_row, self.bad_batch, self.pending = (
            self.bad_batch,
            self.guard["bad_in_row"],
            -1,
            None,
        )
        self.batches.close()
        self.account.redo_until = max(self.account.redo_until, self.settled)
        self.checkpoints.check(wait=True)
        state = self.restore_or_init()
        values = {"skipped": past + 1 - int(state.step), "bad_in_row": in_row}
        state = self._start(self._with_guard(state, values))
        self.progress.restart(self.step)
        return state

    def _with_guard(self, state: TrainState, values: dict[str, Any]) -> TrainState:
        self.guard = {**self.guard, **values}
        return dataclasses.replace(state, guard=guard.with_values(state.guard, values))

    def _out_of_patience(self) -> bool:
        return 0 < self.config.eval.patience <= self.guard["evals_since_best"]

    def _dispatch(self, state: TrainState) -> TrainState:
        """Send the device steps up to the next at which something is due; settle the dispatch
        before, done by now.
        """
        count = min(self.config.train.steps_per_dispatch, self._next_stop() - self.step)
        with self.account.phase("data"), self.stop.interrupts():
            placed = self._place([next(self.batches)[1] for _ in range(count)])
        host_secs = (time.monotonic() - self.settled_at) / count
        if self.stop.nothing_to_save:
            self._compile(state, placed)
        state, metrics = self.train_steps(state, placed, count, self.config.seed)
        if self.stop.nothing_to_save:
            self.stop.nothing_to_save = False
            note_first_step()
        self.checkpoints.check()
        self._settle()
        self.pending, self.step = (metrics, count), self.step + count
        self.watchdog.beat(self.step, host_secs)
        self.settled_at = time.monotonic()
        return state

    def _compile(self, state: TrainState, placed: dict[str, jax.Array]) -> None:
        """Compile the step; wait for the other processes, of which none may be late by half a
        minute from here on.
        """
        with self.progress.pause(), self.account.phase("compile"):
            self.train_steps = self.train_steps.lower(state, placed, 1, self.config.seed).compile()
            barrier(
                "compiled", 3600
            )  # one host may find the program in its cache, another compile it

    def _settle(self) -> None:
        """Read what the pending dispatch did, waiting for the device if need be: log its steps,
        count bad ones.
        """
        if self.pending is None:
            return
        (metrics, count), self.pending = self.pending, None
        host = jax.device_get(metrics)
        for step in (
            {name: float(values[i]) for name, values in host.items()} for i in range(count)
        ):
            if step["bad"] and self.bad_batch < 0:
                self._note_bad_step(step)
            elif self.bad_batch < 0:
                self.settled += 1
                is_empty = math.isnan(step["loss"])
                if is_empty:
                    say_once(
                        "warning: a batch has no target token, so its step learns nothing; "
                        "see data.loss_on."
                    )
                elif self.config.train.on_bad_step != "rollback":
                    self.guard["bad_in_row"] = 0
                if self._due(self.config.train.log_every_steps, self.settled):
                    self._log(self.settled, step)
            self.account.lap(lost=bool(step["bad"]) or self.settled <= self.account.redo_until)

    def _note_bad_step(self, step: dict[str, float]) -> None:
        """Do what the policy says about a step whose batch the device has passed over."""
        c = self.config.train
        record = {"step": self.settled, "batch": self.settled + self.guard["skipped"], **step}
        self.guard["skipped"] += 1
        self.guard["bad_in_row"] += 1
        self.step -= 1
        self._write({**record, "split": "bad"})
        line = guard.verdict(c.on_bad_step, c.max_bad_steps, self.guard["bad_in_row"], record)
        self.progress.note(f"warning: {line}")
        if c.on_bad_step == "rollback":
            self.bad_batch = record["batch"]

    def _end(self, state: TrainState) -> bool:
        """Write what is not yet written: metrics, the last step, samples, the plot.

        Return whether all of it is, False where the run was asked to stop: then there are no
        samples and no plot.
        """
        self._settle()
        if self.saved != self.step and self.bad_batch < 0:
            self._save(state)
        self.batches.close()
        finished = not self.stop.reached()
        if finished and self.config.sample.max_tokens:
            self._sample(state.params)
            finished = not self.stop.reached()
        self.progress.close()
        if is_main() and finished and self.config.writers.plot and draw_loss(self.folder):
            self.trackers.put("picture", self.step, str(self.folder.plot_file))
        self._write(self.account.record(self.step))
        self.checkpoints.close()
        self.folder.flush()
        return finished

    def _finish_save(self, error: Exception) -> None:
        """Let a save under way end before the program does because of `error`.

        A save that waits for a process which is lost never ends; then the time to leave is all that
        it gets.
        """
        with self.watchdog.patient():
            self.checkpoints.finish(LEAVE_SECS if lost_peer(error) else BARRIER_SECS)

    def _place(self, host: list[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
        """Stack host batches to [K, A, rows, T], K the same in every dispatch, and put them on the
        mesh.
        """
        longest = min(
            every for every in (self.config.train.steps_per_dispatch, *self._stops()) if every
        )
        missing = longest - len(host)
        stacked = {
            name: np.stack([batch[name] for batch in host] + [host[-1][name]] * missing)
            for name in host[0]
        }
        return place_batch(self.mesh, stacked, self.owned, self.rows, 2)

    def _due(self, every: int, step: int = -1) -> bool:
        step = self.step if step < 0 else step
        return every > 0 and (step % every == 0 or step == self.config.train.last_step)

    def _cadences(self) -> tuple[int, ...]:
        c = self.config
        return (
            c.eval.every_steps,
            c.sample.every_steps,
            c.checkpoint.every_steps,
            c.train.replicas_every_steps,
        )

    def _next_stop(self) -> int:
        """Return the first step from here on at which something is due."""
        return min((self.step // every + 1) * every for every in self._stops() if every)

    def _stops(self) -> tuple[int, ...]:
        """Return after how many steps a dispatch must end; 0: never for that."""
        return *self._cadences(), self.config.train.log_every_steps, self.config.train.last_step

    def _log(self, step: int, values: dict[str, float]) -> None:
        """Write the metrics of a step; the loss of one without any target token is none."""
        has_loss = not math.isnan(values["loss"])
        if has_loss:
            self.train_loss = values["loss"]
        speed = self.progress.tokens_per_sec(step, self.config.data.tokens_per_step)
        mfu = speed * self.flops_per_token / self.peak_flops if self.peak_flops else None
        shown = {name: value for name, value in values.items() if name != "bad"}
        self._write({"step": step, "split": "train", **shown, "tokens_per_sec": speed, "mfu": mfu})
        text = f"loss {values['loss']:.4f}" if has_loss else "no target token"
        self.progress.show(step, text, speed, self.valid_loss)

    def _evaluate(self, state: TrainState) -> tuple[TrainState, bool]:
        """Evaluate; return the state with its guard brought up to date, and whether the loss is the
        best so far.

        Where the run is asked to stop meanwhile, nothing is noted: it evaluates when it goes on.
        """
        try:
            with self._aside("eval"), self.stop.interrupts():
                found = self.looks.evaluate(state.params, self.stop.check)
        except Preempted:
            return state, False
        if "loss" not in found:
            self.progress.note(
                f"warning: step {self.step} has no validation loss: the batches of its "
                "evaluation hold no target "
                "token; check eval.max_batches, data.valid_source and data.loss_on."
            )
            return self._with_guard(state, {"evaluated_step": self.step}), False
        self.valid_loss, self.valid_step = found["loss"], self.step
        floor = self.data.floor_nats_per_token
        self._write(
            {
                "step": self.step,
                "split": "valid",
                **found,
                **({} if floor is None else {"floor": floor}),
            }
        )
        known = "" if floor is None else f"  (floor of the corpus {floor:.4f})"
        matches = f"  exact_match {found['exact_match']:.2%}" if "exact_match" in found else ""
        self.progress.note(
            f"step {self.step}  validation loss {self.valid_loss:.4f}{known}{matches}"
        )
        if self.step % self.config.eval.every_steps and self.step != self.config.train.num_steps:
            return (
                state,
                False,
            )  # an extra look at train.stop_step, which an undisturbed run doesn't take
        improved = self.valid_loss < self.guard["best_loss"]
        values = {
            "evaluated_step": self.step,
            "evals_since_best": self.guard["evals_since_best"] + 1,
        }
        if improved:
            values |= {"best_loss": self.valid_loss, "evals_since_best": 0}
        return self._with_guard(state, values), improved

    def _sample(self, params: dict) -> None:
        """Write what the model makes of the fixed prompts into samples.txt."""
        self.sampled = self.step
        try:
            with self._aside("sample"), self.stop.interrupts():
                self.last_samples = self.looks.samples(params)
        except Preempted:
            return
        except Exception as error:
            # Samples are for people to look at: nothing about them may end the run.
            if lost_peer(error):
                raise
            self.progress.note(
                f"warning: the samples of step {self.step} are left out: {one_line(error)}"
            )
            return
        if is_main():
            text = "".join(f"--- step {self.step} ---\n{sample}\n" for sample in self.last_samples)
            self.folder.append(self.folder.samples_file, text)
            self.trackers.put("text", self.step, self.last_samples)

    def _save(self, state: TrainState) -> TrainState:
        """Begin to save; return the state, in which a rollback counts anew from here on."""
        if self.config.train.on_bad_step == "rollback" and self.guard["bad_in_row"]:
            state = self._with_guard(state, {"bad_in_row": 0})
        with self._aside("save"):
            self.checkpoints.save(state, self.valid_loss if self.valid_step == self.step else None)
        self._write(self.account.record(self.step))
        self.saved = self.step
        return state

    @contextlib.contextmanager
    def _aside(self, kind: str) -> Iterator[None]:
        """Do something beside training: its time is booked as its own, and it may take long."""
        with self.progress.pause(), self.account.phase(kind), self.watchdog.patient():
            yield

    def _write(self, record: dict[str, Any]) -> None:
        if is_main():
            record["unix_secs"] = round(time.time(), 3)
            self.folder.log(record)
            self.trackers.record(record)
