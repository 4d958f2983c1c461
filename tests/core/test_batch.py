"""The rows of a batch on the mesh: each where it belongs, whatever the mesh."""

import jax
import numpy as np
import pytest

from tinylm.core.batch import BatchRows, abstract_batch, batch_of_ids, stack_steps
from tinylm.core.mesh import MeshConfig, make_mesh


@pytest.mark.parametrize("config", [MeshConfig(), MeshConfig(model=2), MeshConfig(replica=2)])
@pytest.mark.parametrize("rows", [8, 6])
def test_placed_arrays_are_those_of_the_host_as_plans_expect_them(config, rows):
    mesh = make_mesh(config)
    ids = np.arange(2 * rows * 5, dtype=np.int32).reshape(2, rows, 5)
    batch = batch_of_ids(ids, np.ones((2, rows, 4), np.float32))
    host = stack_steps([batch, batch, batch])
    batch_rows = BatchRows(mesh, rows)
    assert batch_rows.owned.tolist() == list(range(rows))
    placed = batch_rows.place(host)
    planned = abstract_batch(mesh, (3, 2, rows, 4), packed=False)
    assert placed.keys() == planned.keys()
    for name, x in placed.items():
        assert np.array_equal(x, host[name])
        assert (x.dtype, x.shape) == (planned[name].dtype, planned[name].shape)
        assert x.sharding.is_equivalent_to(planned[name].sharding, x.ndim)


def test_packed_rows_have_two_more_arrays():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    packed = abstract_batch(mesh, (1, 1, 2, 4), packed=True)
    assert packed.keys() - abstract_batch(mesh, (1, 1, 2, 4), packed=False).keys() == {
        "segments",
        "positions",
    }
