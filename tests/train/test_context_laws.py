"""Rows that the mesh splits by position give the same run, with all that looks at neighbours on."""

import numpy as np
import pytest
from helpers import packed_batch, tiny_model, train

from tinylm.core.mesh import MeshConfig

LENGTH = 64
BATCHES = [packed_batch(seed, rows=4, length=LENGTH) for seed in range(20)]
SETTINGS = {
    "num_kv_heads": 2,
    "attention_softcap": 5.0,
    "dropout": 0.1,
    "conv_taps": 3,
    "loss_chunks": 2,
    "z_loss": 1e-3,
    "rotary_scaling": "yarn",
    "rotary_factor": 4.0,
    "rotary_original_context": LENGTH,
}
# A window of neighbours alone, one of several devices, and none.
MODEL = tiny_model(num_layers=3, attention_window=(4, 0, 20), **SETTINGS)


@pytest.fixture(scope="module")
def single():
    return train(MeshConfig(data=1), MODEL, BATCHES)


@pytest.mark.parametrize(
    "mesh",
    [
        MeshConfig(data=2, context=2, model=2),
        pytest.param(MeshConfig(data=1, context=8), marks=pytest.mark.slow),
        pytest.param(MeshConfig(data=2, context=4, fsdp=True), marks=pytest.mark.slow),
        pytest.param(MeshConfig(replica=2, data=1, context=4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rows_that_a_mesh_splits_give_the_same_losses(single, mesh):
    losses, norms, _ = train(mesh, MODEL, BATCHES)
    np.testing.assert_allclose(losses, single[0], rtol=1e-5)
    np.testing.assert_allclose(norms, single[1], rtol=1e-5)
