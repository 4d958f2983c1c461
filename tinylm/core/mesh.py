"""The device mesh, and the one table that maps logical axes onto it.

The mesh has three axes: `replica` (data parallelism between slices), `data` (the batch and, with
fsdp, parameters and optimizer state) and `model` (heads, mlp, vocabulary). No other module knows
these names: parameters and activations name *logical* axes, and this table decides. A dimension
that a mesh axis does not divide is left whole, and for fsdp the next dimension of the same
parameter is tried, so every model runs on every mesh.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tinylm.core.errors import UserError
from tinylm.core.settings import Section, setting

T = TypeVar("T")


class PerAxis(NamedTuple, Generic[T]):
    """One value for each axis of the mesh, in their order."""

    replica: T
    data: T
    model: T


AXES = PerAxis("replica", "data", "model")
_shard_map = functools.partial(jax.shard_map, check_vma=False)

# For each mesh axis, the logical axes that it may split, in order of preference.
PARAMETER_RULES = {
    "model": ("heads", "kv_heads", "mlp", "vocab"),
    "data": ("embed", "mlp", "vocab", "heads", "kv_heads", "head_dim"),  # with mesh.fsdp alone
}
ACTIVATION_RULES = {
    "replica": ("batch",),
    "data": ("batch",),
    "model": ("heads", "kv_heads", "mlp", "vocab", "seq"),
}


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

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """Return the axis sizes with -1 filled in; raise UserError where they don't fit
        `num_devices`.
        """
        self.check_bounds()
        sizes = {"replica": self.replica, "data": self.data, "model": self.model}
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise UserError(
                f"mesh.{free[0]} and mesh.{free[1]} are both -1; only one axis can take "
                "what is left."
            )
        fixed = int(np.prod([size for size in sizes.values() if size != -1]))
        if free:
            if num_devices % fixed:
                raise UserError(
                    f"mesh.{free[0]}=-1 cannot be filled: {num_devices} devices are not "
                    f"divisible by {fixed}; "
                    "change the other mesh sizes or --cpu_devices."
                )
            sizes[free[0]] = num_devices // fixed
        elif fixed > num_devices:
            raise UserError(
                f"the mesh of {fixed} devices (mesh.replica x mesh.data x mesh.model) is "
                "larger than the "
                f"{num_devices} devices here; make the mesh smaller, or give the job "
                f"{fixed} devices "
                "(--cpu_devices simulates them)."
            )
        return sizes["replica"], sizes["data"], sizes["model"]

    def check(self) -> None:
        """Raise UserError for sizes that no number of devices could satisfy."""
        self.sizes(
            max(
                1,
                int(np.prod([size for size in (self.replica, self.data, self.model) if size > 0])),
            )
        )


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh over `devices` (default: all; the first ones where a single process asks for
    fewer).

    Axes are Auto: the partitioner places what is not constrained. Raises UserError where the mesh
    doesn't fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    needed = int(np.prod(sizes))
    if needed < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"the mesh of {needed} devices is smaller than the {len(devices)} devices of this job; "
            "set mesh.data=-1 or start fewer processes."
        )
    slices = _slices(devices[:needed])
    if sizes[0] % len(slices):
        raise UserError(
            f"mesh.replica={sizes[0]} must be a multiple of the {len(slices)} slices; set "
            f"it to {len(slices)}."
        )
    parts = [_arranged((sizes[0] // len(slices), *sizes[1:]), one) for one in slices]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(sizes: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Return the devices as an array whose axes follow the links between chips, as far as that is
    possible.
    """
    try:
        return mesh_utils.create_device_mesh(sizes, devices)
    except NotImplementedError:  # an axis is only a part of one of the torus
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def _slices(devices: list[jax.Device]) -> list[list[jax.Device]]:
    """Return the devices of each slice: those that fast links join; one list where the platform
    knows no slices.

    Slices are TPUs' alone. XLA gives the devices of each GPU host a `slice_index` of their own,
    too, which says nothing about how a mesh may lie on them: any axis may span hosts.
    """
    if devices[0].platform != "tpu":
        return [devices]
    slices: dict[int, list[jax.Device]] = {}
    for device in devices:
        slices.setdefault(getattr(device, "slice_index", 0), []).append(device)
    return [slices[index] for index in sorted(slices)]


def mesh_sizes(mesh: Mesh) -> PerAxis[int]:
    """Return the number of devices along each axis."""
    return PerAxis(*(mesh.shape[name] for name in AXES))


def batch_shards(mesh: Mesh) -> int:
    """Return into how many parts the mesh splits the batch."""
    return mesh.shape["replica"] * mesh.shape["data"]


def _assign(
    rules: dict[str, tuple[str, ...]],
    mesh_shape: Any,
    axes: Sequence[str | None],
    shape: Sequence[int],
):
    """Give each mesh axis to the first logical axis that it may split and divides; return a
    PartitionSpec.
    """
    taken: list[list[str]] = [[] for _ in axes]
    for mesh_axis, candidates in rules.items():
        size = mesh_shape[mesh_axis]
        for name in candidates:
            if size == 1 or name not in axes:
                continue
            dim = list(axes).index(name)
            parts = int(np.prod([mesh_shape[a] for a in taken[dim]], dtype=int)) * size
            shareable = name == "batch" or not taken[dim]
            if shareable and shape[dim] % parts == 0:
                taken[dim].append(mesh_axis)
                break
    return PartitionSpec(*[tuple(t) if len(t) > 1 else (t[0] if t else None) for t in taken])


def parameter_sharding(
    mesh: Mesh, fsdp: bool, axes: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding:
    """Return where a parameter with logical `axes` and `shape` lives on the mesh."""
    rules = {name: rule for name, rule in PARAMETER_RULES.items() if fsdp or name != "data"}
    return NamedSharding(mesh, _assign(rules, mesh.shape, axes, shape))


def activation_sharding(
    mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]
) -> NamedSharding:
    """Return where an activation (or a batch) with logical `axes` and `shape` lives on the mesh."""
    return NamedSharding(mesh, _assign(ACTIVATION_RULES, mesh.shape, axes, shape))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Pin an activation to the layout of its logical `axes` under the mesh in use; without a mesh,
    return it as is.
    """
    return jax.lax.with_sharding_constraint(x, layout(x, axes)) if max(_sizes().values()) > 1 else x


def layout(x: jax.Array | jax.ShapeDtypeStruct, axes: Sequence[str | None]) -> PartitionSpec:
    """Return how an activation with logical `axes`, or one device's rows of it, is split over the
    mesh in use.
    """
    return _assign(ACTIVATION_RULES, _sizes(), axes, x.shape)


def _sizes() -> dict[str, int]:
    """Return the sizes of the axes of the mesh in use; 1 for those that `sum_over_rows` has split
    by hand.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return {name: mesh.shape[name] if name in mesh.auto_axes else 1 for name in AXES}


def is_partly_manual() -> bool:
    """Say whether some axes of the mesh in use are split by hand here (`sum_over_rows`), and others
    are not.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return bool(manual) and max(_sizes().values()) > 1


def sum_over_rows(function: Callable, whole: tuple, by_rows: Any, fsdp: bool) -> Any:
    """Return `function(*whole, *by_rows)`, a sum over the rows (dimension 1) of the arrays of
    `by_rows`.

    Each device adds up its own rows, and all sums meet once, at the end; the partitioner would
    communicate in each micro-batch. Only the other axes of the mesh are left to it. With fsdp no
    device has room for whole sums, so that this holds between replicas alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows = tuple(axis for axis in ("replica", "data")[: 1 if fsdp else 2] if _sizes()[axis] > 1)
    if not rows:
        return function(*whole, *by_rows)
    names = {axis for axis in AXES if axis in rows or mesh.shape[axis] == 1}

    def total(whole, by_rows):
        return jax.lax.psum(function(*whole, *by_rows), rows)

    specs = PartitionSpec(), PartitionSpec(None, rows)
    return _shard_map(total, in_specs=specs, out_specs=specs[0], axis_names=names)(whole, by_rows)


def on_shards(function: Callable, *parts: tuple[jax.Array, Sequence[str | None]]) -> jax.Array:
    """Call `function` on each device's own part of the arrays, given with their logical axes.

    Its result is laid out as the first of them.
    """
    arrays = [x for x, _ in parts]
    if max(_sizes().values()) == 1:
        return function(*arrays)
    specs = tuple(layout(x, axes) for x, axes in parts)
    names = set(jax.sharding.get_abstract_mesh().auto_axes)
    return _shard_map(function, in_specs=specs, out_specs=specs[0], axis_names=names)(*arrays)


def in_each_replica(function: Callable) -> Callable:
    """Return `function` of arrays that all replicas hold alike, computed in each: nothing crosses
    between slices.
    """
    if _sizes()["replica"] == 1:
        return function
    return _shard_map(
        function, in_specs=PartitionSpec(), out_specs=PartitionSpec(), axis_names={"replica"}
    )


def look_up(table_VD: jax.Array, ids_BT: jax.Array, sent_as: Any) -> jax.Array:
    """Return the rows `ids_BT` of a table as x_BTD, laid out as a batch of sequences.

    Where the table is split by vocabulary, each device finds the ids that it has, and they meet in
    the type `sent_as` (Shoeybi et al. 2019, section 3): the partitioner would move rows, and
    float32 gradients, over all axes.
    """
    split = layout(table_VD, ("vocab", None))[0]
    if split is None:
        return table_VD[ids_BT]
    out = layout(jax.ShapeDtypeStruct((*ids_BT.shape, 1), sent_as), ("batch", "seq", None))

    def own(table_VD, ids_BT):
        size, ids_BT = len(table_VD), ids_BT - jax.lax.axis_index(split) * len(table_VD)
        here_BT1 = ((ids_BT >= 0) & (ids_BT < size))[..., None]
        rows_BTD = table_VD.astype(jnp.float32)[
            ids_BT % size
        ]  # so that the gradients of a row add up in float32
        x_BTD = jnp.where(here_BT1, rows_BTD, 0).astype(sent_as)
        if not out[1]:
            return jax.lax.psum(x_BTD, split)
        return jax.lax.psum_scatter(x_BTD, split, scatter_dimension=1, tiled=True)

    specs = (PartitionSpec(split), layout(ids_BT, ("batch", None)))
    names = set(jax.sharding.get_abstract_mesh().auto_axes)
    find = _shard_map(own, in_specs=specs, out_specs=out, axis_names=names)
    return find(table_VD.astype(sent_as), ids_BT).astype(table_VD.dtype)


def target_platform() -> str:
    """Return what the mesh in use is made of (cpu, gpu, tpu), which may not be here, or the default
    of this machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def owned_rows(mesh: Mesh, num_rows: int) -> np.ndarray:
    """Return the sorted positions of a batch axis of `num_rows` that this process's devices
    hold.
    """
    sharding = activation_sharding(mesh, ("batch",), (num_rows,))
    slices = sharding.addressable_devices_indices_map((num_rows,)).values()
    return np.unique(np.concatenate([np.arange(num_rows)[index] for index in slices]))


def place_batch(
    mesh: Mesh, host: dict[str, np.ndarray], owned: np.ndarray, num_rows: int, batch_dim: int
) -> dict[str, jax.Array]:
    """Put host arrays that hold the `owned` rows of dimension `batch_dim` onto the mesh as global
    arrays.
    """

    def place(x: np.ndarray) -> jax.Array:
        shape = (*x.shape[:batch_dim], num_rows, *x.shape[batch_dim + 1 :])
        axes: list[str | None] = [None] * x.ndim
        axes[batch_dim] = "batch"
        sharding = activation_sharding(mesh, axes, shape)
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(shape, sharding, _reader(x, owned, num_rows, batch_dim))

    return {name: place(x) for name, x in host.items()}


def _reader(x: np.ndarray, owned: np.ndarray, num_rows: int, dim: int) -> Callable:
    """Return the callback that cuts one device's part out of the rows this process holds."""

    def read(index: tuple[slice, ...]) -> np.ndarray:
        rows = np.searchsorted(owned, np.arange(num_rows)[index[dim]])
        return np.take(x, rows, axis=dim)

    return read
