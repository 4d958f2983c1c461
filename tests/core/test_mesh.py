"""Where devices lie on the mesh: hosts of GPUs are no slices, slices of TPUs are."""

import dataclasses

import numpy as np
import pytest

from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig, crosses_slices, make_mesh


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a device: GPU hosts number their own `slice_index`, as XLA has it since
    jaxlib 0.8.
    """

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"
    core_on_chip: int = 0

    @property
    def coords(self):
        return (self.id % 2, self.id % 4 // 2, 0)


def hosts(number, **kwargs):
    """Return the devices of some hosts of four."""
    return [Chip(i, i // 4, i // 4, **kwargs) for i in range(4 * number)]


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (1, 8, 1, 1)),
        (MeshConfig(fsdp=True), (1, 8, 1, 1)),
        (MeshConfig(model=2), (1, 4, 1, 2)),
        (MeshConfig(model=8), (1, 1, 1, 8)),
        (MeshConfig(replica=4), (4, 2, 1, 1)),
    ],
)
def test_any_axis_may_span_hosts_of_gpus(config, shape):
    mesh = make_mesh(config, hosts(2))
    assert mesh.devices.shape == shape
    assert [device.id for device in mesh.devices.flat] == list(range(8)), (
        "a host's devices are neighbours"
    )


def test_a_mesh_may_leave_out_gpus_of_the_last_host():
    assert make_mesh(MeshConfig(data=6), hosts(2)).devices.size == 6


def test_slices_of_tpus_are_the_replicas():
    devices = hosts(2, platform="tpu", device_kind="TPU v5 lite")
    with pytest.raises(UserError, match=r"mesh\.replica=1 must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(), devices)
    mesh = make_mesh(MeshConfig(replica=2, model=2), devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices == np.arange(2)[:, None, None, None]).all()


def test_replicas_in_one_slice_of_tpus_do_not_leave_it():
    tpus = {"platform": "tpu", "device_kind": "TPU v5 lite"}
    replicas = MeshConfig(replica=2)
    assert not crosses_slices(make_mesh(replicas, hosts(1, **tpus)), "replica")
    between = make_mesh(replicas, hosts(2, **tpus))
    assert crosses_slices(between, "replica+data")
    assert not crosses_slices(between, "data")
    # Nobody knows whether a machine of GPUs ends at a replica.
    assert crosses_slices(make_mesh(replicas, hosts(1)), "replica")
