"""Parameters and what is made from them lie in the same place."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.core.placement import place_parameters


def test_a_moment_lies_where_its_parameter_lies_and_a_counter_everywhere():
    kernel = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    # An optimizer may keep something of another shape under the path of a parameter.
    rows = jax.ShapeDtypeStruct((16,), jnp.float32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    params = {"mlp": {"kernel": kernel}}
    tree = {
        "params": params,
        "opt_state": [{"mu": params, "rows": {"mlp": {"kernel": rows}}, "count": count}],
    }
    mesh = make_mesh(MeshConfig(data=4, model=2))
    placed = place_parameters(tree, {"mlp/kernel": ("embed", "mlp")}, mesh, fsdp=True)
    optimizer = placed["opt_state"][0]

    split = PartitionSpec("data", "model")
    assert placed["params"]["mlp"]["kernel"].sharding.spec == split
    assert optimizer["mu"]["mlp"]["kernel"].sharding.spec == split
    assert optimizer["rows"]["mlp"]["kernel"].sharding.spec == PartitionSpec()
    assert optimizer["count"].sharding.spec == PartitionSpec()

    wanted = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), placed) == wanted
