"""Search a topology for the mesh, the rematerialization and the batch that train fastest.

Nothing runs. Every candidate is ranked by formula: the state is exact, from the abstract state;
activations are counted as in Korthikanti et al. 2022, section 4, for what these layers keep, and
for what compilers were seen to add; the time is the plan's roofline. The best few are then
compiled, and where one doesn't fit after all, its batch is halved until it does.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig, batch_shards, make_mesh, sizes_by_name
from tinylm.core.ring import has_stretches
from tinylm.model.blockwise import MOST_LOGITS
from tinylm.model.config import ModelConfig
from tinylm.model.context import planned_form
from tinylm.model.flops import mean_hidden_features
from tinylm.model.kernels import KernelChoice
from tinylm.model.layers import GATED
from tinylm.tools.plan import by_formula, held_bytes, known_chip, make_plan, roofline_secs
from tinylm.train.config import Config
from tinylm.train.local_steps import workers_of_replica
from tinylm.train.state import make_blueprint

# Part of the chip's memory that formulas may fill.
MARGIN = 0.9
# The fewest positions of a row that are worth a device: the products of fewer are too small.
_LEAST_POSITIONS = 1024
# How many numbers of float32 a tile of a TPU's memory is wide.
_LANES = 128
# The cheapest first.
REMATS = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class SearchRow:
    """A mesh and a policy at their largest batch. These are the keys of `plan --search --json`.

    Attributes:
      mesh: the size of each axis by its name.
      fsdp: whether parameters and optimizer state are split over `data`.
      expert_parallel: whether tokens are sent to experts (model.expert_parallel).
      remat: what is computed again.
      batch_size: rows of a step on all devices.
      bytes: what a device holds, by the formula.
      secs_per_token: by the formula.
      bound_by: what takes longest.
      compiled_bytes: what a device holds, by the compiler; None: it was not asked.
      compiled_secs_per_token: the same of the time.
      fits: whether `compiled_bytes` fit.
    """

    mesh: dict[str, int]
    fsdp: bool
    remat: str
    batch_size: int
    bytes: int
    secs_per_token: float
    bound_by: str
    expert_parallel: bool = False
    compiled_bytes: int | None = None
    compiled_secs_per_token: float | None = None
    fits: bool | None = None

    @property
    def mesh_config(self) -> MeshConfig:
        """The section that makes this mesh."""
        return MeshConfig(**self.mesh, fsdp=self.fsdp)

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values; one that wasn't compiled doesn't say whether it fits."""
        values = dataclasses.asdict(self)
        if self.fits is None:
            del values["fits"]
        return values


def search(config: Config, devices: Sequence[jax.Device], compiled: int = 3) -> list[SearchRow]:
    """Return a row for each mesh and policy that fits a resolved config, fastest first.

    Args:
      config: what it says about the mesh, remat and batch is replaced.
      devices: all of them are used.
      compiled: how many of the first rows are compiled.
    """
    found = []
    for mesh_config in _mesh_configs(config, len(devices)):
        found += _rows_by_formula(config, mesh_config, devices)
    if not found:
        raise UserError(
            f"nothing fits: not one row of data.seq_len={config.data.seq_len} a device on any mesh "
            f"of {len(devices)} devices, not even with model.remat=full; take a smaller model, "
            "shorter rows, or more devices."
        )

    found.sort(key=rank)
    best = [_compiled(config, row, devices) for row in found[:compiled]]
    best.sort(key=rank)
    return best + found[compiled:]


def rank(row: SearchRow) -> tuple[bool, float, int, int]:
    """Return what orders rows: what fits first, then by time for a token.

    The compiler knows better than the formula. Of two rows that are equally fast to two digits,
    the simpler one comes first.
    """
    secs = row.compiled_secs_per_token or row.secs_per_token
    rounded_secs = float(f"{secs:.2g}")
    is_too_large = row.fits is False
    return is_too_large, rounded_secs, REMATS.index(row.remat), row.mesh_config.model


def _mesh_configs(config: Config, num_devices: int) -> list[MeshConfig]:
    """Return the meshes of all devices that split heads and rows evenly, with fsdp and without."""
    replica = max(config.mesh.replica, 1)
    per_slice = num_devices // replica
    num_heads = config.model.num_heads
    seq_len = config.data.seq_len
    # Each device has two stretches of a row, of at least so many positions together.
    most_parts = max(seq_len // _LEAST_POSITIONS, 1)
    whole_row = MeshConfig(replica=replica)
    found = []
    for model in range(1, num_heads + 1):
        if per_slice % model or num_heads % model:
            continue
        for context in range(1, most_parts + 1):
            if per_slice // model % context or not has_stretches(seq_len, context):
                continue
            data = per_slice // model // context
            mesh = dataclasses.replace(whole_row, data=data, context=context, model=model)
            found.append(mesh)
            if data > 1:
                found.append(dataclasses.replace(mesh, fsdp=True))
    return found


def _rows_by_formula(
    config: Config, mesh_config: MeshConfig, devices: Sequence[jax.Device]
) -> list[SearchRow]:
    """Return a row for each policy with which a row of tokens a device fits, at its largest
    batch.
    """
    mesh = make_mesh(mesh_config, devices)
    chip = known_chip(mesh)
    blueprint = make_blueprint(dataclasses.replace(config, mesh=mesh_config), mesh)
    held = {
        "params": held_bytes(blueprint.abstract.params),
        "optimizer": held_bytes(blueprint.abstract.opt_state),
    }
    # Gradients take as much as the parameters.
    fixed_bytes = 2 * held["params"] + held["optimizer"]
    platform = mesh.devices.flat[0].platform
    if platform == "tpu":
        # Copies of parameters in the compute type, and of the state in another layout of memory.
        fixed_bytes += 3 * held["params"] // 2
    if mesh_config.fsdp:
        leaves = jax.tree.leaves(blueprint.abstract.params)
        num_parameters = sum(math.prod(leaf.shape) for leaf in leaves)
        fixed_bytes += int(gathered_bytes(config.model, mesh_config, num_parameters))
    free_bytes = MARGIN * chip.memory_bytes - fixed_bytes
    num_workers = workers_of_replica(config, mesh)
    rows = []
    # Where `data` splits the experts, tokens may be sent to them or the experts be gathered.
    num_experts = config.model.num_experts
    can_send = num_experts > 0 and mesh_config.fsdp and num_experts % mesh_config.data == 0
    ways = (False, True) if can_send else (False,)
    for remat, expert_parallel in itertools.product(REMATS, ways):
        trial = config.editable_copy()
        trial.mesh = mesh_config
        trial.model.remat = remat
        trial.model.expert_parallel = expert_parallel
        bytes_per_row = activation_bytes(
            trial.model,
            mesh_config.model,
            config.data.seq_len,
            mesh_config.context,
            platform,
        )
        rows_per_device = int(free_bytes // bytes_per_row)
        if rows_per_device < num_workers:
            continue
        # A power of two of each worker, as kernels like it.
        rows_per_worker = 2 ** ((rows_per_device // num_workers).bit_length() - 1)
        rows_per_device = rows_per_worker * num_workers
        micro_batch_rows = rows_per_device * batch_shards(mesh)
        trial.data.batch_size = micro_batch_rows * config.train.accumulation_steps
        trial.freeze()
        said = by_formula(trial, blueprint.abstract, mesh)
        secs = roofline_secs(mesh, said.flops, held, said.collectives, trial)
        # How much a compiler can hide behind the slowest part is not known: a tenth of the rest
        # is taken as not hidden.
        step_secs = 0.9 * max(secs.values()) + 0.1 * sum(secs.values())
        row = SearchRow(
            mesh=sizes_by_name(mesh),
            fsdp=mesh_config.fsdp,
            expert_parallel=expert_parallel,
            remat=remat,
            batch_size=trial.data.batch_size,
            bytes=int(fixed_bytes + rows_per_device * bytes_per_row),
            secs_per_token=step_secs / said.tokens,
            bound_by=max(secs, key=lambda name: secs[name]),
        )
        rows.append(row)
    return rows


def activation_bytes(
    model: ModelConfig,
    tensor_ways: int,
    seq_len: int,
    context_ways: int = 1,
    platform: str = "cpu",
) -> float:
    """Return the bytes of activations that a device keeps for one row of tokens.

    Args:
      model: a resolved model.
      tensor_ways: devices that split heads, mlp and positions.
      seq_len: tokens of the row.
      context_ways: devices that split the row.
      platform: of the devices, which decides the kernel of attention.
    """
    item_bytes = model.compute_bytes
    embed = model.embed_dim
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    inner_maps = 2 if model.mlp in GATED else 1
    # What the maps make: queries, keys, values, the two outputs, the inner features of the mlp.
    hidden = mean_hidden_features(model)
    product_numbers = qkv + 2 * embed + inner_maps * hidden
    # What lies between the maps: norms and residuals, the activation, the rotated heads.
    between_numbers = 4 * embed + hidden + qkv
    layer_bytes = item_bytes * (product_numbers + between_numbers)
    # What is there while the gradients of one layer are computed, and is not kept.
    passing_bytes = 0.0
    for window in model.attention_window:
        attention = _attention_bytes(
            model, window, seq_len, context_ways, tensor_ways=tensor_ways, platform=platform
        )
        layer_bytes += attention.kept / len(model.attention_window)
        passing_bytes = max(passing_bytes, attention.passing)
    if platform == "tpu":
        # While the mlp is there are gradients of its inner features, and nothing of attention.
        passing_bytes = max(passing_bytes, item_bytes * (inner_maps + 1) * hidden)
    if model.conv_taps:
        # Inputs and outputs of the two convolutions. They have all positions and features on each
        # of the devices that split heads, however many these are.
        layer_bytes += item_bytes * 4 * embed * tensor_ways
    if model.num_experts:
        # A token's features for each of its experts, and what these make of them: by expert, by
        # token, and weighted. All devices that split the hidden features have them.
        layer_bytes += item_bytes * 4 * model.experts_per_token * embed * tensor_ways
    if model.remat == "none":
        kept_bytes = layer_bytes
        if platform == "tpu":
            # Its compiler was seen to hold half of it, and more, twice.
            kept_bytes *= 1.5
    else:
        # The input of a layer is kept, and one layer at a time is there whole.
        kept_bytes = item_bytes * embed
        passing_bytes += layer_bytes
    if model.remat == "dots":
        kept_bytes += item_bytes * product_numbers
    # The logits in float32, and their gradient, of one piece of the row at a time.
    logit_bytes = 4 + 4
    if platform == "tpu":
        # The gradient is in the type of the model, or nowhere whole where rows are in parts.
        logit_bytes = 4 + (item_bytes if context_ways == 1 else 0)
    vocab_bytes = logit_bytes * model.padded_vocab / model.loss_chunks
    if platform == "tpu":
        # The logits are gone when the backward pass gets to the layers.
        passing_bytes = max(passing_bytes, vocab_bytes)
    else:
        passing_bytes += vocab_bytes
    per_token = model.num_layers * kept_bytes + passing_bytes
    return seq_len * per_token / (tensor_ways * context_ways)


class _AttentionBytes(NamedTuple):
    """What attention takes for a token of a layer, besides queries, keys, values and outputs."""

    kept: float  # until the backward pass
    passing: float  # while the layer is computed


def _attention_bytes(
    model: ModelConfig,
    window: int,
    seq_len: int,
    context_ways: int,
    *,
    tensor_ways: int,
    platform: str,
) -> _AttentionBytes:
    """Return what attention of a layer takes, by the form and kernel that it takes."""
    item_bytes = model.compute_bytes
    heads = model.num_heads
    is_tpu = platform == "tpu"
    # A TPU stores heads of fewer numbers as if they had so many.
    width = max(model.head_dim, _LANES) if is_tpu else model.head_dim
    if context_ways > 1:
        stretch = seq_len // (2 * context_ways)
        form = planned_form(model, window, stretch, platform)
    else:
        choice = KernelChoice.in_training(model, window, platform)
        form = "splash" if choice.takes_splash(seq_len) else "whole"

    if form == "whole":
        # The softmax of a token, in float32 and in the type of the model.
        return _AttentionBytes(kept=heads * seq_len * (4 + item_bytes), passing=0.0)
    if form == "splash":
        kept_heads = 2 * (heads + model.num_kv_heads)
        padding_bytes = item_bytes * kept_heads * (width - model.head_dim)
        # The log-normalizers of a token, in float32, come out of it once for each lane.
        passing_bytes = 4.0 * _LANES * heads
        if context_ways > 1:
            # A row's keys and values with their gradients, one head at a time on each device.
            passing_bytes += 4 * item_bytes * width * tensor_ways * context_ways
        return _AttentionBytes(padding_bytes, passing_bytes)

    # Blocks of logits, of the queries of a stretch and the keys that are here, and what is made of
    # them in float32: as many arrays as compilers were seen to hold. That of CPUs holds what a ring
    # makes of a device's own keys at the same time.
    num_keys = seq_len if form == "gather" else 2 * stretch
    num_arrays = 5 if is_tpu or form == "gather" else 12
    block_logits = min(MOST_LOGITS * tensor_ways, heads * stretch * num_keys)
    block_bytes = num_arrays * 4 * block_logits / (2 * stretch)
    if form == "gather":
        row_bytes = 2 * item_bytes * model.num_kv_heads * width * context_ways
        return _AttentionBytes(kept=row_bytes, passing=row_bytes + block_bytes)
    if form == "neighbours":
        block_bytes *= min(window / stretch, 1.0)
    # Outputs and gradients of early and late queries, summed in float32, and what a block adds.
    sums_bytes = 6 * 4 * heads * width
    return _AttentionBytes(kept=0.0, passing=sums_bytes + block_bytes)


def gathered_bytes(model: ModelConfig, mesh_config: MeshConfig, num_parameters: int) -> float:
    """Return what a device holds, under mesh.fsdp, of parameters and gradients of other devices.

    That is one layer, gathered, and its gradients, in the compute type; and embedding and output,
    whose gradients are in float32.
    """
    item_bytes = model.compute_bytes
    layer_numbers = (num_parameters - model.vocab_numbers) / model.num_layers
    total_bytes = 2 * item_bytes * layer_numbers + (item_bytes + 4) * model.vocab_numbers
    return total_bytes / mesh_config.model


def _compiled(config: Config, row: SearchRow, devices: Sequence[jax.Device]) -> SearchRow:
    """Return `row` with what its compiled step takes.

    Its batch is halved until it fits, or until it is one row a device.
    """
    mesh = make_mesh(row.mesh_config, devices)
    smallest_batch = batch_shards(mesh) * config.train.accumulation_steps
    smallest_batch *= workers_of_replica(config, mesh)
    batch_size = row.batch_size
    while True:
        trial = config.editable_copy()
        trial.mesh = row.mesh_config
        trial.model.remat = row.remat
        trial.model.expert_parallel = row.expert_parallel
        trial.data.batch_size = batch_size
        trial.freeze()
        plan = make_plan(trial, mesh)
        if plan.fits or batch_size <= smallest_batch:
            break
        batch_size //= 2
    return dataclasses.replace(
        row,
        batch_size=batch_size,
        fits=plan.fits,
        compiled_bytes=plan.per_device_bytes["total"],
        compiled_secs_per_token=plan.step_secs_estimate / trial.data.tokens_per_step,
        bound_by=plan.bound_by,
    )
