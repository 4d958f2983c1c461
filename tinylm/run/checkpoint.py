"""Checkpoints through Orbax: sharded, asynchronous, complete or absent.

The one module that knows Orbax. A step is kept as two items: `params`, which tools read alone, and `train` (optimizer
state, step, guards). The latest `checkpoint.keep` steps and the best by validation loss are kept.
"""

import dataclasses
import os
from typing import Any

from etils import epath

from tinylm.core.errors import UserError
from tinylm.core.settings import setting


@dataclasses.dataclass
class CheckpointConfig:
    """When to save and how much to keep."""

    every_steps: int = setting(1000, "steps between checkpoints (0: only the best and the last)", free=True)
    keep: int = setting(2, "latest checkpoints to keep, beside the best", free=True)

    def check(self) -> None:
        """Raise UserError for counts below their least."""
        if self.every_steps < 0 or self.keep < 2:
            raise UserError("checkpoint.every_steps must be at least 0 and checkpoint.keep at least 2.")


class Checkpoints:
    """The checkpoints of a run."""

    def __init__(self, folder: epath.Path, config: CheckpointConfig | None = None):
        """Open the folder for reading, or with a config for writing too."""
        import orbax.checkpoint as ocp

        policy = ocp.checkpoint_managers
        keep = policy.AnyPreservationPolicy([
            policy.LatestN(config.keep if config else None),
            policy.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False),
        ])  # fmt: skip
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=lambda metrics: metrics["loss"],  # metrics are written only where a best is asked for
            best_mode="min",
            cleanup_tmp_directories=config is not None,
            read_only=config is None,
        )
        self._ocp = ocp
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder, options=options)

    def steps(self) -> list[int]:
        """Return the steps that are whole, in order."""
        return sorted(self._manager.all_steps())

    def losses(self) -> dict[int, float]:
        """Return the validation loss of each step that has one."""
        metrics = {step: self._manager.metrics(step) for step in self.steps()}
        return {step: found["loss"] for step, found in metrics.items() if found}

    def find(self, step: str) -> int:
        """Return the step that a --step flag means: best (latest where none was evaluated), latest, or a number."""
        steps = self.steps()
        if not steps:
            raise UserError(f"{os.fspath(self._folder)} holds no checkpoint; train first.")
        if step == "best":
            losses = self.losses()
            return min(losses, key=lambda s: losses[s]) if losses else steps[-1]
        if step == "latest":
            return steps[-1]
        if not step.isdigit() or int(step) not in steps:
            raise UserError(f"--step={step} must be best, latest or one of {', '.join(map(str, steps))}.")
        return int(step)

    def save(self, state: Any, loss: float | None) -> None:
        """Begin to save a TrainState under its step; `loss` is the validation loss at it, where there is one."""
        args = self._ocp.args
        items = args.Composite(params=args.StandardSave(state.params), train=args.StandardSave(_rest(state)))
        metrics = None if loss is None else {"loss": loss}
        self._manager.save(int(state.step), args=items, metrics=metrics, force=True)

    def save_params(self, step: int, params: Any) -> None:
        """Begin to save parameters alone, which is all that an imported model has."""
        args = self._ocp.args
        self._manager.save(step, args=args.Composite(params=args.StandardSave(params)), force=True)

    def restore(self, step: int, abstract: Any) -> Any:
        """Return the TrainState saved at `step`, laid out as `abstract` says, whatever the mesh that saved it."""
        args = self._ocp.args
        items = args.Composite(
            params=args.StandardRestore(abstract.params), train=args.StandardRestore(_rest(abstract))
        )
        found = self._manager.restore(step, args=items)
        return dataclasses.replace(abstract, params=found["params"], **found["train"])

    def restore_params(self, step: int, abstract: Any) -> Any:
        """Return the parameters saved at `step` alone."""
        args = self._ocp.args
        return self._manager.restore(step, args=args.Composite(params=args.StandardRestore(abstract)))["params"]

    def check(self) -> None:
        """Raise what a save in the background failed with."""
        self._manager.check_for_errors()

    def close(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def _rest(state: Any) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "guard": state.guard}
