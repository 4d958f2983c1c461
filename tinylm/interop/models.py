"""Whole models in and out: a folder of Hugging Face, a file of llama2.c, a folder of a run.

An imported model becomes a run without training: config.json, checkpoints/0 with parameters alone,
tokenizer/. An exported one is read back from what was written, as any reader would, and must give
the same logits bit for bit before its folder gets its name; where torch and transformers are
installed, theirs must agree too.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from tinylm.core.errors import StorageError, UserError
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.core.settings import differing_settings
from tinylm.core.storage import check_on_disk
from tinylm.data.tokenizers import Tokenizer
from tinylm.interop import weights
from tinylm.interop.families import FAMILIES, LLAMA, Family
from tinylm.interop.hf_model import open_hf, read_model
from tinylm.interop.llama2c import open_llama2c
from tinylm.interop.tensor_files import write_file
from tinylm.interop.tokenizer_files import find_tokenizer, write_tokenizer
from tinylm.model.config import EXPERT_SETTINGS, TRAINING_SETTINGS, ModelConfig
from tinylm.model.transformer import abstract_transformer
from tinylm.run.checkpoint import CheckpointConfig, Checkpoints
from tinylm.run.folder import RunFolder
from tinylm.run.open_run import Run

# How far transformers' logits may be from ours, as a part of the largest one.
_TOLERANCE = 1e-4


@dataclasses.dataclass(kw_only=True)
class Imported:
    """A model that came from elsewhere, on the mesh.

    Attributes:
      model: its settings, resolved.
      params: a nested dict of arrays.
      tokenizer: of its texts.
      mesh: on which the parameters lie.
      start_id: the token that its texts begin with.
      end_ids: the tokens that end a text, besides the tokenizer's own end.
      left_out: a line for each kind of what was not read.
    """

    model: ModelConfig
    params: dict
    tokenizer: Tokenizer
    mesh: Mesh
    start_id: int
    end_ids: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()


def import_hf(folder: str, tokenizer: str = "", mesh_config: MeshConfig | None = None) -> Imported:
    """Return the model in a local folder of Hugging Face.

    Args:
      folder: with config.json and model.safetensors.
      tokenizer: a file, where the folder has none.
      mesh_config: of the mesh; by default parameters are split over all devices.
    """
    opened = open_hf(folder, f"--from_hf={folder}", tokenizer)
    mesh_config = mesh_config or MeshConfig(fsdp=True)
    mesh = make_mesh(mesh_config)
    return Imported(
        model=opened.model,
        params=opened.params(mesh, mesh_config.fsdp),
        tokenizer=opened.tokenizer,
        mesh=mesh,
        start_id=opened.start_id,
        end_ids=opened.end_ids,
        left_out=opened.left_out,
    )


def import_llama2c(path: str, tokenizer: str, mesh_config: MeshConfig | None = None) -> Imported:
    """Return the model in a legacy .bin of llama2.c.

    Args:
      path: of the model's file.
      tokenizer: the path of its tokenizer.bin.
      mesh_config: of the mesh; by default parameters are split over all devices.
    """
    model, tensors = open_llama2c(pathlib.Path(path).expanduser())
    if not tokenizer:
        raise UserError(
            "--from_llama2c needs --tokenizer=FILE, the tokenizer.bin that the model was trained "
            "with."
        )
    found = find_tokenizer(pathlib.Path(), tokenizer)
    # Nothing in llama2.c pads the vocabulary, so another size means another tokenizer.
    if found.vocab_size != model.vocab_size:
        raise UserError(
            f"--tokenizer={tokenizer} has {found.vocab_size} ids and the model {model.vocab_size}; "
            "name the one that the model was trained with."
        )
    mesh_config = mesh_config or MeshConfig(fsdp=True)
    mesh = make_mesh(mesh_config)
    params = weights.import_params(tensors, LLAMA, model, mesh, mesh_config.fsdp)
    return Imported(model=model, params=params, tokenizer=found, mesh=mesh, start_id=found.eot_id)


def write_run(folder: RunFolder, record: dict[str, Any], imported: Imported) -> None:
    """Make a run's folder of an imported model.

    config.json is written last: until it is there, the folder holds no run.

    Args:
      folder: of the run.
      record: the content of its config.json.
      imported: the model.
    """
    folder.create()
    imported.tokenizer.save(str(folder.tokenizer))
    checkpoints = Checkpoints(folder.checkpoints, CheckpointConfig())
    checkpoints.save_params(0, imported.params)
    checkpoints.close()
    folder.write_config(record)


def check_new_folder(folder: str) -> pathlib.Path:
    """Return where --to_hf writes to; raise UserError where it can't."""
    check_on_disk("--to_hf", folder)
    place = pathlib.Path(folder).expanduser().resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"--to_hf={folder} is there already; name a new folder.")
    if jax.process_count() > 1:
        raise UserError("--to_hf runs in one process; start it without --num_processes.")
    return place


def export_hf(run: Run, folder: str) -> dict[str, Any]:
    """Write a run's model into a new folder that `transformers` loads.

    Returns:
      For people and --json: folder, family, and what `check_logits` found.

    Raises:
      UserError: where the folder is in use, no family holds the model, or the logits of what was
        written differ from the run's.
      StorageError: where it can't be written.
    """
    place = check_new_folder(folder)
    family = fitting_family(run.model_config)
    # The folder gets its name only when what was written into it has been checked.
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write_model(run, family, part)
        checked = check_logits(run, part)
        if place.exists():
            # An empty folder is filled rather than replaced, as someone may be in it.
            for path in part.iterdir():
                path.rename(place / path.name)
        else:
            part.rename(place)
    except OSError as error:
        raise StorageError(
            f"--to_hf={folder} can't be written: {error.strerror or error}."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return {"folder": str(place), "family": family.model_type, **checked}


def _write_model(run: Run, family: Family, folder: pathlib.Path) -> None:
    """Write config.json, model.safetensors and the tokenizer."""
    model = run.model_config
    end: int | list[int] = run.tokenizer.eot_id
    if run.end_ids:
        end = [run.tokenizer.eot_id, *run.end_ids]
    config = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "dtype": "float32",
        "bos_token_id": run.start_id,
        "eos_token_id": end,
        **family.write_config(model),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = weights.export_tensors(run.params, family, model)
    write_file(folder / "model.safetensors", weights.their_shapes(family, model), tensors)
    write_tokenizer(run.tokenizer, folder, model.context)


def fitting_family(model: ModelConfig) -> Family:
    """Return the family that holds a model.

    Raises UserError where none does, with what stands in the way of the nearest one.
    """
    misfits = {family.model_type: _misfits(family, model) for family in FAMILIES.values()}
    nearest = min(misfits, key=lambda kind: len(misfits[kind]))
    if misfits[nearest]:
        raise UserError(
            f"no family of Hugging Face holds this model ({', '.join(FAMILIES)}); the nearest, "
            f"{nearest}, would need {', '.join(misfits[nearest])}."
        )
    return FAMILIES[nearest]


def _misfits(family: Family, model: ModelConfig) -> list[str]:
    """Return the settings that change on the way to a family's config.json and back."""
    config = {**family.write_config(model), "model_type": family.model_type}
    there = family.read_config(config).resolve(model.vocab_size, model.context)
    # Logits don't depend on these, or not in this model.
    irrelevant = set(TRAINING_SETTINGS)
    if not model.num_experts:
        irrelevant |= set(EXPERT_SETTINGS)
    elif not model.dense_layers:
        irrelevant.add("mlp_dim")
    if model.position != "rotary":
        irrelevant |= {"rotary_base", "rotary_fraction"}
    if not model.bias:
        irrelevant |= {"mlp_bias", "out_bias"}
    misfits = []
    for key, _, _ in differing_settings(model, there):
        if key not in irrelevant:
            needed = getattr(there, key)
            misfits.append(f"model.{key}={needed!r} (here {getattr(model, key)!r})")
    return misfits


def check_logits(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Read a written model back and compare its logits with the run's.

    Where transformers is installed, they are compared with its own, too.

    Returns:
      For people and --json: `logits` in words, and `transformers`, the largest difference from its
      logits, or None.

    Raises:
      UserError: where they differ.
    """
    read = read_model(folder)
    params = weights.import_params(read.tensors, read.family, read.model, run.mesh, fsdp=True)
    # In the same places the same program computes the same bits.
    params = jax.device_put(params, jax.tree.map(lambda leaf: leaf.sharding, run.params))
    # Longer than the largest window of attention, so that windows count, where the context allows.
    length = min(read.model.context, max(*read.model.attention_window, 56) + 8)
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, read.model.vocab_size, (2, length), np.int32)
    with jax.set_mesh(run.mesh):
        ours_BTV = _logits(run.model_config, run.params, tokens_BT)
        read_BTV = _logits(read.model, params, tokens_BT)
    if not np.array_equal(ours_BTV, read_BTV):
        raise UserError(
            "nothing was exported: logits of what was written differ by up to "
            f"{np.abs(ours_BTV - read_BTV).max():.3g}; please report this."
        )
    found = {"logits": "equal after reading back", "transformers": None}
    theirs_BTV = transformers_logits(folder, tokens_BT)
    if theirs_BTV is None:
        return found
    difference = float(np.abs(ours_BTV - theirs_BTV).max())
    largest = float(np.abs(ours_BTV).max())
    # Written so that a difference that is not a number fails, too.
    if not difference <= _TOLERANCE * max(1.0, largest):
        raise UserError(
            f"nothing was exported: transformers' logits differ from ours by up to "
            f"{difference:.3g}; please report this."
        )
    return {**found, "transformers": difference}


def _logits(model: ModelConfig, params: dict, tokens_BT: np.ndarray) -> np.ndarray:
    """Return float32 logits [B, T, V] over the real vocabulary."""
    plain = dataclasses.replace(
        model, compute_dtype="float32", dropout=0.0, remat="none", unroll=1, attention="xla"
    )
    logits_BTV = _forward(dataclasses.astuple(plain))(params, jnp.asarray(tokens_BT))
    return np.asarray(logits_BTV)[..., : model.vocab_size]


@functools.cache
def _forward(settings: tuple) -> Callable:
    """Return the compiled forward pass of a model's settings.

    It is the same program for the same settings, so that equal weights give equal bits.
    """
    graph = abstract_transformer(ModelConfig(*settings))[0]
    return jax.jit(lambda params, tokens_BT: nnx.merge(graph, params)(tokens_BT))


def transformers_logits(folder: pathlib.Path, tokens_BT: np.ndarray) -> np.ndarray | None:
    """Return the logits [B, T, V] of transformers for a folder, or None if it isn't installed."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens_BT).long()).logits.numpy()
