"""Checkpoints: sharded, asynchronous, complete or absent, and verified before they are restored.

The one module that knows Orbax. A step is kept as two items: `params`, which tools read alone, and
`train` (optimizer state, step, guards), with checksums of all files. While a step is written or
removed, `STEP.unfinished` lies beside it: a kill at any point leaves a step that is whole, or one
that says it isn't. The latest `checkpoint.keep` steps and the best by validation loss are kept. A
step that fails its checksums is named and passed over for the one before.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import jax
from etils import epath

from tinylm.core.distributed import from_main, is_main, speaker
from tinylm.core.errors import StorageError, UserError, one_line
from tinylm.core.log import say
from tinylm.core.settings import Section, setting
from tinylm.core.storage import check_address, failures
from tinylm.run import checksums

ITEMS = ("params", "train")
# After which a save is given up: where one process can't write its part, the others wait so long.
_COMMIT_SECS = 1800


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

    def check(self) -> None:
        """Raise UserError for what can't work."""
        super().check()
        check_address("checkpoint.dir", self.dir)


def finished_steps(folder: epath.Path) -> list[int]:
    """Return the steps in a run's folder of checkpoints that were finished, in order."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    return sorted(
        int(name) for name in names if name.isdecimal() and f"{name}.unfinished" not in names
    )


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, folder: epath.Path, config: CheckpointConfig | None = None):
        """Open the folder for reading, or with a config for writing too."""
        import orbax.checkpoint as ocp

        self._ocp, self._folder, self._config = ocp, folder, config
        # Floats hardly get smaller, and compressing takes a copy of them and nearly all the time of
        # a save.
        handlers = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ITEMS}
        # A thread that waits for a folder which a full disk refused would hold up the exit; but
        # where there are several processes, one alone makes folders, and must not fail between two
        # barriers.
        waiting = ocp.options.AsyncOptions(
            timeout_secs=_COMMIT_SECS, create_directories_asynchronously=jax.process_count() > 1
        )
        self._orbax = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(**handlers), async_options=waiting
        )
        self._sealer = ThreadPoolExecutor(1)
        self._sealing: Future[None] | None = None
        self._damaged: set[int] = set()
        self._failure = ""  # of the last save, where it failed

    def steps(self) -> list[int]:
        """Return the steps that were finished, in order; not those that were found damaged."""
        return [step for step in finished_steps(self._folder) if step not in self._damaged]

    def losses(self) -> dict[int, float]:
        """Return the validation loss of each step that has a finite one."""
        found = {step: checksums.read(self._folder / str(step)) for step in self.steps()}
        losses = {
            step: facts["loss"]
            for step, facts in found.items()
            if facts and facts["loss"] is not None
        }
        return {step: loss for step, loss in losses.items() if math.isfinite(loss)}

    def newest(self) -> int | None:
        """Clear what dead saves left, and return the newest whole step, or None where no step was
        ever finished.

        Raises StorageError where there are damaged steps alone.
        """
        return from_main(self._newest)

    def _newest(self) -> int | None:
        if self._config and self._folder.exists():
            for path in list(self._folder.iterdir()):
                if path.suffix == ".unfinished":
                    self._remove(path.stem)
                elif ".orbax-checkpoint-tmp" in path.name:
                    path.rmtree()
        return self._first_whole(self.steps()[::-1], ITEMS)

    def find(self, step: str, parts: Sequence[str] = ITEMS) -> int:
        """Return the step that a --step flag means: best (latest where none was evaluated), latest,
        or a number.

        The items `parts` of it are whole; best and latest pass over damaged steps.
        """
        return from_main(lambda: self._find(step, parts))

    def _find(self, step: str, parts: Sequence[str]) -> int:
        steps = self.steps()
        if not steps:
            raise UserError(f"{os.fspath(self._folder)} holds no checkpoint; train first.")
        order = steps[::-1]
        if step == "best":
            losses = self.losses()
            order.sort(key=lambda s: losses.get(s, float("inf")))
        elif step != "latest":
            if step not in map(str, steps):
                raise UserError(
                    f"--step={step} must be best, latest or one of {', '.join(map(str, steps))}."
                )
            order = [int(step)]
        found = self._first_whole(order, parts)
        assert found is not None, "there are steps"
        return found

    def _first_whole(self, order: list[int], parts: Sequence[str]) -> int | None:
        """Return the first step of `order` that is as it was written, having named those that
        aren't.
        """
        named = []
        for step in order:
            damage = checksums.damage(self._folder / str(step), parts)
            if not damage:
                return step
            self._damaged.add(step)
            named.append(f"step {step} in {os.fspath(self._folder)} is damaged: {damage}")
            say(f"warning: {named[-1]}")
        if named:
            raise StorageError(
                f"no whole checkpoint is left ({named[0]}); remove the folder to start at step 0."
            )
        return None

    def save(self, state: Any, loss: float | None) -> None:
        """Begin to save a TrainState under its step; `loss` is the validation loss at it, where
        there is one.
        """
        self._begin(int(state.step), loss, params=state.params, train=_rest(state))

    def save_params(self, step: int, params: Any) -> None:
        """Begin to save parameters alone, which is all that an imported model has."""
        self._begin(step, None, params=params)

    def _begin(self, step: int, loss: float | None, **items: Any) -> None:
        """Copy the items and write them in the background; a failure is said, and is final only in
        `close`.
        """
        self.check(wait=True)
        args = self._ocp.args
        try:
            from_main(lambda: self._make_room(step))
            saved = args.Composite(**{name: args.PyTreeSave(item) for name, item in items.items()})
            self._orbax.save(self._folder / str(step), args=saved)
            self._sealing = self._sealer.submit(self._seal, step, loss)
        except _failures() as error:
            self._fail(error)

    def _make_room(self, step: int) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove(str(step), but_mark=True)  # a damaged one
        except failures() as error:
            raise StorageError(one_line(error)) from error

    def _seal(self, step: int, loss: float | None) -> None:
        """Wait until a step is written, add its checksums, and remove the steps that it
        replaces.
        """
        self._orbax.wait_until_finished()
        if not is_main():
            return
        checksums.write(self._folder / str(step), step=step, loss=loss)
        self._mark(step).unlink()
        self._damaged.discard(step)
        steps, losses = self.steps(), self.losses()
        kept = (
            {*steps[-self._config.keep :], *sorted(losses, key=lambda s: losses[s])[:1]}
            if self._config
            else steps
        )
        for old in {*steps, *self._damaged} - {*kept}:
            self._remove(str(old))

    def _mark(self, step: int | str) -> epath.Path:
        return self._folder / f"{step}.unfinished"

    def _remove(self, step: str, but_mark: bool = False) -> None:
        """Remove a step, which from the first moment on is no step any more."""
        self._mark(step).touch()
        if (self._folder / step).exists():
            (self._folder / step).rmtree()
        if not but_mark:
            self._mark(step).unlink()

    def check(self, wait: bool = False) -> None:
        """Say how the save in the background failed, if it has ended and did (`wait`: after it has
        ended).
        """
        if self._sealing is None or not (wait or self._sealing.done()):
            return
        sealing, self._sealing = self._sealing, None
        try:
            sealing.result()
            self._failure = ""
        except _failures() as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        # TensorStore names its file at length, and says last what the system said.
        first = (str(error) or type(error).__name__).splitlines()[0]
        reason = getattr(error, "strerror", None) or first.rpartition(": ")[2].partition(" [")[0]
        self._failure = f"a checkpoint could not be written to {os.fspath(self._folder)}: {reason}"
        say(f"warning: {speaker()}{self._failure}; the next save tries again", from_all=True)

    def finish(self, secs: float) -> None:
        """Wait for a save under way, at most `secs`; say how it failed, where it did."""
        if self._sealing is not None and not wait_for([self._sealing], secs).not_done:
            self.check()

    def close(self) -> None:
        """Wait for a save under way; raise StorageError where the last one failed."""
        self.check(wait=True)
        self._sealer.shutdown()
        with contextlib.suppress(*_failures()):  # said by now
            self._orbax.close()
        if self._failure:
            raise StorageError(f"{self._failure}; free space there; the same command goes on.")

    def restore(self, step: int, abstract: Any) -> Any:
        """Return the TrainState saved at `step`, laid out as `abstract` says, whatever the mesh
        that saved it.
        """
        found = self._restore(step, params=abstract.params, train=_rest(abstract))
        return dataclasses.replace(abstract, params=found["params"], **found["train"])

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Return the parameters saved at `step` alone."""
        return self._restore(step, params=abstract)["params"]

    def _restore(self, step: int, **items: Any) -> Any:
        args, laid_out = self._ocp.args, self._ocp.checkpoint_utils.construct_restore_args
        wanted = args.Composite(
            **{name: args.PyTreeRestore(item, laid_out(item)) for name, item in items.items()}
        )
        try:
            return self._orbax.restore(self._folder / str(step), args=wanted)
        except ValueError as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"step {step} in {os.fspath(self._folder)} doesn't hold what config.json says: "
                f"{said:.120}"
            ) from error


def _rest(state: Any) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}
