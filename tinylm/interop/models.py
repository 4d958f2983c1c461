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
from tinylm.model.config import ModelConfig
from tinylm.model.transformer import abstract_transformer
from tinylm.run.checkpoint import CheckpointConfig, Checkpoints
from tinylm.run.folder import RunFolder
from tinylm.run.open_run import Run

_FURTHEST = 1e-4  # between our logits and transformers', as a part of the largest


@dataclasses.dataclass
class Imported:
    """A model that came from elsewhere, on the mesh.

    Its texts begin with `start_id`; any of `end_ids` ends one, as the tokenizer's own end does.
    `left_out` has a line for each kind of what was not read.
    """

    model: ModelConfig
    params: dict
    tokenizer: Tokenizer
    mesh: Mesh
    start_id: int
    end_ids: tuple[int, ...] = ()
    left_out: tuple[str, ...] = ()


def import_hf(folder: str, tokenizer: str = "", mesh_config: MeshConfig | None = None) -> Imported:
    """Return the model in a local folder of Hugging Face; `tokenizer` is a file, where the folder
    has none.
    """
    opened = open_hf(folder, f"--from_hf={folder}", tokenizer)
    mesh_config = mesh_config or MeshConfig(fsdp=True)
    mesh = make_mesh(mesh_config)
    params = opened.params(mesh, mesh_config.fsdp)
    return Imported(
        opened.model,
        params,
        opened.tokenizer,
        mesh,
        opened.start_id,
        opened.end_ids,
        opened.left_out,
    )


def import_llama2c(path: str, tokenizer: str, mesh_config: MeshConfig | None = None) -> Imported:
    """Return the model in a legacy .bin of llama2.c with its tokenizer.bin."""
    model, tensors = open_llama2c(pathlib.Path(path).expanduser())
    if not tokenizer:
        raise UserError(
            "--from_llama2c needs --tokenizer=FILE, the tokenizer.bin that the model was trained "
            "with."
        )
    found = find_tokenizer(pathlib.Path(), tokenizer)
    if (
        found.vocab_size != model.vocab_size
    ):  # llama2.c pads no vocabulary, so another size is another tokenizer
        raise UserError(
            f"--tokenizer={tokenizer} has {found.vocab_size} ids and the model {model.vocab_size}; "
            "name the one that the model was trained with."
        )
    mesh_config = mesh_config or MeshConfig(fsdp=True)
    mesh = make_mesh(mesh_config)
    params = weights.import_params(tensors, LLAMA, model, mesh, mesh_config.fsdp)
    return Imported(model, params, found, mesh, found.eot_id)


def write_run(folder: RunFolder, record: dict[str, Any], imported: Imported) -> None:
    """Make a run's folder of an imported model; `record` is its config.json."""
    folder.create()
    imported.tokenizer.save(str(folder.tokenizer))
    checkpoints = Checkpoints(folder.checkpoints, CheckpointConfig())
    checkpoints.save_params(0, imported.params)
    checkpoints.close()
    folder.write_config(record)


def export_hf(run: Run, folder: str) -> dict[str, Any]:
    """Write a run's model into a new folder that `transformers` loads; return what was checked.

    Raises UserError where no family holds the model or the logits of what was written differ from
    the run's.
    """
    check_on_disk("--to_hf", folder)
    place = pathlib.Path(folder).expanduser().resolve()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"--to_hf={folder} is there already; name a new folder.")
    if jax.process_count() > 1:
        raise UserError("--to_hf runs in one process; start it without --num_processes.")
    family = fitting_family(run.model_config)
    part = place.with_name(f".{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write_model(run, family, part)
        checked = check_logits(run, part)
        if place.exists():  # and is empty: it is filled, as someone may be in it
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
    model, end = run.model_config, run.tokenizer.eot_id
    config = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "dtype": "float32",
        "bos_token_id": run.start_id,
        "eos_token_id": [end, *run.end_ids] if run.end_ids else end,
        **family.write_config(model),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = weights.export_tensors(run.params, family, model)
    write_file(folder / "model.safetensors", weights.their_shapes(family, model), tensors)
    write_tokenizer(run.tokenizer, folder, model.context)


def fitting_family(model: ModelConfig) -> Family:
    """Return the family that holds a model; raise UserError with what stands in the way of the
    nearest one.
    """
    misfits = {family.model_type: _misfits(family, model) for family in FAMILIES.values()}
    nearest = min(misfits, key=lambda kind: len(misfits[kind]))
    if misfits[nearest]:
        raise UserError(
            (
                f"no family of Hugging Face holds this model ({', '.join(FAMILIES)}); the nearest, "
                f"{nearest}, would need "
            )
            + ", ".join(misfits[nearest])
            + "."
        )
    return FAMILIES[nearest]


def _misfits(family: Family, model: ModelConfig) -> list[str]:
    """Return the settings that change on the way to a family's config.json and back."""
    there = family.read_config(family.write_config(model) | {"model_type": family.model_type})
    there = there.resolve(model.vocab_size, model.context)
    irrelevant = {"dropout", "init_std", "compute_dtype", "z_loss"}
    if model.position != "rotary":
        irrelevant |= {"rotary_base", "rotary_fraction"}
    if not model.bias:
        irrelevant |= {"mlp_bias", "out_bias"}
    keys = [key for key, _, _ in differing_settings(model, there) if key not in irrelevant]
    return [f"model.{key}={getattr(there, key)!r} (here {getattr(model, key)!r})" for key in keys]


def check_logits(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """Read a written model back and compare its logits with the run's, and with transformers' where
    it is installed.
    """
    family, model, tensors, _ = read_model(folder)
    again = weights.import_params(tensors, family, model, run.mesh, fsdp=True)
    again = jax.device_put(again, jax.tree.map(lambda leaf: leaf.sharding, run.params))
    length = min(model.context, max(*model.attention_window, 56) + 8)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (2, length), np.int32)
    with jax.set_mesh(run.mesh):
        ours = _logits(run.model_config, run.params, tokens)
        theirs = _logits(model, again, tokens)
    if not np.array_equal(ours, theirs):
        raise UserError(
            "nothing was exported: logits of what was written differ by up to "
            f"{np.abs(ours - theirs).max():.3g}; please report this."
        )
    reference = transformers_logits(folder, tokens)
    if reference is None:
        return {"logits": "equal after reading back", "transformers": None}
    off = float(np.abs(ours - reference).max())
    if not off <= _FURTHEST * max(1.0, float(np.abs(ours).max())):
        raise UserError(
            f"nothing was exported: transformers' logits differ from ours by up to {off:.3g}; "
            "please report this."
        )
    return {"logits": "equal after reading back", "transformers": off}


def _logits(model: ModelConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    """Return float32 logits over the real vocabulary."""
    plain = dataclasses.replace(
        model, compute_dtype="float32", dropout=0.0, remat="none", unroll=1, attention="xla"
    )
    logits = _forward(dataclasses.astuple(plain))(params, jnp.asarray(tokens))
    return np.asarray(logits)[..., : model.vocab_size]


@functools.cache
def _forward(settings: tuple) -> Callable:
    """Return the compiled forward pass of a model's settings, the same program for the same
    settings.
    """
    graph = abstract_transformer(ModelConfig(*settings))[0]
    return jax.jit(lambda params, tokens_BT: nnx.merge(graph, params)(tokens_BT))


def transformers_logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray | None:
    """Return the logits that transformers gives for a folder, or None where it isn't installed."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return None
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    ).eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()
