"""The least that a step must communicate, by formula, for data, fsdp, context and tensor
parallelism.

Bytes are what one device sends by ring algorithms. P is the bytes of its parameters before the
data axis splits them, n the number of devices along the axis.

    data parallel     one all-reduce of the gradients: 2 P (n - 1) / n
    fsdp              for each micro-batch, gather the parameters for the forward and for the
                      backward pass, and reduce-scatter the gradients: 3 P (n - 1) / n
                      (Rajbhandari et al. 2020). All in the compute type, except the gradients of
                      embedding and output, which are float32.
    tensor parallel   an all-reduce (or a gather and a scatter) of the activations at both ends of
                      attention and mlp, forward and backward: 4 a layer, 2 for embedding and
                      output (Shoeybi et al. 2019)
    context           for each micro-batch, an all-reduce of the gradients that a device holds, in
                      the compute type but for embedding and output; and for each layer, with b
                      the bytes of keys and values of a device's part of the rows,
                      - ring: (n - 1) b in the forward pass; in the backward pass the same again,
                        and their gradients in float32 (Liu et al. 2023)
                      - gather: a gather of (n - 1) b in the forward pass, and a reduce-scatter of
                        their gradients in the backward pass
                      - neighbours: the part of b that a window reaches, in both
    slices            one all-reduce of the gradients that a device holds. Where workers train by
                      themselves (Douillard et al. 2023) one of how far they came, once in
                      train.sync_every_steps steps, of which each device of `data` sends a part

Recomputing the forward pass (model.remat=full) adds a third gather, half of a layer's all-reduces
and all-to-alls, and what the context axis sends forward (with model.remat=dots, too). A CPU's
program does with two gathers, since what it gathers to compute a layer again serves the layer's
gradients, too. Whether a TPU's program does so has not been checked, and where a program can't be
printed the plan shows these figures, so the higher number is kept.

With model.parallel_residual the least is half of what programs send; docs/scaling.md says why.
"""

import dataclasses

from jax.sharding import Mesh

from tinylm.core.mesh import AXES, MeshConfig, mesh_sizes
from tinylm.model.config import ModelConfig
from tinylm.model.context import planned_form
from tinylm.model.layers import GATED
from tinylm.tools.programs import Collective

_FLOAT32_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step works on."""

    parameter_bytes: float  # of all float32 parameters of the model
    tokens_per_step: int
    row_length: int  # tokens
    micro_batches: int
    steps_per_sync: int  # steps after which replicas exchange something


def least_collectives(
    model: ModelConfig, config: MeshConfig, mesh: Mesh, work: Work
) -> list[Collective]:
    """Return the collectives of a step that no layout of this kind can do without."""
    sizes = mesh_sizes(mesh)
    item_bytes = model.compute_bytes
    recomputes = model.remat == "full"
    # What a device would hold of the parameters if the data axis didn't split them.
    parameter_bytes = work.parameter_bytes / sizes.model
    tokens_per_device = work.tokens_per_step / (sizes.data * sizes.replica * sizes.context)
    found = []

    in_compute_type = item_bytes / _FLOAT32_BYTES
    # What the partitioner sends of gradients: those of embedding and output stay float32, all
    # others are in the compute type.
    vocab_bytes = _FLOAT32_BYTES * model.vocab_numbers / sizes.model
    other_bytes = parameter_bytes - vocab_bytes
    gradient_bytes = other_bytes * in_compute_type + vocab_bytes

    if sizes.data > 1 and config.fsdp:
        gathers = 3 if recomputes else 2
        gathered_bytes = gathers * parameter_bytes * in_compute_type
        expert_bytes = 0.0
        if model.expert_parallel and model.num_experts % sizes.data == 0:
            expert_bytes = _FLOAT32_BYTES * _expert_numbers(model) / sizes.model
            gathered_bytes -= gathers * expert_bytes * in_compute_type
        scattered_bytes = gradient_bytes - expert_bytes * in_compute_type
        times = work.micro_batches * _ring(sizes.data)
        found.append(Collective("all-gather", AXES.data, gathered_bytes * times))
        found.append(Collective("reduce-scatter", AXES.data, scattered_bytes * times))
        if expert_bytes:
            exchanges = 6 if recomputes else 4
            rows = tokens_per_device * model.experts_per_token
            row_bytes = model.embed_dim * item_bytes
            layer_bytes = rows * row_bytes * _ring(sizes.data)
            sent_bytes = exchanges * model.num_expert_layers * layer_bytes
            found.append(Collective("all-to-all", AXES.data, sent_bytes))
    elif sizes.data > 1:
        sent_bytes = 2 * parameter_bytes * _ring(sizes.data)
        found.append(Collective("all-reduce", AXES.data, sent_bytes))

    if sizes.replica > 1:
        has_parts = config.fsdp or work.steps_per_sync > 1
        held_bytes = parameter_bytes / sizes.data if has_parts else parameter_bytes
        sent_bytes = 2 * held_bytes * _ring(sizes.replica)
        found.append(Collective("all-reduce", AXES.replica, sent_bytes / work.steps_per_sync))

    if sizes.context > 1:
        held_bytes = gradient_bytes / sizes.data if config.fsdp else gradient_bytes
        sent_bytes = 2 * held_bytes * work.micro_batches * _ring(sizes.context)
        found.append(Collective("all-reduce", AXES.context, sent_bytes))
        found += _between_positions(model, mesh, work)

    if sizes.model > 1:
        activation_bytes = tokens_per_device * model.embed_dim * item_bytes
        # Attention and mlp that read the same input share their collectives.
        per_layer = 2.0 if model.parallel_residual else 4.0
        if recomputes:
            per_layer *= 1.5
        num_sums = per_layer * model.num_layers + 2
        sent_bytes = 2 * num_sums * activation_bytes * _ring(sizes.model)
        found.append(Collective("all-reduce", AXES.model, sent_bytes))
    return found


def _between_positions(model: ModelConfig, mesh: Mesh, work: Work) -> list[Collective]:
    """Return what devices that share rows send each other of keys and values."""
    sizes = mesh_sizes(mesh)
    item_bytes = model.compute_bytes
    # Each device has two stretches of a row.
    stretch = work.row_length // (2 * sizes.context)
    tokens_per_device = work.tokens_per_step * sizes.model / mesh.size
    # Where the mesh doesn't divide the kv heads, each query head has a copy of its own.
    divides = model.num_kv_heads % sizes.model == 0
    kv_heads = (model.num_kv_heads if divides else model.num_heads) / sizes.model
    part_bytes = 2 * tokens_per_device * kv_heads * model.head_dim * item_bytes
    others = sizes.context - 1
    forward_passes = 1 if model.remat == "none" else 2

    permuted = gathered = scattered = 0.0
    for window in model.attention_window:
        layers = model.num_layers / len(model.attention_window)
        form = planned_form(model, window, stretch, mesh.devices.flat[0].platform)
        if form == "neighbours":
            reached = (window - 1) / stretch
            permuted += layers * part_bytes * reached * (forward_passes + 1)
        elif form == "ring":
            gradients = 1 + _FLOAT32_BYTES / item_bytes
            permuted += layers * part_bytes * others * (forward_passes + gradients)
        else:
            # Splash gathers them again for the backward pass.
            gathers = forward_passes + 1 if form == "splash" else forward_passes
            gathered += layers * part_bytes * others * gathers
            scattered += layers * part_bytes * others
    kinds = {
        "collective-permute": permuted,
        "all-gather": gathered,
        "reduce-scatter": scattered,
    }
    return [Collective(kind, AXES.context, sent) for kind, sent in kinds.items() if sent]


def share_of_step(axis: str, steps_per_sync: int) -> float:
    """Return the part of a step that what a program sends along an axis counts as.

    A program has the sync of local steps once, and runs it once in `steps_per_sync` steps; all
    else that crosses between replicas there are the few numbers that it logs.
    """
    return 1 / steps_per_sync if AXES.replica in axis else 1


def _expert_numbers(model: ModelConfig) -> int:
    """Return how many numbers the matrices of all experts hold."""
    maps = 3 if model.mlp in GATED else 2
    numbers_of_layer = maps * model.num_experts * model.embed_dim * model.expert_dim
    return model.num_expert_layers * numbers_of_layer


def _ring(num_members: int) -> float:
    """Return the part of an array that a member of a ring sends to gather or scatter it."""
    return (num_members - 1) / num_members
