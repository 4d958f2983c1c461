"""Starting a run from what another one learned: its parameters, and if asked its optimizer's memory.

The step, the schedule and the guards begin anew. What the weights mean must be the same in both runs, so tokenizer and
model settings are compared before anything is compiled or written; dropout, z_loss, precision and (where positions
have no weights) the context may differ.
"""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tinylm.core.errors import UserError
from tinylm.core.log import say
from tinylm.core.settings import differing_settings, from_dict
from tinylm.data.tokenizers import load_tokenizer
from tinylm.model.config import ModelConfig
from tinylm.run.checkpoint import ITEMS, Checkpoints
from tinylm.run.folder import RunFolder
from tinylm.train.config import Config, OptimizerConfig
from tinylm.train.state import Blueprint, TrainState

_MAY_DIFFER = ("dropout", "init_std", "compute_dtype", "z_loss")


def check_origin(config: Config, tokenizer: Any) -> None:
    """Raise UserError where the run that `train.init_from` names can't be gone on from with a resolved config."""
    if not config.train.init_from:
        if config.train.init_optimizer:
            raise UserError("train.init_optimizer needs train.init_from, the run whose optimizer to take.")
        return
    folder, where = RunFolder(config.train.init_from), f"train.init_from={config.train.init_from}"
    if not folder.exists():
        raise UserError(f"{where} holds no run (no config.json).")
    record = folder.read_config()
    check_tokenizer(where, folder, tokenizer, record["config"]["data"]["tokenizer"])
    theirs = from_dict(ModelConfig, record["config"]["model"])
    free = (*_MAY_DIFFER, *(() if config.model.position == "learned" else ("context",)))
    differing = [line for line in differing_settings(config.model, theirs) if line[0] not in free]
    if differing:
        shown = ", ".join(f"model.{key} (there {there}, here {here})" for key, here, there in differing)
        raise UserError(f"{where} holds a model of other settings: {shown}; set them alike.")
    if config.train.init_optimizer:
        _check_optimizer(where, record, config.optimizer)


def check_tokenizer(where: str, folder: RunFolder, tokenizer: Any, spec: str) -> None:
    """Raise UserError for another tokenizer; a bpe learned here and the same one read from its file aren't."""
    theirs = load_tokenizer(str(folder.tokenizer))
    alike = bool(tokenizer.files) and (tokenizer.files, tokenizer.header) == (theirs.files, theirs.header)
    if tokenizer.fingerprint == theirs.fingerprint or alike:
        return
    file = folder.tokenizer / "tokenizer.json"
    wanted = f"hf:{os.fspath(file)}" if file.exists() else spec
    raise UserError(
        f"{where} learned with another tokenizer (there {theirs.name} of {theirs.vocab_size} ids, here "
        f"{tokenizer.name} of {tokenizer.vocab_size}); set data.tokenizer={wanted}."
    )


def _check_optimizer(where: str, record: dict[str, Any], optimizer: OptimizerConfig) -> None:
    if "imported_from" in record:
        raise UserError(f"{where} is an imported model, which has no optimizer; set train.init_optimizer=False.")
    theirs = from_dict(OptimizerConfig, record["config"]["optimizer"])
    if (theirs.name, theirs.clip_norm > 0) != (optimizer.name, optimizer.clip_norm > 0):
        raise UserError(f"{where} has another optimizer ({theirs.name}); set optimizer.name and clip_norm alike.")


def initial_state(config: Config, blueprint: Blueprint) -> TrainState:
    """Return the state before the first step: freshly drawn, or with the parameters of `train.init_from`."""
    if not config.train.init_from:
        return blueprint.init(config.seed)
    checkpoints = Checkpoints(RunFolder(config.train.init_from).checkpoints)
    step = checkpoints.find("best", ITEMS if config.train.init_optimizer else ITEMS[:1])
    say(f"starting from step {step} of {config.train.init_from}")
    if not config.train.init_optimizer:
        params = checkpoints.restore_params(step, blueprint.abstract.params)
        checkpoints.close()
        return blueprint.start_from(params)
    theirs = checkpoints.restore(step, blueprint.abstract)
    checkpoints.close()
    fresh = blueprint.start_from(theirs.params)
    return dataclasses.replace(fresh, opt_state=_restart_schedule(theirs.opt_state))


def _restart_schedule(opt_state: Any) -> Any:
    """Return an optimizer state whose learning rate begins at step 0; moments and their counts stay."""

    def restart(node):
        return node._replace(count=jnp.zeros_like(node.count)) if is_schedule(node) else node

    def is_schedule(node):
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(restart, opt_state, is_leaf=is_schedule)
