"""The training loop: load, step, settle, and visible "is it time" blocks.

The host runs ahead of the device. It sends the device a dispatch of one or more steps, and reads
the metrics of the dispatch before while that one runs:

    host      load 1 | send 1 | load 2 | send 2 | settle 1 | load 3 | send 3 | settle 2 | load 4 ...
    device             [------ steps of 1 ------][------ steps of 2 ------][------ steps of 3 ---

So the host learns of a bad step one dispatch late, and counts a step that is pending as taken until
it is settled. Before anything that depends on it (evaluation, samples, a save) it settles all.
Dispatches end where something is due. What must not repeat after a crash is in the state.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import jax
from jax.sharding import Mesh

from tinylm.core.agreement import BARRIER_SECS, barrier
from tinylm.core.chips import peak_flops
from tinylm.core.distributed import LEAVE_SECS, is_main, lost_peer, note_first_step
from tinylm.core.errors import Preempted, one_line
from tinylm.core.log import alive, say, say_once
from tinylm.core.preemption import StopRequest
from tinylm.core.replicas import make_replica_check
from tinylm.core.watchdog import Watchdog
from tinylm.data import Data
from tinylm.model.flops import train_flops_per_token
from tinylm.run.checkpoint import Checkpoints
from tinylm.run.folder import RunFolder
from tinylm.train.bad_steps import Guard, verdict, verdict_on_workers
from tinylm.train.clock import Clock
from tinylm.train.config import Config
from tinylm.train.evaluator import Evaluator
from tinylm.train.feed import Feed
from tinylm.train.hosts import Hosts
from tinylm.train.init_from import initial_state
from tinylm.train.local_steps import count_told_passed_over, saved_workers
from tinylm.train.progress import Progress
from tinylm.train.state import Blueprint, TrainState
from tinylm.train.step import compile_ahead
from tinylm.train.trackers import Trackers
from tinylm.view.plot import draw_loss

# One process may find the step's program in its cache while another compiles it.
_COMPILE_BARRIER_SECS = 3600.0


@dataclasses.dataclass
class Outcome:
    """How a run ended."""

    step: int
    loss: float | None  # last training loss logged, nats per target token
    valid_loss: float | None  # of the last evaluation
    best_loss: float
    samples: list[str]  # the last ones
    seconds: float
    reason: str
    slowest_host: str  # in words; nothing where there is one process alone


class Trainer:
    """The parts of one run on one mesh."""

    def __init__(
        self, config: Config, data: Data, mesh: Mesh, folder: RunFolder, blueprint: Blueprint
    ):
        """Put the parts together; compile nothing yet."""
        self.config = config
        self.data = data
        self.mesh = mesh
        self.folder = folder
        self.blueprint = blueprint
        self.evaluator = Evaluator(config, data, mesh, blueprint)
        self.checkpoints = Checkpoints(folder.checkpoints, config.checkpoint)
        self.trackers = Trackers(config, folder)
        self.clock = Clock(folder)
        self.flops_per_token = train_flops_per_token(config.model, config.data.seq_len)
        self.peak_flops = peak_flops(list(mesh.devices.flat))
        # Of the steps, being compiled on a thread.
        self.program: Future[jax.stages.Compiled] | None = None
        # Of the workdir; let go when the run ends.
        self.lock = contextlib.ExitStack()

    def restore_or_init(self) -> TrainState:
        """Return the state of the newest checkpoint, or a new one."""
        step = self.checkpoints.newest()
        if step is None:
            return initial_state(self.config, self.blueprint)
        say(f"resuming from step {step} in {self.folder.path}")
        blueprint = self.blueprint
        if not blueprint.num_workers:
            return self.checkpoints.restore(step, blueprint.abstract)
        saved = saved_workers(self.checkpoints.saved_shapes(step))
        if saved == blueprint.num_workers:
            return self.checkpoints.restore(step, blueprint.abstract)
        say(
            f"{blueprint.num_workers} workers go on where {saved} were: each begins at the mean of "
            "theirs"
        )
        state = self.checkpoints.restore(step, blueprint.with_workers(saved).abstract)
        return blueprint.take_from(state)

    def run(self, stop: StopRequest | None = None) -> Outcome:
        """Train to the last step, until patience ends or until asked to stop.

        Raises:
          Preempted: after a save, where the run was asked to stop.
          NumericError, StorageError, HangError: what ended the run; a save under way is finished.
        """
        watchdog = Watchdog(self.config.train.hang_secs)
        with self.lock, contextlib.closing(watchdog):
            try:
                # A run that has taken all its steps needs no program.
                if max(self.checkpoints.steps(), default=0) < self.config.train.last_step:
                    self.program = compile_ahead(self.blueprint)
                state = self.restore_or_init()
                return _Loop(self, state, stop or StopRequest(), watchdog).run(state)
            except Exception as error:
                # A save that waits for a process which is lost never ends; then the time to leave
                # is all that it gets.
                secs = LEAVE_SECS if lost_peer(error) else BARRIER_SECS
                with watchdog.patient():
                    self.folder.send_logs()
                    self.checkpoints.finish(secs)
                    self.folder.wait_for_logs(LEAVE_SECS / 4)
                raise


@dataclasses.dataclass(frozen=True)
class _Dispatch:
    """Steps that the device was sent, and that weren't settled yet."""

    metrics: dict[str, jax.Array]  # arrays of at least `count` numbers, one a step
    count: int


class _Loop:
    """Where a run stands while it trains."""

    def __init__(self, trainer: Trainer, state: TrainState, stop: StopRequest, watchdog: Watchdog):
        """Begin where `state` is."""
        self.started = time.monotonic()
        config = trainer.config
        self.config = config
        self.data = trainer.data
        self.folder = trainer.folder
        self.trainer = trainer
        self.checkpoints = trainer.checkpoints
        self.clock = trainer.clock
        self.stop = stop
        self.watchdog = watchdog
        self.hosts = Hosts(watchdog)

        self.feed = Feed(config, trainer.data.train, trainer.mesh, config.dispatch_steps)
        self.train_steps: Any = None  # the program, from the first dispatch on
        self.compare_replicas = make_replica_check(trainer.mesh, trainer.blueprint.abstract.params)

        # The state's guard in numbers of the host, brought up to date as steps settle.
        self.guard: Guard = state.guard.on_host()
        self.settled = int(state.step)  # steps whose metrics were read
        self.pending: _Dispatch | None = None
        # Bad steps that workers have passed over, as far as they were told.
        self.passed_over = count_told_passed_over(state.opt_state)
        # From when on this host works for the next dispatch, and how long it has waited for data.
        self.at_work_since = time.monotonic()
        self.input_wait_secs = 0.0
        # The step of the last checkpoint, of the last samples, of the last evaluation.
        self.saved = self.settled
        self.sampled = self.settled
        self.valid_step = -1
        # The batch that a rollback is to leave behind.
        self.bad_batch: int | None = None

        self.train_loss: float | None = None
        self.valid_loss: float | None = None
        self.samples: list[str] = []
        self.progress = Progress(self.settled, config.train.last_step)
        self.clock.restart_rate(self.settled)

    @property
    def step(self) -> int:
        """Steps taken, as far as is known: pending ones count as if none of them were bad."""
        return self.settled + (self.pending.count if self.pending else 0)

    @property
    def next_batch(self) -> int:
        """The batch of the next step: batches that bad steps skipped are left behind."""
        return self.step + self.guard.skipped

    def run(self, state: TrainState) -> Outcome:
        """Train on from the state that the loop was made for; return how it went."""
        config = self.config
        while True:
            if self.is_due(config.train.replicas_every_steps):
                self.compare_replicas(state.params)
            improved = False
            if self.is_due(config.eval.every_steps) and self.can_evaluate():
                state, improved = self.evaluate(state)
            if improved or (self.is_due(config.checkpoint.every_steps) and self.saved != self.step):
                state = self.save(state)
            if self.is_time_for_samples():
                self.sample(state.params)

            # Before the end is looked at, because the last evaluation or samples may be missing.
            if self.stop.reached():
                break
            if self.step >= config.train.last_step or self.is_out_of_patience():
                break

            count = self.steps_of_next_dispatch()
            try:
                batches = self.load(self.next_batch, count)
            except Preempted:
                break
            state = self.dispatch(state, batches, count)
            cadences = config.settling_cadences
            if self.step == config.train.last_step or any(map(self.is_due, cadences)):
                self.settle()
                self.at_work_since = time.monotonic()
            if self.bad_batch is not None:
                state = self.roll_back(past_batch=self.bad_batch)
        return self.end(state)

    # When something is due.

    def is_due(self, every_steps: int, step: int | None = None) -> bool:
        """Say whether a multiple of `every_steps` (0: none), or the last step, was reached."""
        if step is None:
            step = self.step
        is_last = step == self.config.train.last_step
        return every_steps > 0 and (step % every_steps == 0 or is_last)

    def can_evaluate(self) -> bool:
        """Say whether there is a validation split, and no evaluation of this step yet."""
        return bool(self.data.valid) and self.step > self.guard.evaluated_step

    def is_time_for_samples(self) -> bool:
        """Say whether samples are due; those of the last step come with the end of the run."""
        every_steps = self.config.sample.every_steps
        return every_steps > 0 and self.step % every_steps == 0 and self.sampled != self.step

    def is_out_of_patience(self) -> bool:
        """Say whether as many evaluations as eval.patience brought nothing better."""
        patience = self.config.eval.patience
        return 0 < patience <= self.guard.evals_since_best

    def steps_of_next_dispatch(self) -> int:
        """Return how many steps to send: up to the next at which something is due."""
        next_ends = [(self.step // every + 1) * every for every in self.config.dispatch_ends]
        return min(self.config.train.steps_per_dispatch, min(next_ends) - self.step)

    # Load, step, settle.

    def load(self, first_batch: int, count: int) -> dict[str, jax.Array]:
        """Return batches on the mesh; raise Preempted where the run is asked to stop meanwhile."""
        began = time.monotonic()
        with self.clock.phase("data"), self.stop.interrupts():
            batches = self.feed.load(first_batch, count)
        self.input_wait_secs += time.monotonic() - began
        return batches

    def dispatch(self, state: TrainState, batches: dict[str, jax.Array], count: int) -> TrainState:
        """Send the device `count` steps, then settle the dispatch before, which is done by now."""
        host_secs = time.monotonic() - self.at_work_since
        self.hosts.note(count, host_secs, self.input_wait_secs)
        self.input_wait_secs = 0.0
        is_first = self.stop.nothing_to_save
        if is_first:
            self.await_program()
        last_step = self.config.train.last_step
        state, metrics = self.train_steps(state, batches, count, self.config.seed, last_step)
        if is_first:
            self.stop.nothing_to_save = False
            note_first_step()
        self.checkpoints.check()
        self.settle()
        self.pending = _Dispatch(metrics, count)
        self.watchdog.beat(self.step, host_secs / count)
        self.at_work_since = time.monotonic()
        return state

    def await_program(self) -> None:
        """Wait until the step is compiled, here and in the other processes: from here on none may
        be late.
        """
        with self.clock.phase("compile"):
            self.checkpoints.get_ready()
            program = self.trainer.program or compile_ahead(self.trainer.blueprint)
            self.train_steps = program.result()
            barrier("compiled", _COMPILE_BARRIER_SECS)

    def settle(self) -> None:
        """Read what the pending dispatch did, waiting for the device if need be.

        Its steps are logged and bad ones counted. Those after a bad step that a rollback leaves
        behind count for nothing.
        """
        if self.pending is None:
            return
        dispatch, self.pending = self.pending, None
        arrays = jax.device_get(dispatch.metrics)
        for i in range(dispatch.count):
            metrics = {name: float(values[i]) for name, values in arrays.items()}
            is_bad = metrics.pop("bad") > 0
            if self.bad_batch is None:
                if is_bad:
                    self.settle_bad_step(metrics)
                else:
                    self.settle_good_step(metrics)
            self.clock.lap(lost=is_bad or self.settled <= self.clock.redo_until)

    def settle_good_step(self, metrics: dict[str, float]) -> None:
        """Count a step that was taken, and log it where that is due."""
        self.settled += 1
        self.settle_bad_steps_of_workers(metrics)
        if math.isnan(metrics["loss"]):
            say_once(
                "warning: a batch has no target token, so its step learns nothing; see "
                "data.loss_on."
            )
        elif self.config.train.on_bad_step != "rollback":
            self.guard = dataclasses.replace(self.guard, bad_in_row=0)
        if self.is_due(self.config.train.log_every_steps, self.settled):
            self.log(self.settled, metrics)

    def settle_bad_steps_of_workers(self, metrics: dict[str, float]) -> None:
        """Say what workers that train by themselves have passed over, where a step tells of more.

        Raises NumericError where the run must not go on.
        """
        passed_over = int(metrics.pop("passed_over", 0))
        in_row = int(metrics.pop("passed_over_in_row", 0))
        if passed_over <= self.passed_over:
            return
        c = self.config.train
        count = passed_over - self.passed_over
        self.passed_over = passed_over
        self.write({"step": self.settled, "split": "bad", "passed_over": count})
        line = verdict_on_workers(c.on_bad_step, c.max_bad_steps, in_row, self.settled, count)
        self.progress.note(f"warning: {line}")

    def settle_bad_step(self, metrics: dict[str, float]) -> None:
        """Do what the policy says about a step whose batch the device has passed over.

        Raises NumericError where the run must not go on.
        """
        c = self.config.train
        batch = self.settled + self.guard.skipped
        record = {"step": self.settled, "batch": batch, **metrics}
        self.guard = dataclasses.replace(
            self.guard,
            skipped=self.guard.skipped + 1,
            bad_in_row=self.guard.bad_in_row + 1,
        )
        self.write({**record, "bad": 1.0, "split": "bad"})
        line = verdict(c.on_bad_step, c.max_bad_steps, self.guard.bad_in_row, record)
        self.progress.note(f"warning: {line}")
        if c.on_bad_step == "rollback":
            self.bad_batch = batch

    def roll_back(self, past_batch: int) -> TrainState:
        """Return the state of the last checkpoint, with the batches up to a bad one left out."""
        bad_in_row = self.guard.bad_in_row
        self.bad_batch = None
        self.pending = None
        self.clock.redo_until = max(self.clock.redo_until, self.settled)
        self.checkpoints.check(wait=True)
        state = self.trainer.restore_or_init()
        self.guard = state.guard.on_host()
        self.settled = int(state.step)
        self.saved = self.settled
        self.sampled = self.settled
        self.at_work_since = time.monotonic()
        self.clock.restart_rate(self.settled)
        return self.with_guard(state, skipped=past_batch + 1 - self.settled, bad_in_row=bad_in_row)

    def with_guard(self, state: TrainState, **values: float) -> TrainState:
        """Put numbers into the guard, here and in the state."""
        self.guard = dataclasses.replace(self.guard, **values)
        return dataclasses.replace(state, guard=state.guard.on_device_with(**values))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a step; the loss of one without any target token is none."""
        loss = metrics["loss"]
        text = "no target token"
        if not math.isnan(loss):
            self.train_loss = loss
            text = f"loss {loss:.4f}"
        tokens_per_sec = self.clock.tokens_per_sec(step, self.config.data.tokens_per_step)
        mfu = None
        if self.trainer.peak_flops:
            mfu = tokens_per_sec * self.trainer.flops_per_token / self.trainer.peak_flops
        self.write(
            {
                "step": step,
                "split": "train",
                **metrics,
                "tokens_per_sec": tokens_per_sec,
                "mfu": mfu,
                **self.hosts.figures(),
            }
        )
        self.progress.show(step, text, tokens_per_sec, self.valid_loss)

    # What is done besides training.

    @contextlib.contextmanager
    def aside(self, kind: str) -> Iterator[None]:
        """Do something besides training: its time is booked as its own, and it may take long."""
        began = time.monotonic()
        try:
            with self.clock.phase(kind), self.watchdog.patient():
                yield
        finally:
            self.at_work_since += time.monotonic() - began

    def evaluate(self, state: TrainState) -> tuple[TrainState, bool]:
        """Evaluate; return the state with its guard brought up to date, and whether it improved.

        Where the run is asked to stop meanwhile, nothing is noted: it evaluates when it goes on.
        """
        try:
            with self.aside("eval"), self.stop.interrupts():
                found = self.trainer.evaluator.evaluate(state.params, self.stop.check)
        except Preempted:
            return state, False
        if "loss" not in found:
            self.progress.note(
                f"warning: step {self.step} has no validation loss: the batches of its evaluation "
                "hold no target token; check eval.max_batches, data.valid_source and data.loss_on."
            )
            return self.with_guard(state, evaluated_step=self.step), False

        loss = found["loss"]
        self.valid_loss = loss
        self.valid_step = self.step
        record = {"step": self.step, "split": "valid", **found}
        line = f"step {self.step}  validation loss {loss:.4f}"
        floor = self.data.floor_nats_per_token
        if floor is not None:
            record["floor"] = floor
            line += f"  (floor of the corpus {floor:.4f})"
        if "exact_match" in found:
            line += f"  exact_match {found['exact_match']:.2%}"
        self.write(record)
        self.progress.note(line)

        is_regular = self.step % self.config.eval.every_steps == 0
        if not is_regular and self.step != self.config.train.num_steps:
            # An extra evaluation at train.stop_step, which an undisturbed run doesn't make: it must
            # not count for patience.
            return state, False
        improved = loss < self.guard.best_loss
        if improved:
            values = {"best_loss": loss, "evals_since_best": 0}
        else:
            values = {"evals_since_best": self.guard.evals_since_best + 1}
        return self.with_guard(state, evaluated_step=self.step, **values), improved

    def sample(self, params: dict) -> None:
        """Write what the model makes of the fixed prompts into samples.txt."""
        self.sampled = self.step
        try:
            with self.aside("sample"), self.stop.interrupts():
                samples = self.trainer.evaluator.samples(params)
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
        self.samples = samples
        if is_main():
            text = "".join(f"--- step {self.step} ---\n{sample}\n" for sample in samples)
            self.folder.append(self.folder.samples_file, text)
            self.trainer.trackers.put("text", self.step, samples)

    def save(self, state: TrainState) -> TrainState:
        """Begin to save; return the state, in which a rollback counts from here on again."""
        if self.config.train.on_bad_step == "rollback" and self.guard.bad_in_row:
            state = self.with_guard(state, bad_in_row=0)
        # Lines of the steps so far must not be lost where a kill follows the save.
        self.folder.send_logs()
        with self.aside("save"), alive(lambda: f"saving step {self.step}"):
            self.checkpoints.save(state, self.loss_of_step(), self.folder.wait_for_logs)
        self.write(self.clock.record(self.step))
        self.saved = self.step
        return state

    def loss_of_step(self) -> float | None:
        """Return the validation loss at this step, where there was an evaluation."""
        return self.valid_loss if self.valid_step == self.step else None

    def write(self, record: dict[str, Any]) -> None:
        """Add a record to metrics.jsonl and to the trackers."""
        if is_main():
            record["unix_secs"] = round(time.time(), 3)
            self.folder.log(record)
            self.trainer.trackers.record(record)

    # The end.

    def end(self, state: TrainState) -> Outcome:
        """Write what is not yet written: metrics, the last step, samples, the plot.

        Raises Preempted where the run was asked to stop: then there are no samples and no plot.
        """
        self.settle()
        if self.saved != self.step and self.bad_batch is None:
            self.save(state)
        self.feed.close()
        is_finished = not self.stop.reached()
        if is_finished and self.config.sample.max_tokens:
            self.sample(state.params)
            is_finished = not self.stop.reached()
        self.progress.close()
        with self.aside("save"), alive(lambda: f"waiting for the save of step {self.step}"):
            if self.saved == self.step:
                self.checkpoints.insist(state, self.loss_of_step())
            self.folder.wait_for_logs()
        if is_main() and is_finished and self.config.writers.plot and draw_loss(self.folder):
            self.trainer.trackers.put("picture", self.step, str(self.folder.plot_file))
        self.write(self.clock.record(self.step))
        self.checkpoints.close()
        self.folder.flush(self.config.checkpoint.outage_secs)
        if not is_finished:
            # Behind a bad step that is to be rolled back nothing is saved.
            raise Preempted(
                f"asked to stop; step {self.saved} is saved in {self.folder.path}; give the same "
                "command."
            )
        return Outcome(
            step=self.step,
            loss=self.train_loss,
            valid_loss=self.valid_loss,
            best_loss=self.guard.best_loss,
            samples=self.samples,
            seconds=time.monotonic() - self.started,
            reason=self.reason_of_end(),
            slowest_host=self.hosts.summary(),
        )

    def reason_of_end(self) -> str:
        """Say why the run ended."""
        if self.is_out_of_patience():
            return f"no better validation loss in {self.config.eval.patience} evaluations"
        if self.step < self.config.train.num_steps:
            return "train.stop_step is reached"
        return "all steps done"
