"""What is done by hand on the parts of arrays, where the partitioner would do worse.

XLA's partitioner places almost everything from the few constraints of `mesh`. These functions take
an axis out of its hands with `shard_map`: the body sees one device's part and says itself what
crosses the mesh. docs/scaling.md has what each saves.

With the letters of model/ (B rows, T positions, V vocabulary, D embedding).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tinylm.core.mesh import (
    AXES,
    Axes,
    activation_spec,
    axes_that_split,
    constrain,
    parameter_spec,
    sizes_in_use,
)
from tinylm.core.text import path_text

R = TypeVar("R")

# How replicas hold an array: whole, by workers along its first axis, or by rows along its second.
EVERYWHERE = PartitionSpec()
BY_WORKERS = PartitionSpec(AXES.replica)
BY_ROWS = PartitionSpec(None, AXES.replica)

# Kernels written in Pallas don't pass shard_map's check of what differs along which axis.
shard_map = functools.partial(jax.shard_map, check_vma=False)


def axes_of_partitioner() -> set[str]:
    """Return the axes of the mesh in use that are not split by hand here."""
    return set(jax.sharding.get_abstract_mesh().auto_axes)


def _axes_by_hand(split_axes: tuple[str, ...]) -> set[str]:
    """Return the axes that a shard_map over `split_axes` takes from the partitioner.

    Axes of size 1 are among them: nothing is left to place along them.
    """
    sizes = sizes_in_use()
    return {axis for axis in axes_of_partitioner() if axis in split_axes or sizes[axis] == 1}


def is_partly_manual() -> bool:
    """Say whether some axes of the mesh in use are split by hand here (`sum_over_rows`), and others
    are not.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return bool(manual) and max(sizes_in_use().values()) > 1


def sum_over_rows(function: Callable[..., R], whole: tuple, by_rows: Any, fsdp: bool) -> R:
    """Return `function(*whole, *by_rows)`, which is a sum over rows.

    Each device adds up its own rows, and all sums meet once, at the end; the partitioner would
    communicate in each micro-batch. Only the other axes of the mesh are left to it. With fsdp no
    device has room for whole sums, so then only replicas are split by hand.

    Args:
      function: returns a tree of sums.
      whole: arguments that every device has whole, or split along the axes left to the partitioner.
      by_rows: trees of arrays [A, rows, ...], split by rows.
      fsdp: whether parameters are split over the data axis.
    """
    sizes = sizes_in_use()
    candidates = (AXES.replica,) if fsdp else (AXES.replica, AXES.data)
    split_axes = tuple(axis for axis in candidates if sizes[axis] > 1)
    if not split_axes:
        return function(*whole, *by_rows)

    def sum_on_device(whole: tuple, by_rows: Any) -> R:
        return jax.lax.psum(function(*whole, *by_rows), split_axes)

    rows_split = PartitionSpec(None, split_axes)
    on_mesh = shard_map(
        sum_on_device,
        in_specs=(EVERYWHERE, rows_split),
        out_specs=EVERYWHERE,
        axis_names=_axes_by_hand(split_axes),
    )
    return on_mesh(whole, by_rows)


def sum_with_whole(
    function: Callable[..., R],
    matrix: jax.Array,
    axes: tuple[str | None, ...],
    by_rows: tuple,
    sent_as: Any,
) -> R:
    """Return `function(matrix, *by_rows)`, a sum over rows in which a loop reads the matrix.

    The partitioner would gather a parameter that mesh.fsdp splits, and sum its gradients over the
    devices, in each trip of the loop. Here it is gathered once before, and its gradients are summed
    once after.

    Args:
      function: returns a tree of sums.
      matrix: the parameter.
      axes: its logical axes.
      by_rows: trees of arrays [P, rows, positions, ...], split by both.
      sent_as: the type in which the matrix is gathered; its gradients are sent in its own.
    """
    some_rows = jax.tree.leaves(by_rows)[0]
    rows_spec = activation_spec(some_rows, (None, "batch", "positions"))
    split_axes = axes_that_split(rows_spec)
    # Where an axis doesn't divide the rows, each device has all of them.
    if AXES.data not in split_axes and AXES.context not in split_axes:
        return function(matrix, *by_rows)

    # Where the axis divides no dimension, the matrix is whole already.
    spec = parameter_spec(matrix, axes)
    is_gathered = AXES.data in spec and AXES.data in split_axes
    split_dim = spec.index(AXES.data) if is_gathered else None

    @jax.custom_vjp
    def whole(part: jax.Array) -> jax.Array:
        if split_dim is None:
            return part
        sent = part.astype(sent_as)
        gathered = jax.lax.all_gather(sent, AXES.data, axis=split_dim, tiled=True)
        return gathered.astype(part.dtype)

    def forward(part: jax.Array) -> tuple[jax.Array, None]:
        return whole(part), None

    def backward(_: None, gradient: jax.Array) -> tuple[jax.Array]:
        if split_dim is None:
            return (gradient,)
        summed = jax.lax.psum_scatter(gradient, AXES.data, scatter_dimension=split_dim, tiled=True)
        return (summed,)

    whole.defvjp(forward, backward)

    def sum_on_device(part: jax.Array, by_rows: tuple) -> R:
        return jax.lax.psum(function(whole(part), *by_rows), split_axes)

    # The partitioner keeps its own axes of the matrix.
    part_spec = PartitionSpec(
        *(AXES.data if dim == split_dim else None for dim in range(matrix.ndim))
    )
    on_mesh = shard_map(
        sum_on_device,
        in_specs=(part_spec, rows_spec),
        out_specs=EVERYWHERE,
        axis_names=_axes_by_hand(split_axes),
    )
    return on_mesh(matrix, by_rows)


def on_shards(function: Callable[..., jax.Array], *parts: tuple[jax.Array, Axes]) -> jax.Array:
    """Call `function` on each device's own part of the arrays.

    Args:
      function: of one argument a part, such as a kernel that the partitioner can't split.
      *parts: (array, its logical axes).

    Returns:
      Its result, split as the first array is.
    """
    arrays = [x for x, _ in parts]
    if max(sizes_in_use().values()) == 1:
        return function(*arrays)
    specs = tuple(activation_spec(x, axes) for x, axes in parts)
    on_mesh = shard_map(
        function, in_specs=specs, out_specs=specs[0], axis_names=axes_of_partitioner()
    )
    return on_mesh(*arrays)


def in_each_replica(
    function: Callable[..., R], takes: Any = EVERYWHERE, gives: Any = EVERYWHERE
) -> Callable[..., R]:
    """Return `function` computed in each replica on its own part; nothing crosses between them but
    what `sum_over_replicas` sends.

    The partitioner may share out the work of the optimizer among the replicas and gather the
    results.

    Args:
      function: of arrays.
      takes: for each argument, or for each part of its tree, how replicas hold it: `EVERYWHERE` all
        of it, `BY_WORKERS` their own workers along its first axis, `BY_ROWS` their own rows along
        its second.
      gives: the same of what it returns.
    """
    if sizes_in_use()[AXES.replica] == 1:
        return function
    return shard_map(
        function,
        in_specs=takes,
        out_specs=gives,
        axis_names=_axes_by_hand((AXES.replica,)),
    )


def sum_over_replicas(tree: R) -> R:
    """Return the sums of a tree's arrays over all replicas, in a function of `in_each_replica`."""
    # With a single replica there is nothing to add, and its axis isn't split by hand.
    if AXES.replica not in jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    return jax.lax.psum(tree, AXES.replica)


def sum_parameters_over_replicas(tree: dict, axes: Mapping[str, Axes], fsdp: bool) -> dict:
    """Return the sums of parameters over all replicas, in a function of `in_each_replica`.

    Where all devices of the data axis hold whole parameters, each sends the part that it would have
    with fsdp, and they gather the sums: so no more crosses the slow links between replicas than if
    a replica were one device.

    Args:
      tree: of parameters, or of what is made of them.
      axes: the logical axes of each by its path.
      fsdp: whether the data axis splits parameters.
    """
    num_parts = sizes_in_use()[AXES.data]
    if fsdp or num_parts == 1:
        return sum_over_replicas(tree)

    def sum_one(path: tuple, x: jax.Array) -> jax.Array:
        spec = parameter_spec(x, axes[path_text(path)])
        if AXES.data not in spec:
            return sum_over_replicas(x)
        dim = spec.index(AXES.data)

        def sum_by_parts(x: jax.Array) -> jax.Array:
            size = x.shape[dim] // num_parts
            first = jax.lax.axis_index(AXES.data) * size
            part = jax.lax.dynamic_slice_in_dim(x, first, size, dim)
            return jax.lax.all_gather(sum_over_replicas(part), AXES.data, axis=dim, tiled=True)

        on_mesh = shard_map(
            sum_by_parts,
            in_specs=EVERYWHERE,
            out_specs=EVERYWHERE,
            axis_names=_axes_by_hand((AXES.data,)),
        )
        return on_mesh(x)

    return jax.tree_util.tree_map_with_path(sum_one, tree)


def look_up(table_VD: jax.Array, ids_BT: jax.Array, sent_as: Any) -> jax.Array:
    """Return the rows `ids_BT` of a table as x_BTD, laid out as a batch of sequences.

    Where the table is split by vocabulary, each device finds the ids that it has, and they meet in
    the type `sent_as` (Shoeybi et al. 2019, section 3): the partitioner would move rows, and
    float32 gradients, over all axes.
    """
    vocab_axis = activation_spec(table_VD, ("vocab", None))[0]
    if vocab_axis is None:
        # XLA's partitioner aborts the process where an axis is split by hand, and it has to place a
        # lookup in a table split by embedding (fsdp) of ids split by position ("partition_group_
        # list", jaxlib 0.10.2). So the table is gathered first, as the output matrix is.
        if is_partly_manual() and sizes_in_use()[AXES.context] > 1:
            table_VD = constrain(table_VD, None, None)
        return table_VD[ids_BT]
    # The embedding stays whole, so its size doesn't matter.
    some_BT1 = jax.ShapeDtypeStruct((*ids_BT.shape, 1), sent_as)
    out_spec = activation_spec(some_BT1, ("batch", "seq", None))
    splits_seq = vocab_axis in axes_that_split(out_spec[1:2])

    def look_up_here(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        # Each device has V rows of the table, from this one on.
        size = len(table_VD)
        first_id = jax.lax.axis_index(vocab_axis) * size
        local_BT = ids_BT - first_id
        here_BT = (local_BT >= 0) & (local_BT < size)
        # In float32, so that the gradients of a row add up in it.
        rows_BTD = table_VD.astype(jnp.float32)[local_BT % size]
        x_BTD = jnp.where(here_BT[..., None], rows_BTD, 0).astype(sent_as)
        # One device has the row, the others 0: the sum is exact.
        if splits_seq:
            return jax.lax.psum_scatter(x_BTD, vocab_axis, scatter_dimension=1, tiled=True)
        return jax.lax.psum(x_BTD, vocab_axis)

    table_spec = PartitionSpec(vocab_axis)
    ids_spec = activation_spec(ids_BT, ("batch", "positions"))
    on_mesh = shard_map(
        look_up_here,
        in_specs=(table_spec, ids_spec),
        out_specs=out_spec,
        axis_names=axes_of_partitioner(),
    )
    x_BTD = on_mesh(table_VD.astype(sent_as), ids_BT)
    return x_BTD.astype(table_VD.dtype)
