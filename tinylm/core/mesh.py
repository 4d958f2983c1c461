"""The device mesh, and the one table that maps logical axes onto it.

The mesh has four axes: `replica` (data parallelism between slices), `data` (the batch and, with
fsdp, parameters and optimizer state), `context` (the positions of a row) and `model` (heads, mlp,
vocabulary). Only core/ knows these names: parameters and activations name *logical* axes, and the
tables below decide. Each mesh axis takes the first logical axis of its line that the array has and
whose size it divides; where it divides none, the array stays whole along it, so every model runs on
every mesh.

An example: the weights of an MLP, axes (embed, mlp), shape 512 x 1365, with mesh.fsdp on a mesh of
replica 2, data 4, context 1, model 2:

    model 2:   heads, kv_heads: not there; mlp: 2 does not divide 1365; vocab: not there -> whole
    data 4:    embed: 4 divides 512                                                 -> splits embed
    replica 2: workers: not there                                                   -> whole
    context 1: splits no parameter                                                  -> whole

    PartitionSpec("data", None): each device holds 128 x 1365; four parts, each on four devices

With 1366 in place of 1365 `model` would split mlp: PartitionSpec("data", "model"), 128 x 683.

`collectives` has what is computed by hand on the parts, `placement` says in words what the table
came to for a parameter.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tinylm.core.errors import UserError
from tinylm.core.settings import Section, setting

T = TypeVar("T")
Axes = Sequence[str | None]  # the logical axis of each dimension of an array


class PerAxis(NamedTuple, Generic[T]):
    """One value for each axis of the mesh, in their order."""

    replica: T
    data: T
    context: T
    model: T


AXES = PerAxis("replica", "data", "context", "model")

# For each mesh axis, the logical axes that it may split, in order of preference.
PARAMETER_RULES = {
    # Copies of the parameters that are trained apart from each other (train.workers).
    AXES.replica: ("workers",),
    AXES.model: ("heads", "kv_heads", "mlp", "vocab"),
    # With mesh.fsdp alone.
    AXES.data: ("experts", "embed", "mlp", "vocab", "heads", "kv_heads", "head_dim"),
}
ACTIVATION_RULES = {
    AXES.replica: ("batch",),
    AXES.data: ("batch",),
    # `positions` are those of a row where each is needed for a product with a parameter, `seq` are
    # those between two such products, where `model` may split them further.
    AXES.context: ("positions", "seq"),
    AXES.model: ("heads", "kv_heads", "mlp", "vocab", "seq"),
}
# The logical axes that several mesh axes may split; any other takes one.
_SHARED = ("batch", "seq")


@dataclasses.dataclass
class MeshConfig(Section, name="mesh"):
    """How many devices each mesh axis has; one of them may be -1: all that is left."""

    replica: int = setting(
        1,
        "data-parallel groups between slices; one all-reduce a step crosses it",
        free=True,
        least=1,
        also=(-1,),
        aliases=("dcn_data_parallelism", "num_slices", "data_parallel_replicate_degree"),
    )
    data: int = setting(
        -1,
        "devices that split the batch (-1: all that are left)",
        free=True,
        least=1,
        also=(-1,),
        aliases=(
            "ici_data_parallelism",
            "ici_fsdp_parallelism",
            "data_parallel_size",
            "data_parallel_shard_degree",
        ),
    )
    context: int = setting(
        1,
        "devices that split the positions of each row, for rows too long for one",
        free=True,
        least=1,
        also=(-1,),
        aliases=(
            "ici_context_parallelism",
            "ici_sequence_parallelism",
            "context_parallel_degree",
            "context_parallel_size",
        ),
    )
    model: int = setting(
        1,
        "devices that split heads, mlp and vocabulary",
        free=True,
        least=1,
        also=(-1,),
        aliases=("ici_tensor_parallelism", "tensor_parallel_degree", "tensor_parallel_size"),
    )
    fsdp: bool = setting(
        False, "split parameters and optimizer state over the data axis too", free=True
    )

    def sizes(self, num_devices: int) -> PerAxis[int]:
        """Return the size of each axis, with -1 filled in.

        Raises UserError where they don't fit `num_devices`.
        """
        self.check_bounds()
        sizes = {
            AXES.replica: self.replica,
            AXES.data: self.data,
            AXES.context: self.context,
            AXES.model: self.model,
        }
        open_axes = [name for name, size in sizes.items() if size == -1]
        if len(open_axes) > 1:
            raise UserError(
                f"mesh.{open_axes[0]} and mesh.{open_axes[1]} are both -1; only one axis can take "
                "what is left."
            )
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if open_axes:
            if num_devices % fixed:
                raise UserError(
                    f"mesh.{open_axes[0]}=-1 cannot be filled: {num_devices} devices are not "
                    f"divisible by {fixed}; change the other mesh sizes or --cpu_devices."
                )
            sizes[open_axes[0]] = num_devices // fixed
        elif fixed > num_devices:
            raise UserError(
                f"the mesh of {fixed} devices ({' x '.join(f'mesh.{name}' for name in AXES)}) is "
                f"larger than the {num_devices} devices here; make the mesh smaller, or give the "
                f"job {fixed} devices (--cpu_devices simulates them)."
            )
        return PerAxis(**sizes)

    def check(self) -> None:
        """Raise UserError for sizes that no number of devices could satisfy."""
        all_sizes = (self.replica, self.data, self.context, self.model)
        given = [size for size in all_sizes if size > 0]
        self.sizes(math.prod(given))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh over `devices` (default: all).

    Axes are Auto: the partitioner places what is not constrained. A single process may ask for
    fewer devices than there are, and gets the first ones. Raises UserError where the mesh doesn't
    fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    needed = math.prod(sizes)
    if needed < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"the mesh of {needed} devices is smaller than the {len(devices)} devices of this job; "
            "set mesh.data=-1 or start fewer processes."
        )
    slices = _slices(devices[:needed])
    if sizes.replica % len(slices):
        raise UserError(
            f"mesh.replica={sizes.replica} must be a multiple of the {len(slices)} slices; set it "
            f"to {len(slices)}."
        )
    # Replicas lie one behind the other, so that only they cross between slices.
    slice_sizes = sizes._replace(replica=sizes.replica // len(slices))
    parts = [_arranged(slice_sizes, slice_devices) for slice_devices in slices]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(sizes: Sequence[int], devices: list[jax.Device]) -> np.ndarray:
    """Return the devices as an array whose axes follow the links between chips, as far as that is
    possible.
    """
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:
        # An axis of the mesh is only a part of an axis of the torus.
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _slices(devices: list[jax.Device]) -> list[list[jax.Device]]:
    """Return the devices of each slice: those that fast links join.

    Only TPUs have slices. XLA gives the devices of each GPU host a `slice_index` of their own, too,
    which says nothing about how a mesh may lie on them: any axis may span hosts.
    """
    if devices[0].platform != "tpu":
        return [devices]
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    return [slices[index] for index in sorted(slices)]


def crosses_slices(mesh: Mesh, axis: str) -> bool:
    """Say whether what is sent along a mesh axis, or along several ("replica+data"), leaves a slice
    of TPUs, or a machine of GPUs.
    """
    devices = list(mesh.devices.flat)
    is_one_slice = devices[0].platform == "tpu" and len(_slices(devices)) == 1
    return AXES.replica in axis and not is_one_slice


def mesh_sizes(mesh: Mesh) -> PerAxis[int]:
    """Return the number of devices along each axis."""
    return PerAxis(*(mesh.shape[name] for name in AXES))


def sizes_by_name(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Return the number of devices along each axis by its name, for people to read."""
    return {name: mesh.shape[name] for name in AXES}


def axes_spanned(mesh: Mesh, devices: np.ndarray) -> list[str]:
    """Return the axes along which some devices, given by their numbers in the mesh, differ."""
    coordinates = PerAxis(*np.unravel_index(devices, mesh.devices.shape))
    spanned = []
    for name, along_axis in zip(AXES, coordinates, strict=True):
        if len(set(along_axis.tolist())) > 1:
            spanned.append(name)
    return spanned


def batch_shards(mesh: Mesh) -> int:
    """Return into how many parts the mesh splits the batch."""
    sizes = mesh_sizes(mesh)
    return sizes.replica * sizes.data


def parameter_rules(fsdp: bool) -> dict[str, tuple[str, ...]]:
    """Return the table for parameters, where only fsdp lets the data axis split them."""
    if fsdp:
        return PARAMETER_RULES
    return {axis: rules for axis, rules in PARAMETER_RULES.items() if axis != AXES.data}


def parameter_sharding(
    mesh: Mesh | AbstractMesh, fsdp: bool, axes: Axes, shape: Sequence[int]
) -> NamedSharding:
    """Return where a parameter with logical `axes` and `shape` lives on the mesh."""
    rules = parameter_rules(fsdp)
    if "workers" in axes:
        # A run may go on with a number of replicas that doesn't divide the workers that it saved.
        # While it makes new workers of these, each replica holds a part of every old one.
        rules = {**rules, AXES.replica: ("workers", *PARAMETER_RULES[AXES.data])}
    return NamedSharding(mesh, _assign(rules, mesh.shape, axes, shape))


def activation_sharding(mesh: Mesh, axes: Axes, shape: Sequence[int]) -> NamedSharding:
    """Return where an activation (or a batch) with logical `axes` and `shape` lives on the mesh."""
    return NamedSharding(mesh, _assign(ACTIVATION_RULES, mesh.shape, axes, shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def _assign(
    rules: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    axes: Axes,
    shape: Sequence[int],
) -> PartitionSpec:
    """Give each mesh axis to the first logical axis that it may split and divides.

    Args:
      rules: for each mesh axis, the logical axes that it may split.
      sizes: of the mesh axes; one of size 1 splits nothing.
      axes: the logical axis of each dimension, None for one that is never split.
      shape: the size of each dimension.
    """
    split_by: list[list[str]] = [[] for _ in axes]
    for mesh_axis, candidates in rules.items():
        if sizes[mesh_axis] == 1:
            continue
        for name in candidates:
            if name not in axes:
                continue
            dim = list(axes).index(name)
            if split_by[dim] and name not in _SHARED:
                continue
            parts = sizes[mesh_axis] * math.prod(sizes[other] for other in split_by[dim])
            if shape[dim] % parts == 0:
                split_by[dim].append(mesh_axis)
                break

    entries: list[str | tuple[str, ...] | None] = []
    for mesh_axes in split_by:
        if not mesh_axes:
            entries.append(None)
        elif len(mesh_axes) == 1:
            entries.append(mesh_axes[0])
        else:
            entries.append(tuple(mesh_axes))
    return PartitionSpec(*entries)


def axes_that_split(spec: PartitionSpec | tuple) -> tuple[str, ...]:
    """Return the axes of the mesh that split some dimension of a PartitionSpec, or of a part of
    one.
    """
    axes: list[str] = []
    for entry in spec:
        axes += [entry] if isinstance(entry, str) else list(entry or ())
    return tuple(axes)


def sizes_in_use() -> dict[str, int]:
    """Return the sizes of the axes of the mesh in use; 1 for those that are split by hand here."""
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] if name in mesh.auto_axes else 1 for name in AXES}


def activation_spec(x: jax.Array | jax.ShapeDtypeStruct, axes: Axes) -> PartitionSpec:
    """Return how an activation with logical `axes` is split over the mesh in use.

    Where some mesh axes are split by hand (`collectives.sum_over_rows`), `x` is one device's part
    along them, and the others may split it further.
    """
    return _assign(ACTIVATION_RULES, sizes_in_use(), axes, x.shape)


def parameter_spec(x: jax.Array, axes: Axes) -> PartitionSpec:
    """Return how mesh.fsdp splits a parameter with logical `axes` over the mesh in use."""
    return _assign(PARAMETER_RULES, sizes_in_use(), axes, x.shape)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the place of its logical `axes` on the mesh in use.

    On one device, or without a mesh, this returns it as it is.
    """
    if max(sizes_in_use().values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x, axes))


def target_platform() -> str:
    """Return what the mesh in use is made of: cpu, gpu or tpu.

    Its devices may not be here, where a program is compiled for others. Without a mesh it is the
    default of this machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    return device.platform
