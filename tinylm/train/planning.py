"""A plan: the train step compiled from the abstract state, and what its program and the formulas say about it.

Nothing is allocated. Memory is the compiler's own account; FLOPs are the formula's, for compilers count the body of a
scan once; traffic is read from the program's text, or where that can't be printed is the formula's least. The time of a
step is a roofline: the slowest of arithmetic, memory and links, as if each hid the others, so a bound and no promise.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh

from tinylm.analysis.chips import SLICE_BYTES_PER_SEC, Chip, find_chip
from tinylm.analysis.flops import train_flops_per_token
from tinylm.analysis.programs import Collective, read_collectives
from tinylm.analysis.traffic import Work, least_collectives
from tinylm.core.errors import UserError
from tinylm.core.mesh import activation_sharding, replicated
from tinylm.train.config import Config
from tinylm.train.optimizer import make_schedule
from tinylm.train.state import Blueprint, TrainState, make_blueprint
from tinylm.train.step import make_train_steps


def make_plan(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return the plan of a resolved config on `mesh`, whose devices may be those of a topology, as plain values."""
    jax.set_mesh(mesh)
    chip = known_chip(mesh)
    blueprint = make_blueprint(config.model, config.optimizer, config.mesh, config.train.num_steps, mesh)
    try:
        compiled, refused = compile_step(config, blueprint, mesh), 0
    except jax.errors.JaxRuntimeError as error:
        compiled, refused = None, bytes_refused(str(error))
    tokens, flops, least = by_formula(config, blueprint.abstract, mesh)
    found, printed = _collectives(compiled, mesh, least)
    memory = per_device_bytes(compiled.memory_analysis() if compiled else None, blueprint, refused)
    secs = roofline_secs(chip, mesh, flops, memory, found, config)
    step_secs = max(secs.values())
    return {
        "device": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "per_device_bytes": memory,
        "chip_bytes": int(chip.memory_bytes),
        "fits": not refused and memory["total"] <= chip.memory_bytes,
        "flops_per_step": flops,
        "collectives": _beside(found, least),
        "traffic_from": "compiled program" if printed else "formula",
        "secs": secs,
        "bound_by": max(secs, key=lambda name: secs[name]),
        "step_secs_estimate": step_secs,
        "mfu_bound": flops / (step_secs * chip.peak_flops * mesh.size),
        "tokens": tokens * config.train.last_step,
        "train_secs_estimate": step_secs * config.train.last_step,
    }


def by_formula(config: Config, abstract: TrainState, mesh: Mesh) -> tuple[int, float, list[Collective]]:
    """Return the tokens of a step, its FLOPs, and the least that it must communicate."""
    tokens = config.data.tokens_per_step
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract.params))
    least = least_collectives(config.model, config.mesh, mesh, Work(whole, tokens, config.train.accumulation_steps))
    return tokens, train_flops_per_token(config.model, config.data.seq_len) * tokens, least


def known_chip(mesh: Mesh) -> Chip:
    """Return the chip that a mesh consists of; raise UserError for one that is not in the table."""
    device = mesh.devices.flat[0]
    chip = find_chip(device, mesh.size)
    if chip is None:
        raise UserError(f"no data about {device.device_kind} in tinylm/analysis/chips.py; add its line there.")
    return chip


def compile_step(config: Config, blueprint: Blueprint, mesh: Mesh) -> jax.stages.Compiled:
    """Compile the train step that the trainer runs, one step a call; nothing is allocated."""
    shape = (1, config.train.accumulation_steps, config.micro_batch_rows, config.data.seq_len)
    layout = activation_sharding(mesh, (None, None, "batch", None), shape)
    names = {"tokens": "int32", "targets": "int32", "weights": "float32"}
    if config.data.packing == "packed":
        names |= {"segments": "int32", "positions": "int32"}
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for name, dtype in names.items()}
    number = jax.ShapeDtypeStruct((), "int32", sharding=replicated(mesh))
    steps: Any = make_train_steps(blueprint, make_schedule(config.optimizer, config.train.num_steps))
    return steps.lower(blueprint.abstract, batch, number, number).compile()


def bytes_refused(message: str) -> int:
    """Return the bytes of temporaries that a TPU's compiler refused, by its message; raise UserError for another."""
    found = re.search(r"RESOURCE_EXHAUSTED.*?\(?([\d.]+)([KMGT])\)? exceeds", message, re.DOTALL)
    if not found:
        raise UserError(f"the compiler refuses the step: {message.splitlines()[0][:300]}")
    return int(float(found.group(1)) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[found.group(2)])


def per_device_bytes(stats: Any, blueprint: Blueprint, refused: int = 0) -> dict[str, int]:
    """Return what a device holds at the height of a step, by kind; where `stats` is None, `refused` are temporaries.

    The compiler counts gradients among its temporaries; they are told apart by their size, that of the parameters.
    """
    params, optimizer = held_bytes(blueprint.abstract.params), held_bytes(blueprint.abstract.opt_state)
    temporaries = stats.temp_size_in_bytes if stats else refused
    kinds = {
        "params": params,
        "optimizer": optimizer,
        "gradients": min(params, temporaries),
        "activations": temporaries - min(params, temporaries),
    }
    if stats:
        kinds |= {
            "batch": max(stats.argument_size_in_bytes - params - optimizer, 0),
            "outputs": max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0),
            "program": stats.generated_code_size_in_bytes,
        }
    return {**kinds, "total": sum(kinds.values())}


def held_bytes(tree: Any) -> int:
    """Return the bytes of a tree's leaves on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _collectives(compiled: Any, mesh: Mesh, least: list[Collective]) -> tuple[list[Collective], bool]:
    """Return the program's collectives and True; the formula's and False where there is none or it can't be printed."""
    if compiled is None:
        return least, False
    try:
        text = compiled.as_text()
    except Exception:  # seen for large programs and new chips; the plugin has no type of its own for it
        return least, False
    return read_collectives(text, mesh), True


def _beside(found: list[Collective], least: list[Collective]) -> list[dict[str, Any]]:
    """Return the collectives, each kind and axis beside the least that is needed of it."""
    ours = {(one.kind, one.axis): one.bytes_per_step for one in found}
    needed = {(one.kind, one.axis): one.bytes_per_step for one in least}
    return [
        {"kind": kind, "axis": axis, "bytes_per_step": ours.get((kind, axis), 0.0),
         "minimum_bytes": needed.get((kind, axis), 0.0)}
        for kind, axis in sorted({*ours, *needed})
    ]  # fmt: skip


def roofline_secs(
    chip: Chip, mesh: Mesh, flops: float, memory: dict[str, int], found: list[Collective], config: Config
) -> dict[str, float]:
    """Return the seconds that arithmetic, memory and each kind of link take for a step.

    Memory: weights are read for each micro-batch and pass, state is read and written once.
    """
    first_axis = mesh.axis_names[0]
    recomputed = 4 / 3 if config.model.remat == "full" else 1
    weights = memory["params"] * (mesh.shape[mesh.axis_names[1]] if config.mesh.fsdp else 1)
    moved = 2 * weights * config.train.accumulation_steps + 2 * (memory["params"] + memory["optimizer"])
    across = sum(one.bytes_per_step for one in found if first_axis in one.axis)
    within = sum(one.bytes_per_step for one in found) - across
    link = chip.link_bytes_per_sec
    return {
        "arithmetic": flops * recomputed / (chip.peak_flops * mesh.size),
        "memory": moved / chip.memory_bytes_per_sec,
        "links": within / link if link else 0.0,
        "slices": across / SLICE_BYTES_PER_SEC if link else 0.0,
    }
