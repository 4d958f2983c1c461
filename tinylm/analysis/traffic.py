"""The least that a step must communicate, by formula: the textbook's collectives of data, fsdp and tensor parallelism.

Bytes are what one device sends by ring algorithms; P is the bytes of its parameters before `data` splits them.
    data parallel     one all-reduce of the gradients over `data`: 2 P (n - 1) / n
    fsdp              for each micro-batch, gather the parameters for the forward and for the backward pass, and
                      reduce-scatter the gradients: 3 P (n - 1) / n (Rajbhandari et al. 2020), all in the compute type
                      but the gradients of embedding and output, which are float32
    tensor parallel   an all-reduce (or a gather and a scatter) of the activations at both ends of attention and mlp,
                      forward and backward: 4 a layer, 2 for embedding and output (Shoeybi et al. 2019)
    slices            one all-reduce over `replica` of the gradients that a device holds
Recomputing the forward pass (model.remat=full) adds the third gather and half of a layer's all-reduces.
"""

import dataclasses

from jax.sharding import Mesh

from tinylm.analysis.programs import Collective
from tinylm.core.mesh import MeshConfig
from tinylm.model.config import ModelConfig

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step works on: bytes of all float32 parameters, tokens, micro-batches."""

    parameter_bytes: float
    tokens_per_step: int
    micro_batches: int


def least_collectives(model: ModelConfig, config: MeshConfig, mesh: Mesh, work: Work) -> list[Collective]:
    """Return the collectives of a step that no layout of this kind can do without."""
    replica, data, tensor = (mesh.shape[name] for name in mesh.axis_names)
    replica_axis, data_axis, tensor_axis = mesh.axis_names
    item = _ITEM_BYTES[model.compute_dtype]
    held = work.parameter_bytes / tensor
    again = model.remat == "full"
    found = []
    if data > 1 and config.fsdp:
        exact = (1 if model.tie_embeddings else 2) * 4 * model.padded_vocab * model.embed_dim / tensor
        shrunk, times = item / 4, work.micro_batches * _ring(data)
        found.append(Collective("all-gather", data_axis, (3 if again else 2) * held * shrunk * times))
        found.append(Collective("reduce-scatter", data_axis, ((held - exact) * shrunk + exact) * times))
    elif data > 1:
        found.append(Collective("all-reduce", data_axis, 2 * held * _ring(data)))
    if replica > 1:
        share = held / data if config.fsdp else held
        found.append(Collective("all-reduce", replica_axis, 2 * share * _ring(replica)))
    if tensor > 1:
        activations = work.tokens_per_step / (data * replica) * model.embed_dim * item
        per_layer = (2 if model.parallel_residual else 4) * (1.5 if again else 1)
        times = per_layer * model.num_layers + 2
        found.append(Collective("all-reduce", tensor_axis, 2 * times * activations * _ring(tensor)))
    return found


def _ring(members: int) -> float:
    return (members - 1) / members
