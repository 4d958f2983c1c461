"""Starting a run from what another one learned: its parameters, and if asked its optimizer's
memory.

The origin is the folder of a run, or `hf:DIR`, a folder of Hugging Face. The step, the schedule and
the guards begin at 0. What the weights mean must be the same in both, so tokenizer and model
settings are compared before anything is compiled or written, or taken over (`train.init_model`);
dropout, z_loss, precision and (where positions have no weights) the context may differ. A run that
goes on needs its origin no more: what it took over is in its own folder.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tinylm.core.errors import UserError
from tinylm.core.log import say
from tinylm.core.settings import differing_settings, from_dict, settings_of
from tinylm.data.config import DataConfig
from tinylm.data.tokenizers import Tokenizer, load_tokenizer
from tinylm.interop.hf_model import HfModel, open_hf
from tinylm.interop.tokenizer_files import data_tokenizer
from tinylm.interop.weights import import_params
from tinylm.model.config import SCALINGS_WITH, TRAINING_SETTINGS, ModelConfig
from tinylm.run.checkpoint import ITEMS, Checkpoints
from tinylm.run.folder import RunFolder
from tinylm.train.config import Config, OptimizerConfig, TrainConfig
from tinylm.train.state import Blueprint, TrainState

# Of rotary positions: how they stretch over longer texts than those of the origin.
_STRETCH = ("context", "rotary_scaling", *SCALINGS_WITH)
_HF = "hf:"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a run starts from; `where` names it in messages.

    `tokenizer_spec` is the `data.tokenizer` that comes nearest to reading its tokenizer again.
    `record` is the config.json of a run, `hf` the opened model of a folder of Hugging Face; one of
    them is None.
    """

    where: str
    model: ModelConfig
    tokenizer: Tokenizer
    tokenizer_spec: str
    record: dict[str, Any] | None = None
    hf: HfModel | None = None


def open_origin(init_from: str) -> Origin:
    """Return what `train.init_from` names; raise UserError where there is nothing to start from."""
    where = f"train.init_from={init_from}"
    if init_from.startswith(_HF):
        place = init_from.removeprefix(_HF)
        hf = open_hf(place, where)
        return Origin(
            where, hf.model, hf.tokenizer, data_tokenizer(hf.tokenizer, pathlib.Path(place)), hf=hf
        )
    folder = RunFolder(init_from, "train.init_from")
    if not folder.exists():
        raise UserError(
            f"{where} holds no run (no config.json); a model of Hugging Face is named hf:DIR."
        )
    record = folder.read_config()
    tokenizer = load_tokenizer(str(folder.tokenizer))
    spec = data_tokenizer(tokenizer, folder.tokenizer)
    return Origin(
        where, from_dict(ModelConfig, record["config"]["model"]), tokenizer, spec, record=record
    )


def take_over(config: Config, own: RunFolder | None = None) -> tuple[Config, Tokenizer | None]:
    """Return a config with the model and the tokenizer of its origin where `train.init_model` asks,
    and that tokenizer.

    A run that is in `own` already has both from there. Raises UserError for a setting of the model,
    or a tokenizer, that the config sets to something else than the origin's.
    """
    if not config.train.init_model:
        return config, None
    if not config.train.init_from:
        raise UserError(
            "train.init_model needs train.init_from: the folder of a run, or hf:DIR, a folder of "
            "Hugging Face."
        )
    if own is not None and own.exists():
        record = own.read_config()
        tokenizer = load_tokenizer(str(own.tokenizer))
        spec = record["config"]["data"]["tokenizer"]
        origin = Origin(
            f"--workdir={own.path}",
            from_dict(ModelConfig, record["config"]["model"]),
            tokenizer,
            spec,
            record=record,
        )
    else:
        origin = open_origin(config.train.init_from)
    filled = config.editable_copy()
    _take_model(filled.model, origin)
    _take_tokenizer(filled.data, origin)
    if filled.data.seq_len > filled.model.context:
        say(
            f"data.seq_len is {filled.model.context}, the context of the model (the config has "
            f"{filled.data.seq_len})"
        )
        filled.data.seq_len = filled.model.context
    filled.check()
    filled.check_experts()
    return filled, origin.tokenizer


def _take_model(model: ModelConfig, origin: Origin) -> None:
    """Write the origin's settings over those that are still at their defaults and have to be
    alike.
    """
    defaults = ModelConfig()
    others = []
    stretches = model.rotary_scaling != "none"
    for name, field, theirs in settings_of(origin.model):
        ours = getattr(model, name)
        is_own = field.metadata["free"] or name in _free_settings(origin.model)
        # Positions stay as they are there, unless the config stretches them.
        if name in _STRETCH:
            is_own = is_own and (ours != 0 if name == "context" else stretches)
        if is_own:
            continue
        if ours not in (getattr(defaults, name), theirs):
            others.append(f"model.{name} (there {theirs!r}, here {ours!r})")
        setattr(model, name, theirs)
    if others:
        raise UserError(
            f"train.init_model takes the model from {origin.where}, and this config sets others: "
            f"{', '.join(others)}; leave them out (--config=finetune does)."
        )


def _take_tokenizer(data: DataConfig, origin: Origin) -> None:
    if data.tokenizer not in (DataConfig().tokenizer, origin.tokenizer_spec) or data.vocab_top_k:
        key = "vocab_top_k" if data.vocab_top_k else "tokenizer"
        raise UserError(
            f"train.init_model takes the tokenizer from {origin.where}; leave out "
            f"data.{key}={getattr(data, key)}."
        )
    data.tokenizer = origin.tokenizer_spec


def _free_settings(model: ModelConfig) -> tuple[str, ...]:
    """Return the settings of a model that don't decide what its weights mean."""
    return TRAINING_SETTINGS if model.position == "learned" else TRAINING_SETTINGS + _STRETCH


def check_origin(config: Config, tokenizer: Tokenizer) -> None:
    """Raise UserError where what `train.init_from` names can't be gone on from with a resolved
    config.
    """
    if not config.train.init_from:
        if config.train.init_optimizer:
            raise UserError(
                "train.init_optimizer needs train.init_from, the run whose optimizer to take."
            )
        return
    origin = open_origin(config.train.init_from)
    check_tokenizer(origin, tokenizer)
    free = _free_settings(config.model)
    differing = [
        line for line in differing_settings(config.model, origin.model) if line[0] not in free
    ]
    if differing:
        shown = ", ".join(
            f"model.{key} (there {there}, here {here})" for key, here, there in differing
        )
        raise UserError(
            f"{origin.where} holds a model of other settings: {shown}; set them alike, or take all "
            "with --config=finetune (train.init_model)."
        )
    if config.train.init_optimizer:
        _check_optimizer(origin, config.optimizer)


def check_tokenizer(origin: Origin, tokenizer: Tokenizer) -> None:
    """Raise UserError for another tokenizer; a bpe learned here and the same one read from its file
    aren't.
    """
    theirs = origin.tokenizer
    alike = bool(tokenizer.files) and (tokenizer.files, tokenizer.header) == (
        theirs.files,
        theirs.header,
    )
    if tokenizer.fingerprint != theirs.fingerprint and not alike:
        raise UserError(
            f"{origin.where} learned with another tokenizer (there {theirs.name} of "
            f"{theirs.vocab_size} ids, here {tokenizer.name} of {tokenizer.vocab_size}); set "
            f"data.tokenizer={origin.tokenizer_spec}, or take it with --config=finetune "
            "(train.init_model)."
        )


def _check_optimizer(origin: Origin, optimizer: OptimizerConfig) -> None:
    record = origin.record
    if record is None or "imported_from" in record:
        raise UserError(
            f"{origin.where} is an imported model, which has no optimizer; set "
            "train.init_optimizer=False."
        )
    if from_dict(TrainConfig, record["config"]["train"]).has_workers:
        raise UserError(
            f"{origin.where} has an optimizer for each of its workers (train.sync_every_steps); "
            "set train.init_optimizer=False."
        )
    theirs = from_dict(OptimizerConfig, record["config"]["optimizer"])
    if _parts_of_state(theirs) != _parts_of_state(optimizer):
        raise UserError(
            f"{origin.where} has another optimizer ({theirs.name}); set optimizer.name, clip_norm "
            "and muon_beta2 alike."
        )


def _parts_of_state(optimizer: OptimizerConfig) -> tuple[str, bool, bool]:
    """Return what decides which arrays an optimizer's state consists of."""
    evens_outputs = optimizer.name == "muon" and optimizer.muon_beta2 > 0
    return optimizer.name, optimizer.clip_norm > 0, evens_outputs


def initial_state(config: Config, blueprint: Blueprint) -> TrainState:
    """Return the state before the first step: freshly drawn, or with the parameters of
    `train.init_from`.
    """
    if not config.train.init_from:
        return blueprint.init(config.seed)
    if config.train.init_from.startswith(_HF):
        return blueprint.start_from(_imported_params(config, blueprint))
    origin = RunFolder(config.train.init_from, "train.init_from")
    checkpoints = Checkpoints(origin.checkpoints)
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


def _imported_params(config: Config, blueprint: Blueprint) -> dict:
    """Read the parameters of a folder of Hugging Face straight onto the mesh of a run."""
    hf = open_origin(config.train.init_from).hf
    assert hf is not None, "the folder was opened when the run was checked"
    say(f"starting from {config.train.init_from}")
    for line in hf.left_out:
        say(f"left out {line}")
    mesh = jax.tree.leaves(blueprint.shardings.params)[0].mesh
    return import_params(hf.tensors, hf.family, config.model, mesh, config.mesh.fsdp)


def _restart_schedule(opt_state: Any) -> Any:
    """Return an optimizer state whose learning rate begins at step 0; moments and their counts
    stay.
    """

    def restart(node: Any) -> Any:
        return node._replace(count=jnp.zeros_like(node.count)) if is_schedule(node) else node

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(restart, opt_state, is_leaf=is_schedule)
