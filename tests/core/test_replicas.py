"""One flipped bit on one device is found, and the device named."""

import jax
import numpy as np
import pytest

from tinylm.core.errors import NumericError
from tinylm.core.mesh import MeshConfig, PerAxis, make_mesh, parameter_sharding
from tinylm.core.replicas import make_replica_check


def placed(mesh, flip_on=None, bit=0):
    """Return a tree with a whole and a split leaf; on the device `flip_on` one bit of the split one
    is another.
    """
    value = np.arange(64, dtype=np.float32).reshape(8, 8)
    split = parameter_sharding(mesh, False, ("embed", "mlp"), value.shape)

    def copy(device, index):
        part = value[index].copy()
        if device == flip_on:
            part.view(np.uint32)[3, 1] ^= np.uint32(1 << bit)
        return jax.device_put(part, device)

    parts = [
        copy(device, index) for device, index in split.devices_indices_map(value.shape).items()
    ]
    whole = jax.device_put(
        value.astype(jax.numpy.bfloat16), parameter_sharding(mesh, False, (None, None), value.shape)
    )
    return {
        "whole": whole,
        "split": jax.make_array_from_single_device_arrays(value.shape, split, parts),
    }


@pytest.mark.parametrize(("sizes", "minority"), [((8, 1), 1), ((4, 2), 1), ((2, 4), 2)])
def test_the_device_with_a_flipped_bit_is_named(sizes, minority):
    mesh = make_mesh(MeshConfig(data=sizes[0], model=sizes[1]))
    tree = placed(mesh)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
    check = make_replica_check(mesh, abstract)
    check(tree)
    for bit in 0, 13, 31:
        device = mesh.devices[PerAxis(replica=0, data=1, context=0, model=0)]
        with pytest.raises(NumericError) as caught:
            check(placed(mesh, device, bit))
        # Of two copies nobody can say which one is right.
        assert str(caught.value).count("(split)") == minority
        assert f"{device} (split)" in str(caught.value)
