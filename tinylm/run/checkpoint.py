"""Checkpoints: sharded, asynchronous, complete or absent, and verified before they are restored.

The one module that knows Orbax, apart from what Orbax lacks in s3:// (`orbax_s3`). A step is kept
as two items: `params`, which tools read alone, and `train` (optimizer state, step, guards), with
checksums of all files. The latest `checkpoint.keep` steps and the best by validation loss are kept.
A step that fails its checksums is named and passed over for the one before.

While a step is written or removed, there is a mark `STEP.unfinished` next to it:

    save    mark | copy to the host | write params, train ... | checksums | unmark | remove old ones
            <--- the training waits -->  <------------- in the background --------------------->

A kill at any point leaves a step that is whole, or one that the mark says isn't. Where a step is
saved that is there already (a run that was stopped during an evaluation makes it when it goes on,
and what it found belongs to the state), the old one stays as `STEP.before` until the new one is
whole.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import jax
from etils import epath

from tinylm.core import buckets
from tinylm.core.agreement import from_main
from tinylm.core.distributed import is_main, speaker
from tinylm.core.errors import StorageError, UserError
from tinylm.core.files import make_folder
from tinylm.core.log import alive, say
from tinylm.core.settings import Section, setting
from tinylm.core.storage import (
    check_address,
    explained,
    explaining,
    failures,
    in_bucket,
    in_words,
)
from tinylm.run import checksums, orbax_s3

ITEMS = ("params", "train")
# After this long a save is given up: where one process can't write its part, others wait for it.
_COMMIT_SECS = 1800
# Between two tries of the last save. The libraries for buckets try again for a while by themselves.
_PAUSE_SECS = 5.0
# How TensorStore begins its ValueError where a service fails or refuses. Others (NOT_FOUND,
# INVALID_ARGUMENT, FAILED_PRECONDITION) are about what was saved.
_SERVICE_FAILS = re.compile(
    "UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|INTERNAL|PERMISSION_DENIED|UNAUTHENTICATED"
)


def _failures() -> tuple[type[Exception], ...]:
    """Return what Orbax and TensorStore raise for a disk or bucket that is full or gone."""
    return (ValueError, RuntimeError, *failures())


@dataclasses.dataclass
class CheckpointConfig(Section, name="checkpoint"):
    """When to save and how much to keep."""

    every_steps: int = setting(
        1000,
        "steps between checkpoints (0: only the best and the last)",
        free=True,
        least=0,
        aliases=(
            "save_steps",
            "save_every",
            "checkpoint_period",
            "checkpoint_interval",
            "save_interval",
        ),
    )
    dir: str = setting(
        "",
        (
            "folder, as on scratch storage, in which each run makes one for its checkpoints "
            "(empty: in the run's folder)"
        ),
        free=True,
        aliases=("checkpoint_dir", "save_dir", "checkpoint_folder"),
    )
    # With one alone, a damaged checkpoint would be the end of a run.
    keep: int = setting(
        2,
        "latest checkpoints to keep, besides the best",
        free=True,
        least=2,
        aliases=("save_total_limit", "max_to_keep"),
    )
    outage_secs: float = setting(
        1800.0,
        (
            "how long the last save and the last lines of the logs are tried again where their "
            "bucket fails; earlier ones wait for the next save"
        ),
        free=True,
        least=0,
    )

    def check(self) -> None:
        """Raise UserError for what can't work."""
        super().check()
        check_address("checkpoint.dir", self.dir)


def finished_steps(folder: epath.Path) -> list[int]:
    """Return the steps in a run's folder of checkpoints that were finished, in order."""
    if not folder.exists():
        return []
    names = {path.name for path in folder.iterdir()}
    steps = []
    for name in names:
        if name.isdecimal() and f"{name}.unfinished" not in names:
            steps.append(int(name))
    return sorted(steps)


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, folder: epath.Path, config: CheckpointConfig | None = None):
        """Open the folder for reading, or with a config for writing too."""
        self._folder = folder
        self._config = config
        # The thread that seals a step, and the save that it is at work on.
        self._sealer = ThreadPoolExecutor(1)
        self._sealing: Future[None] | None = None
        # Steps that were found damaged.
        self._damaged: set[int] = set()
        # How the last save failed; "" where it didn't.
        self._failure = ""
        # Of the buckets, Orbax itself knows gs:// alone.
        self._in_s3 = os.fspath(folder).startswith("s3://")
        if self._in_s3:
            orbax_s3.enable()

    # Orbax is slow to import. Most commands open no checkpoint, and a run has time for it while its
    # step compiles.
    @functools.cached_property
    def _ocp(self) -> Any:
        import orbax.checkpoint

        return orbax.checkpoint

    @functools.cached_property
    def _orbax(self) -> Any:
        # Floats hardly get smaller, and compressing takes a copy of them and nearly all the time of
        # a save.
        handlers = {
            name: self._ocp.PyTreeCheckpointHandler(use_compression=False) for name in ITEMS
        }
        # A thread that waits for a folder which a full disk refused would hold up the exit; but
        # where there are several processes, one alone makes folders, and must not fail between two
        # barriers.
        waiting = self._ocp.options.AsyncOptions(
            timeout_secs=_COMMIT_SECS, create_directories_asynchronously=jax.process_count() > 1
        )
        commit = self._ocp.path.atomicity.CommitFileTemporaryPath if self._in_s3 else None
        options = self._ocp.CompositeOptions(temporary_path_class=commit)
        return self._ocp.AsyncCheckpointer(
            self._ocp.CompositeCheckpointHandler(composite_options=options, **handlers),
            async_options=waiting,
            temporary_path_class=commit,
        )

    def get_ready(self) -> None:
        """Import Orbax now instead of at the first save."""
        assert self._orbax is not None

    def steps(self) -> list[int]:
        """Return the finished steps in order, without those that were found damaged."""
        return [step for step in finished_steps(self._folder) if step not in self._damaged]

    def losses(self) -> dict[int, float]:
        """Return the validation loss of each step that has a finite one."""
        losses = {}
        for step in self.steps():
            listed = checksums.read(self._folder / str(step))
            if listed is None or listed.loss is None:
                continue
            if math.isfinite(listed.loss):
                losses[step] = listed.loss
        return losses

    def newest(self) -> int | None:
        """Clear what dead saves left, and return the newest whole step.

        None where no step was ever finished. Raises StorageError where all steps are damaged, or
        their bucket can't be reached.
        """
        with self._reading("looking for checkpoints"):
            return from_main(self._newest)

    def _newest(self) -> int | None:
        if self._config is not None and self._folder.exists():
            self._restore_those_set_aside()
            for path in list(self._folder.iterdir()):
                if path.suffix == ".unfinished":
                    self._remove(path.stem)
                elif ".orbax-checkpoint-tmp" in path.name:
                    path.rmtree()
        newest_first = self.steps()[::-1]
        return self._first_whole(newest_first, ITEMS)

    def find(self, step: str, parts: Sequence[str] = ITEMS) -> int:
        """Return the step that a --step flag means.

        Args:
          step: best (by validation loss; the latest where none was evaluated), latest, or a number.
            Best and latest pass over damaged steps.
          parts: the items of it that will be read, and so must be whole.

        Raises:
          UserError: where there is no checkpoint at all, or none of this number.
          StorageError: where no step that would do is whole, or their bucket can't be reached.
        """
        with self._reading("looking for checkpoints"):
            return from_main(lambda: self._find(step, parts))

    def _find(self, step: str, parts: Sequence[str]) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"{os.fspath(self._folder)} holds no checkpoint; train first.")
        order = steps[::-1]
        if step == "best":
            losses = self.losses()
            # Sorting keeps the order of equals, so that steps without a loss stay newest first.
            order.sort(key=lambda s: losses.get(s, math.inf))
        elif step != "latest":
            names = [str(number) for number in steps]
            if step not in names:
                raise UserError(f"--step={step} must be best, latest or one of {', '.join(names)}.")
            order = [int(step)]
        found = self._first_whole(order, parts)
        assert found is not None, "there are steps"
        return found

    def _first_whole(self, order: list[int], parts: Sequence[str]) -> int | None:
        """Return the first step of `order` that is whole, having named those before it.

        None where `order` is empty.
        """
        first_fault = ""
        for step in order:
            damage = checksums.damage(self._folder / str(step), parts)
            if not damage:
                return step
            self._damaged.add(step)
            fault = f"step {step} in {os.fspath(self._folder)} is damaged: {damage}"
            say(f"warning: {fault}")
            first_fault = first_fault or fault
        if first_fault:
            raise StorageError(
                f"no whole checkpoint is left ({first_fault}); remove the folder to start at step "
                "0."
            )
        return None

    def save(
        self, state: Any, loss: float | None, before_sealing: Callable[[], None] | None = None
    ) -> None:
        """Begin to save a TrainState under its step.

        Args:
          state: copied before this returns, so that it may be donated.
          loss: the validation loss at the step, where there was an evaluation.
          before_sealing: waits, on a thread, for what has to be written before the step counts as
            finished.
        """
        step = int(state.step)
        self._begin(step, loss, before_sealing, params=state.params, train=_rest(state))

    def save_params(self, step: int, params: Any) -> None:
        """Begin to save parameters alone, which is all that an imported model has."""
        self._begin(step, None, None, params=params)

    def insist(self, state: Any, loss: float | None) -> None:
        """Wait for the save of the last state and, as long as its bucket fails, save it again.

        Args:
          state: as `save` was given it.
          loss: as `save` was given it.
        """
        assert self._config is not None, "the folder is open for reading"
        until = time.monotonic() + self._config.outage_secs
        while True:
            self.check(wait=True)
            # One process alone can see the last time pass.
            if not from_main(lambda: self._is_worth_a_try(until), secs=2 * _COMMIT_SECS):
                return
            with buckets.waiting():
                time.sleep(_PAUSE_SECS)
            self.save(state, loss)

    def _is_worth_a_try(self, until: float) -> bool:
        """Say whether the last save failed because of a bucket, and may be tried again."""
        may_pass = self._failure and in_bucket(self._folder)
        return bool(may_pass) and time.monotonic() < until

    def _begin(
        self,
        step: int,
        loss: float | None,
        before_sealing: Callable[[], None] | None,
        **items: Any,
    ) -> None:
        """Copy the items to the host and write them in the background.

        A failure is said, and the next save tries again; only in `close` is it an error.
        """
        self.check(wait=True)
        args = self._ocp.args
        try:
            from_main(lambda: self._make_room(step))
            saved = args.Composite(**{name: args.PyTreeSave(item) for name, item in items.items()})
            self._orbax.save(self._folder / str(step), args=saved)
            self._sealing = self._sealer.submit(self._seal, step, loss, before_sealing)
        except _failures() as error:
            self._fail(error)

    def _make_room(self, step: int) -> None:
        """Mark a step as unfinished; set a whole one of the same number aside, and remove what is
        left of any other.
        """
        try:
            make_folder(self._folder)
            if step in self.steps():
                self._set_aside(step)
            self._remove(str(step), keep_mark=True)
        except failures() as error:
            raise StorageError(in_words(error)) from error

    def _before(self, step: int) -> epath.Path:
        return self._folder / f"{step}.before"

    def _set_aside(self, step: int) -> None:
        """Keep a step under another name."""
        if self._before(step).exists():
            self._before(step).rmtree()
        self._move(self._folder / str(step), self._before(step))

    def _move(self, old: epath.Path, new: epath.Path) -> None:
        """Rename a folder; in a bucket, where nothing can be renamed, copy it."""
        if in_bucket(self._folder):
            files = buckets.file_system(os.fspath(self._folder))
            # Into a folder that a listing still has, though it is gone, it would copy one too deep.
            files.invalidate_cache()
            files.copy(os.fspath(old), os.fspath(new), recursive=True)
        else:
            old.rename(new)

    def _restore_those_set_aside(self) -> None:
        """Put back what was set aside for a save that a kill has ended."""
        finished = finished_steps(self._folder)
        for before in list(self._folder.glob("*.before")):
            step = int(before.stem)
            # A kill may have come while it was copied in a bucket.
            if step not in finished and not checksums.damage(before, ITEMS):
                self._remove(str(step), keep_mark=True)
                self._move(before, self._folder / str(step))
                self._mark(step).unlink()
            if before.exists():
                before.rmtree()

    def _seal(
        self, step: int, loss: float | None, before_sealing: Callable[[], None] | None
    ) -> None:
        """Wait until a step is written, add its checksums, and remove the steps it replaces."""
        self._orbax.wait_until_finished()
        if before_sealing is not None:
            before_sealing()
        if not is_main():
            return
        checksums.write(self._folder / str(step), step=step, loss=loss)
        self._mark(step).unlink()
        if self._before(step).exists():
            self._before(step).rmtree()
        self._damaged.discard(step)

        steps = self.steps()
        kept = set(steps)
        if self._config is not None:
            losses = self.losses()
            kept = set(steps[-self._config.keep :])
            if losses:
                kept.add(min(losses, key=lambda s: losses[s]))
        for old in {*steps, *self._damaged} - kept:
            self._remove(str(old))

    def _mark(self, step: int | str) -> epath.Path:
        return self._folder / f"{step}.unfinished"

    def _remove(self, step: str, keep_mark: bool = False) -> None:
        """Remove a step, which from the first moment on doesn't count as finished."""
        self._mark(step).touch()
        if (self._folder / step).exists():
            (self._folder / step).rmtree()
        if not keep_mark:
            self._mark(step).unlink()

    def check(self, wait: bool = False) -> None:
        """Say how the save in the background failed, where it has ended and did fail.

        Args:
          wait: first, until it has ended.
        """
        sealing = self._sealing
        if sealing is None or not (wait or sealing.done()):
            return
        self._sealing = None
        try:
            sealing.result()
            self._failure = ""
        except _failures() as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Note how a save failed, and say it."""
        self._failure = (
            f"a checkpoint could not be written to {os.fspath(self._folder)}: {in_words(error)}"
        )
        say(f"warning: {speaker()}{self._failure}; the next save tries again", from_all=True)

    def finish(self, secs: float) -> None:
        """Wait for a save under way, at most `secs`; say how it failed, where it did."""
        if self._sealing is None:
            return
        still_running = wait_for([self._sealing], secs).not_done
        if not still_running:
            self.check()

    def close(self) -> None:
        """Wait for a save under way; raise StorageError where the last one failed."""
        self.check(wait=True)
        self._sealer.shutdown()
        # It raises once more what the save failed with, which was said by now.
        with contextlib.suppress(*_failures()):
            self._orbax.close()
        if self._failure:
            remedy = "see that it can be reached" if in_bucket(self._folder) else "free space there"
            raise StorageError(f"{self._failure}; {remedy}; the same command goes on.")

    def restore(self, step: int, abstract: Any) -> Any:
        """Return the TrainState saved at `step`, whatever the mesh that saved it.

        Args:
          step: as `find` or `newest` returned it.
          abstract: a TrainState of shapes, each with its dtype and the sharding it is to have.

        Raises:
          UserError: where what was saved has other parts or shapes.
        """
        found = self._restore(step, params=abstract.params, train=_rest(abstract))
        return dataclasses.replace(abstract, params=found["params"], **found["train"])

    def saved_shapes(self, step: int) -> dict[str, Any]:
        """Return what was saved at `step` besides parameters, as dicts with a shape in each leaf.

        Args:
          step: as `find` or `newest` returned it.
        """
        with self._reading(f"looking at step {step}"):
            found = self._orbax.metadata(self._folder / str(step))
        return jax.tree.map(lambda leaf: tuple(leaf.shape), found.item_metadata["train"].tree)

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Return the parameters saved at `step` alone, laid out as `abstract` says."""
        return self._restore(step, params=abstract)["params"]

    def _restore(self, step: int, **items: Any) -> Any:
        args = self._ocp.args
        wanted = {}
        for name, abstract in items.items():
            laid_out = self._ocp.checkpoint_utils.construct_restore_args(abstract)
            wanted[name] = args.PyTreeRestore(abstract, laid_out)
        try:
            with self._reading(f"reading step {step}"):
                return self._orbax.restore(self._folder / str(step), args=args.Composite(**wanted))
        except UserError:
            raise
        except ValueError as error:
            if in_bucket(self._folder) and _SERVICE_FAILS.match(str(error)):
                raise explained(self._folder, "--workdir", OSError(str(error))) from error
            said = " ".join(str(error).split())
            raise UserError(
                f"step {step} in {os.fspath(self._folder)} doesn't hold what config.json says: "
                f"{said:.120}"
            ) from error

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Say what is being done where it takes long, and how a bucket failed."""
        place = os.fspath(self._folder)
        with alive(lambda: f"{what} in {place}"), explaining(place, "--workdir"):
            yield


def _rest(state: Any) -> dict[str, Any]:
    """Return what a TrainState has besides the parameters: the item `train`."""
    return {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}
