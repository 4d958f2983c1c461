"""Silent data corruption: copies of a parameter on several devices must be the same bits.

A chip that computes or stores wrongly without an error spoils a run unseen. Devices that hold the
same part of a parameter give a check for almost nothing: each adds up the bits of its part as
32-bit integers, so that any one flipped bit changes the sum, and the sums are compared. It costs
one pass over the parameters; a few integers a device cross the mesh.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from tinylm.core.errors import NumericError
from tinylm.core.mesh import AXES, replicated
from tinylm.core.text import path_text

# Devices in an error.
_MOST_NAMED = 4


def make_replica_check(mesh: Mesh, abstract: Any) -> Callable[[Any], None]:
    """Return a check of a tree of arrays that are laid out on `mesh` as `abstract` says.

    The check raises NumericError naming the devices whose copies differ from most others. Of two
    copies nobody can say which one is right, so both are named.
    """
    leaves = jax.tree_util.tree_leaves_with_path(abstract)

    def sums_on_device(*parts: jax.Array) -> jax.Array:
        sums = jnp.stack([_sum_of_bits(part) for part in parts])
        # One leading axis for each axis of the mesh, which the devices lie along.
        return sums[(None,) * len(AXES)]

    add_up = jax.shard_map(
        sums_on_device,
        mesh=mesh,
        in_specs=tuple(leaf.sharding.spec for _, leaf in leaves),
        out_specs=PartitionSpec(*AXES),
        check_vma=False,
    )
    sums_of = jax.jit(add_up, out_shardings=replicated(mesh))

    def check(tree: Any) -> None:
        # Shaped like the mesh, with one more axis, of the leaves.
        sums = np.asarray(sums_of(*jax.tree.leaves(tree)))
        # For each device the first of its leaves that differs.
        corrupt: dict[jax.Device, str] = {}
        for number, (path, leaf) in enumerate(leaves):
            differing = _differing_devices(mesh, leaf, sums[..., number])
            for device in differing:
                corrupt.setdefault(device, f"{device} ({path_text(path)})")
        if corrupt:
            lines = list(corrupt.values())
            named = ", ".join(lines[:_MOST_NAMED])
            raise NumericError(
                f"a copy of the parameters is corrupt on {named}; go on without that device."
            )

    return check


def _differing_devices(
    mesh: Mesh, leaf: jax.ShapeDtypeStruct, sums: np.ndarray
) -> list[jax.Device]:
    """Return the devices whose copy of a part of a leaf is not that of most devices with it.

    Args:
      mesh: the devices.
      leaf: one parameter, with its sharding.
      sums: of the bits that each device holds of it, shaped like the mesh.
    """
    part_of = leaf.sharding.devices_indices_map(leaf.shape)
    # The copies of each part: a device with its sum. A slice has no hash, so its text is the key.
    copies: dict[str, list[tuple[jax.Device, int]]] = {}
    for place, device in np.ndenumerate(mesh.devices):
        part = str(part_of[device])
        copies.setdefault(part, []).append((device, int(sums[place])))

    differing = []
    for group in copies.values():
        counts = Counter(copy_sum for _, copy_sum in group)
        common_sum, count = counts.most_common(1)[0]
        has_majority = 2 * count > len(group)
        for device, copy_sum in group:
            if copy_sum != common_sum or not has_majority:
                differing.append(device)
    return differing


def _sum_of_bits(part: jax.Array) -> jax.Array:
    """Return the sum of an array's elements, taken as unsigned integers, modulo 2^32."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[part.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(part, unsigned)
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)
