"""Rows that the mesh splits by position give the same run, with all that looks at neighbours on."""

import numpy as np
import pytest
from helpers import tiny_model, train

from tinylm.core.mesh import MeshConfig

LENGTH = 64


def packed_batch(seed: int):
    """Return a host batch [1, 4, LENGTH] of rows that hold documents of any length."""
    rng = np.random.default_rng(seed)
    shape = (1, 4, LENGTH)
    begins = rng.random(shape) < 0.06
    begins[..., 0] = True
    segments = np.cumsum(begins, axis=-1).astype(np.int32)
    places = np.broadcast_to(np.arange(LENGTH), shape)
    positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=-1)
    ids = rng.integers(0, 65, (1, 4, LENGTH + 1)).astype(np.int32)
    return {
        "tokens": ids[..., :-1],
        "targets": ids[..., 1:],
        "weights": (rng.random(shape) < 0.8).astype(np.float32),
        "segments": segments,
        "positions": positions.astype(np.int32),
    }


BATCHES = [packed_batch(seed) for seed in range(20)]
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
