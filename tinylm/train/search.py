"""Search a topology for the mesh, the rematerialization and the batch that train fastest, before anything runs.

Each is ranked by formula: state is exact, from the abstract state; activations are counted as in Korthikanti et al.
2022, section 4, for what these layers keep; the time is the plan's roofline. The best few are then compiled, and where
one doesn't fit after all, its batch is halved until it does.
"""

from collections.abc import Sequence
from typing import Any

import jax

from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig, batch_shards, make_mesh
from tinylm.model.config import ModelConfig
from tinylm.train.config import Config
from tinylm.train.planning import by_formula, held_bytes, known_chip, make_plan, roofline_secs
from tinylm.train.state import make_blueprint

MARGIN = 0.9  # part of the chip's memory that formulas may fill
REMATS = ("none", "dots", "full")  # cheapest first


def search(config: Config, devices: Sequence[jax.Device], compiled: int = 3) -> list[dict[str, Any]]:
    """Return a row for each mesh and policy that fits a resolved config, fastest first, the first ones compiled."""
    found = [row for mesh in _meshes(config, len(devices)) for row in _rows(config, mesh, devices)]
    if not found:
        raise UserError(
            f"nothing fits: not one row of data.seq_len={config.data.seq_len} a device on any mesh of {len(devices)} "
            "devices, not even with model.remat=full; take a smaller model, shorter rows, or more devices."
        )
    found.sort(
        key=lambda row: (float(f"{row['secs_per_token']:.2g}"), REMATS.index(row["remat"]), row["mesh"]["model"])
    )
    return [_compile(config, row, devices) if i < compiled else row for i, row in enumerate(found)]


def _meshes(config: Config, devices: int) -> list[MeshConfig]:
    """Return the shapes of all devices that split heads evenly, with fsdp and without."""
    replica = max(config.mesh.replica, 1)
    tensor = [m for m in range(1, config.model.num_heads + 1)
              if devices // replica % m == 0 and config.model.num_heads % m == 0]  # fmt: skip
    shapes = [(devices // replica // m, m) for m in tensor]
    return [MeshConfig(replica, data, m, fsdp) for data, m in shapes for fsdp in {False, data > 1}]


def _rows(config: Config, mesh_config: MeshConfig, devices: Sequence[jax.Device]) -> list[dict[str, Any]]:
    """Return one row for each policy with which a row of tokens a device fits, at the largest batch that does."""
    mesh, rows = make_mesh(mesh_config, devices), []
    chip = known_chip(mesh)
    abstract = make_blueprint(config.model, config.optimizer, mesh_config, config.train.num_steps, mesh).abstract
    held = {"params": held_bytes(abstract.params), "optimizer": held_bytes(abstract.opt_state)}
    for remat in REMATS:
        trial = config.editable_copy()
        trial.mesh, trial.model.remat = mesh_config, remat
        fixed = 2 * held["params"] + held["optimizer"]  # the gradients lie where the parameters do
        per_row = activation_bytes(trial.model, mesh_config.model, config.data.seq_len)
        fit = int((MARGIN * chip.memory_bytes - fixed) // per_row)
        if fit < 1:
            continue
        fit = 2 ** (fit.bit_length() - 1)
        trial.data.batch_size = fit * batch_shards(mesh) * config.train.accumulation_steps
        tokens, flops, least = by_formula(trial, abstract, mesh)
        secs = roofline_secs(chip, mesh, flops, held, least, trial)
        # What a compiler can hide behind the rest is not known: the slowest part, and a tenth of all others.
        step = 0.9 * max(secs.values()) + 0.1 * sum(secs.values())
        rows.append({"mesh": dict(mesh.shape), "fsdp": mesh_config.fsdp, "remat": remat,
                     "batch_size": trial.data.batch_size, "bytes": int(fixed + fit * per_row),
                     "secs_per_token": step / tokens, "bound_by": max(secs, key=lambda name: secs[name]),
                     "compiled_bytes": None, "compiled_secs_per_token": None})  # fmt: skip
    return rows


def activation_bytes(model: ModelConfig, tensor: int, seq_len: int) -> float:
    """Return the bytes of activations that a device keeps for one row of tokens, split `tensor` ways."""
    item = 2 if model.compute_dtype == "bfloat16" else 4
    heads, maps = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim, 3 if "glu" in model.mlp else 2
    products = item * (heads + model.embed_dim * 2 + (maps - 1) * model.mlp_dim)
    weights = model.num_heads * seq_len * (4 + item)  # of attention: logits in float32, softmax
    plain = products + item * (4 * model.embed_dim + model.mlp_dim + heads) + weights
    kept = {"none": plain, "dots": products + item * model.embed_dim, "full": item * model.embed_dim}[model.remat]
    logits = 2 * 4 * model.padded_vocab
    return seq_len * (model.num_layers * kept + plain * (model.remat != "none") + logits) / tensor


def _compile(config: Config, row: dict[str, Any], devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Return `row` with what its compiled step takes, the batch halved until it fits or is one row a device."""
    trial = config.editable_copy()
    trial.mesh, trial.model.remat = MeshConfig(**row["mesh"], fsdp=row["fsdp"]), row["remat"]
    mesh, trial.data.batch_size = make_mesh(trial.mesh, devices), row["batch_size"]
    least = batch_shards(mesh) * config.train.accumulation_steps
    while not (plan := make_plan(trial, mesh))["fits"] and trial.data.batch_size > least:
        trial.data.batch_size //= 2
    tokens = trial.data.tokens_per_step
    return {**row, "batch_size": trial.data.batch_size, "fits": plan["fits"],
            "compiled_bytes": plan["per_device_bytes"]["total"],
            "compiled_secs_per_token": plan["step_secs_estimate"] / tokens, "bound_by": plan["bound_by"]}  # fmt: skip
