"""Silent corruption: copies of a parameter on different devices must be the same bits.

Each device adds up its own bits as 32-bit integers, so any one flipped bit changes the sum, and the sums of the devices
that hold the same part are compared. One pass over the parameters; a few integers a device cross the mesh.
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


def make_replica_check(mesh: Mesh, abstract: Any) -> Callable[[Any], None]:
    """Return a check of a tree laid out as `abstract`; it raises NumericError naming devices whose copies differ."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    specs = tuple(leaf.sharding.spec for _, leaf in leaves)
    add_up = jax.shard_map(lambda *parts: jnp.stack([_sum_bits(part) for part in parts])[None, None, None],
                           mesh=mesh, in_specs=specs, out_specs=PartitionSpec(*AXES), check_vma=False)  # fmt: skip
    sums_of = jax.jit(add_up, out_shardings=replicated(mesh))

    def check(tree: Any) -> None:
        sums, found = np.asarray(sums_of(*jax.tree.leaves(tree))), dict[jax.Device, str]()
        for number, (path, leaf) in enumerate(leaves):
            parts = leaf.sharding.devices_indices_map(leaf.shape)
            copies: dict[str, list] = {}
            for place, device in np.ndenumerate(mesh.devices):
                copies.setdefault(str(parts[device]), []).append((device, int(sums[(*place, number)])))
            for group in copies.values():
                most = Counter(value for _, value in group).most_common(1)[0]
                for device, value in group:
                    if value != most[0] or most[1] * 2 <= len(group) > 1:
                        found.setdefault(device, f"{device} ({jax.tree_util.keystr(path)})")
        if found:
            where = ", ".join(list(found.values())[:4])
            raise NumericError(f"a copy of the parameters is corrupt on {where}; go on without that device.")

    return check


def _sum_bits(part: jax.Array) -> jax.Array:
    width = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[part.dtype.itemsize]
    return jnp.sum(jax.lax.bitcast_convert_type(part, width).astype(jnp.uint32), dtype=jnp.uint32)
