"""Search a topology for the mesh, the rematerialization and the batch that train fastest.

Nothing runs. Every candidate is ranked by formula: the state is exact, from the abstract state;
activations are counted as in Korthikanti et al. 2022, section 4, for what these layers keep; the
time is the plan's roofline. The best few are then compiled, and where one doesn't fit after all,
its batch is halved until it does.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax

from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig, batch_shards, make_mesh, sizes_by_name
from tinylm.core.ring import has_stretches
from tinylm.model.config import ModelConfig
from tinylm.model.flops import mean_hidden_features
from tinylm.model.layers import GATED
from tinylm.tools.plan import by_formula, held_bytes, known_chip, make_plan, roofline_secs
from tinylm.train.config import Config
from tinylm.train.local_steps import workers_of_replica
from tinylm.train.state import make_blueprint

# Part of the chip's memory that formulas may fill.
MARGIN = 0.9
# The fewest positions of a row that are worth a device: the products of fewer are too small.
_LEAST_POSITIONS = 1024
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
            trial.model, mesh_config.model, config.data.seq_len, mesh_config.context
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
    model: ModelConfig, tensor_ways: int, seq_len: int, context_ways: int = 1
) -> float:
    """Return the bytes of activations that a device keeps for one row of tokens.

    Args:
      model: a resolved model.
      tensor_ways: devices that split heads, mlp and positions.
      seq_len: tokens of the row.
      context_ways: devices that split the row.
    """
    item_bytes = 2 if model.compute_dtype == "bfloat16" else 4
    embed = model.embed_dim
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    inner_maps = 2 if model.mlp in GATED else 1
    # What the maps make: queries, keys, values, the two outputs, the inner features of the mlp.
    hidden = mean_hidden_features(model)
    product_numbers = qkv + 2 * embed + inner_maps * hidden
    # What lies between the maps: norms and residuals, the activation, the rotated heads.
    between_numbers = 4 * embed + hidden + qkv
    # A row of attention: its softmax in float32, and in the type of the model.
    attention_bytes = model.num_heads * seq_len * (4 + item_bytes)
    if context_ways > 1:
        # Rows in parts keep no softmax, but its sums over the keys so far, in float32: those of the
        # queries, and what a block of keys adds to them. Or they have the row's keys and values.
        sums_bytes = 2 * 4 * model.num_heads * model.head_dim
        row_bytes = 2 * item_bytes * model.num_kv_heads * model.head_dim * context_ways
        attention_bytes = max(sums_bytes, row_bytes)
    layer_bytes = item_bytes * (product_numbers + between_numbers) + attention_bytes
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
        # Nothing is made again.
        recomputed_bytes = 0.0
    else:
        # The input of a layer is kept, and one layer at a time is there whole.
        kept_bytes = item_bytes * embed
        recomputed_bytes = layer_bytes
    if model.remat == "dots":
        kept_bytes += item_bytes * product_numbers
    # The logits in float32, and their gradient, of one piece of the row at a time.
    vocab_bytes = 2 * 4 * model.padded_vocab / model.loss_chunks
    per_token = model.num_layers * kept_bytes + recomputed_bytes + vocab_bytes
    return seq_len * per_token / (tensor_ways * context_ways)


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
