"""A plan: the train step compiled for a mesh, and what its program and the formulas say about it.

Nothing is allocated: the step is compiled from the abstract state. Memory is the compiler's own
account. FLOPs are the formula's, because compilers count the body of a scan once. Traffic is read
from the program's text, or is the formula's least where the text can't be printed. The time of a
step is a roofline (Williams et al. 2009): the slowest of arithmetic, memory and links, as if each
hid the others. So it is a lower bound, not a promise.
"""

import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from tinylm.core.batch import abstract_batch
from tinylm.core.chips import Chip, find_chip
from tinylm.core.errors import UserError
from tinylm.core.mesh import crosses_slices, mesh_sizes, replicated, sizes_by_name
from tinylm.model.flops import train_flops_per_token
from tinylm.tools.overlap import hidden_bytes, is_schedule, link_rate
from tinylm.tools.programs import Collective, read_collectives
from tinylm.tools.traffic import Work, least_collectives, share_of_step
from tinylm.train.config import Config
from tinylm.train.state import Blueprint, TrainState, make_blueprint
from tinylm.train.step import make_train_steps

# `... RESOURCE_EXHAUSTED: ... Used 20.3G of 15.7G hbm. ... (20.30G) exceeds available memory`
_REFUSED = re.compile(r"RESOURCE_EXHAUSTED.*?\(?([\d.]+)([KMGT])\)? exceeds", re.DOTALL)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}  # bytes


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a device sends in a step by one kind of collective.

    Attributes:
      kind: of the collective, as "all-reduce".
      axis: of the mesh, along which it sends.
      bytes_per_step: what it sends.
      minimum_bytes: the least that it must send, by the formula.
      hidden_share: the part of it that products hide; None where the program doesn't tell.
    """

    kind: str
    axis: str
    bytes_per_step: float
    minimum_bytes: float
    hidden_share: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes on a mesh. These are the keys of `plan --json`, too.

    Attributes:
      device: the kind of the mesh's devices.
      mesh: the size of each axis by its name.
      workers: that train by themselves; 0 where all devices train as one.
      sync_every_steps: after how many steps these are averaged. Each step has its part of a sync.
      per_device_bytes: what a device holds at the height of a step, by kind, and in `total`.
      chip_bytes: the memory that a device has.
      fits: whether it holds the total.
      flops_per_step: on all devices.
      collectives: the traffic of a step.
      traffic_from: where that was read: compiled program, or formula.
      hidden_share: the part of the time of all collectives that products hide; None where the
        program doesn't tell.
      secs: what arithmetic, memory and each kind of link take for a step.
      bound_by: the one that takes longest.
      step_secs_estimate: how long that is.
      mfu_bound: the largest part of the chips' peak that a step can use.
      tokens: of the whole run.
      train_secs_estimate: of the whole run.
    """

    device: str
    mesh: dict[str, int]
    workers: int
    sync_every_steps: int
    per_device_bytes: dict[str, int]
    chip_bytes: int
    fits: bool
    flops_per_step: float
    collectives: list[Traffic]
    traffic_from: str
    hidden_share: float | None
    secs: dict[str, float]
    bound_by: str
    step_secs_estimate: float
    mfu_bound: float
    tokens: int
    train_secs_estimate: float


def make_plan(config: Config, mesh: Mesh) -> Plan:
    """Return the plan of a resolved config.

    Args:
      config: its step is compiled.
      mesh: its devices may be those of a TPU topology that isn't here.
    """
    jax.set_mesh(mesh)
    chip = known_chip(mesh)
    blueprint = make_blueprint(config, mesh)
    compiled = None
    refused_bytes = 0
    try:
        compiled = compile_step(config, blueprint, mesh)
    except jax.errors.JaxRuntimeError as error:
        refused_bytes = bytes_refused(str(error))

    tokens, flops, least = by_formula(config, blueprint.abstract, mesh)
    text = None if compiled is None else _text_of(compiled)
    collectives = least
    steps_per_sync = config.train.sync_every_steps
    if text is not None:
        collectives = []
        for one in read_collectives(text, mesh):
            share = share_of_step(one.axis, steps_per_sync)
            of_step = dataclasses.replace(one, bytes_per_step=one.bytes_per_step * share)
            collectives.append(of_step)
    hidden = None
    # CPU devices share a memory, so they have no links. On GPUs libraries compute most products,
    # which the text doesn't tell.
    is_tpu = mesh.devices.flat[0].platform == "tpu"
    if is_tpu and text is not None and is_schedule(text):
        hidden = {}
        for key, count in hidden_bytes(text, mesh, chip).items():
            _, axis = key
            hidden[key] = count * share_of_step(axis, steps_per_sync)
    stats = None if compiled is None else compiled.memory_analysis()
    memory = per_device_bytes(stats, blueprint, refused_bytes)
    secs = roofline_secs(mesh, flops, memory, collectives, config)
    step_secs = max(secs.values())
    return Plan(
        device=mesh.devices.flat[0].device_kind,
        mesh=sizes_by_name(mesh),
        workers=blueprint.num_workers,
        sync_every_steps=steps_per_sync,
        per_device_bytes=memory,
        chip_bytes=int(chip.memory_bytes),
        fits=not refused_bytes and memory["total"] <= chip.memory_bytes,
        flops_per_step=flops,
        collectives=_compared(collectives, least, hidden),
        traffic_from="formula" if text is None else "compiled program",
        hidden_share=_hidden_share(mesh, chip, collectives, hidden),
        secs=secs,
        bound_by=max(secs, key=lambda name: secs[name]),
        step_secs_estimate=step_secs,
        mfu_bound=flops / (step_secs * chip.peak_flops * mesh.size),
        tokens=tokens * config.train.last_step,
        train_secs_estimate=step_secs * config.train.last_step,
    )


class Formulas(NamedTuple):
    """What formulas say of a step."""

    tokens: int
    flops: float
    collectives: list[Collective]  # the least that it must communicate


def by_formula(config: Config, abstract: TrainState, mesh: Mesh) -> Formulas:
    """Return what formulas say of a step, given the abstract state."""
    tokens = config.data.tokens_per_step
    flops = train_flops_per_token(config.model, config.data.seq_len) * tokens
    leaves = jax.tree.leaves(abstract.params)
    parameter_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    train = config.train
    work = Work(
        parameter_bytes,
        tokens,
        row_length=config.data.seq_len,
        micro_batches=train.accumulation_steps,
        steps_per_sync=train.sync_every_steps,
    )
    collectives = least_collectives(config.model, config.mesh, mesh, work)
    return Formulas(tokens, flops, collectives)


def known_chip(mesh: Mesh) -> Chip:
    """Return the chip that a mesh consists of; raise UserError for one that is not in the table."""
    device = mesh.devices.flat[0]
    chip = find_chip(device, mesh.size)
    if chip is None:
        raise UserError(
            f"no data about {device.device_kind} in tinylm/core/chips.py; add its line there."
        )
    return chip


def compile_step(config: Config, blueprint: Blueprint, mesh: Mesh) -> jax.stages.Compiled:
    """Compile the train step that the trainer runs, one step a call; nothing is allocated."""
    micro_batches = config.train.accumulation_steps
    shape = (1, micro_batches, config.micro_batch_rows, config.data.seq_len)
    batch = abstract_batch(mesh, shape, packed=config.data.packing == "packed")
    number = jax.ShapeDtypeStruct((), "int32", sharding=replicated(mesh))
    train_steps: Any = make_train_steps(blueprint)
    return train_steps.lower(blueprint.abstract, batch, number, number, number).compile()


def bytes_refused(message: str) -> int:
    """Return the bytes of temporaries that a TPU's compiler refused; raise UserError for another
    message.
    """
    found = _REFUSED.search(message)
    if found is None:
        first_line = message.splitlines()[0][:300]
        raise UserError(f"the compiler refuses the step: {first_line}")
    size, unit = found.groups()
    return int(float(size) * _UNITS[unit])


def per_device_bytes(stats: Any, blueprint: Blueprint, refused_bytes: int = 0) -> dict[str, int]:
    """Return what a device holds at the height of a step, by kind.

    The compiler counts gradients among its temporaries; they are told apart by their size, which
    is that of the parameters.

    Args:
      stats: `compiled.memory_analysis()`, None where the compiler refused.
      blueprint: of the run.
      refused_bytes: then, the temporaries that it refused.
    """
    params = held_bytes(blueprint.abstract.params)
    optimizer = held_bytes(blueprint.abstract.opt_state)
    temporaries = refused_bytes if stats is None else stats.temp_size_in_bytes
    gradients = min(params, temporaries)
    kinds = {
        "params": params,
        "optimizer": optimizer,
        "gradients": gradients,
        "activations": temporaries - gradients,
    }
    if stats is not None:
        kinds["batch"] = max(stats.argument_size_in_bytes - params - optimizer, 0)
        kinds["outputs"] = max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
        kinds["program"] = stats.generated_code_size_in_bytes
    return {**kinds, "total": sum(kinds.values())}


def held_bytes(tree: Any) -> int:
    """Return the bytes of a tree's leaves on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def _text_of(compiled: jax.stages.Compiled) -> str | None:
    """Return the text of a program, None where it can't be had."""
    try:
        return compiled.as_text()
    except Exception:
        # Seen for large programs and new chips; the plugin has no type of its own for it.
        return None


def _compared(
    found: list[Collective], least: list[Collective], hidden: dict[tuple[str, str], float] | None
) -> list[Traffic]:
    """Return the collectives, each kind and axis with the least that is needed of it, and with the
    part of it that is hidden.
    """
    sent = {(one.kind, one.axis): one.bytes_per_step for one in found}
    needed = {(one.kind, one.axis): one.bytes_per_step for one in least}
    rows = []
    for key in sorted({*sent, *needed}):
        kind, axis = key
        hidden_share = None
        if hidden is not None and key in sent:
            hidden_share = hidden.get(key, 0.0) / sent[key]
        row = Traffic(
            kind,
            axis,
            bytes_per_step=sent.get(key, 0.0),
            minimum_bytes=needed.get(key, 0.0),
            hidden_share=hidden_share,
        )
        rows.append(row)
    return rows


def _hidden_share(
    mesh: Mesh,
    chip: Chip,
    found: list[Collective],
    hidden: dict[tuple[str, str], float] | None,
) -> float | None:
    """Return the part of the time of all collectives that is hidden."""
    if hidden is None or not found:
        return None
    secs = sum(one.bytes_per_step / link_rate(mesh, chip, one.axis) for one in found)
    hidden_secs = sum(sent / link_rate(mesh, chip, axis) for (_, axis), sent in hidden.items())
    return hidden_secs / secs


def roofline_secs(
    mesh: Mesh,
    flops: float,
    memory: dict[str, int],
    collectives: list[Collective],
    config: Config,
) -> dict[str, float]:
    """Return the seconds that arithmetic, memory and each kind of link take for a step.

    Args:
      mesh: the devices.
      flops: of a step on all devices.
      memory: `params` and `optimizer`, bytes of a device.
      collectives: what a device sends.
      config: of the run.
    """
    chip = known_chip(mesh)
    # Recomputing the forward pass makes 4 parts of arithmetic out of 3.
    recomputed = 4 / 3 if config.model.remat == "full" else 1
    # Weights, gathered under fsdp, are read for each micro-batch in the forward and in the
    # backward pass; the state is read and written once.
    gathered_from = mesh_sizes(mesh).data if config.mesh.fsdp else 1
    weight_bytes = memory["params"] * gathered_from
    state_bytes = memory["params"] + memory["optimizer"]
    moved_bytes = 2 * weight_bytes * config.train.accumulation_steps + 2 * state_bytes
    links_secs = 0.0
    slices_secs = 0.0
    # CPU devices share a memory, so they have no links.
    if chip.link_bytes_per_sec:
        for one in collectives:
            secs = one.bytes_per_step / link_rate(mesh, chip, one.axis)
            if crosses_slices(mesh, one.axis):
                slices_secs += secs
            else:
                links_secs += secs
    return {
        "arithmetic": flops * recomputed / (chip.peak_flops * mesh.size),
        "memory": moved_bytes / chip.memory_bytes_per_sec,
        "links": links_secs,
        "slices": slices_secs,
    }
