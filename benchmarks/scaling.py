"""Print the tables of docs/scaling.md: bytes of state under fsdp, and traffic on a TPU topology.

python benchmarks/scaling.py state
python benchmarks/scaling.py traffic --mesh=1x16x1 --fsdp --accumulation=4
"""

import argparse

import jax
from jax.sharding import AbstractMesh, AxisType

from tinylm.config import load_config
from tinylm.core.mesh import AXES, make_mesh
from tinylm.plan import topology_devices
from tinylm.tools.plan import held_bytes, make_plan
from tinylm.train.state import make_blueprint

WIDTH = ["model.embed_dim=1024", "model.num_heads=16", "model.mlp_dim=4096", "optimizer.name=adamw"]


def state() -> None:
    """Print a row for each number of devices."""
    config = load_config("llama:110m", [*WIDTH, "mesh.fsdp=true"])
    config = config.resolve(0)
    for devices in 1, 2, 8, 64, 256, 1024:
        mesh = AbstractMesh((1, devices, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
        abstract = make_blueprint(config, mesh).abstract
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
        print(
            f"| {devices:,} | {held_bytes(abstract):,} | "
            f"{held_bytes(abstract) * devices / whole:.8f} |"
        )


def traffic(arguments: argparse.Namespace) -> None:
    """Compile one step and print what it sends and what the formula asks for."""
    replica, data, model = arguments.mesh.split("x")
    config = load_config(
        "llama:110m",
        [
            *WIDTH,
            "model.num_layers=4",
            "data.batch_size=64",
            f"mesh.replica={replica}",
            f"mesh.data={data}",
            f"mesh.model={model}",
            f"mesh.fsdp={arguments.fsdp}",
            f"train.accumulation_steps={arguments.accumulation}",
            f"train.sync_every_steps={arguments.sync_every}",
        ],
    )
    config = config.resolve(0)
    mesh = make_mesh(config.mesh, topology_devices(arguments.topology, 1))
    plan = make_plan(config, mesh)
    rows = plan.collectives
    sent = sum(row.bytes_per_step for row in rows) / 1e6
    least = sum(row.minimum_bytes for row in rows) / 1e6
    for row in rows:
        print(
            f"  {row.kind:<20}{row.axis:<12}"
            f"{row.bytes_per_step / 1e6:10.1f}{row.minimum_bytes / 1e6:10.1f}"
        )
    print(f"sent {sent:.1f} MB, least {least:.1f} MB, {sent / least:.2f} times")
    held = plan.per_device_bytes
    print(f"a device holds {(held['params'] + held['optimizer']) / 1e6:.1f} MB of state")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=["state", "traffic"])
    parser.add_argument("--mesh", default="1x16x1", help="replicas x data x model")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--sync_every", type=int, default=1, help="train.sync_every_steps")
    given = parser.parse_args()
    if given.table == "state":
        state()
    else:
        traffic(given)
