"""Plan a run before it costs anything: compile its train step for devices that you don't have,
allocating nothing.

python -m tinylm.plan --config=configs/gpt2_124m.py --topology=v5e:4x4 --config.mesh.fsdp=true
python -m tinylm.plan --config=gpt2_124m --topology=v5e:4x4 --search
python -m tinylm.plan --config=tales --cpu_devices=8 --json

Prints memory per device, FLOPs, traffic by mesh axis beside the least that is needed, and the time
to train. A topology needs the TPU compiler: pip install "tinylm[tpu]".
"""

import json
import os

import jax
from absl import flags

from tinylm import cli
from tinylm.core.errors import UserError

FLAGS = flags.FLAGS


def main() -> None:
    """Plan as the flags say."""
    from tinylm.core.mesh import batch_shards, make_mesh
    from tinylm.tools.plan import make_plan
    from tinylm.tools.plan_text import describe, describe_search
    from tinylm.tools.search import search

    if bool(FLAGS.topology) == bool(FLAGS.cpu_devices):
        raise UserError("give either --topology=v5e:4x4 or --cpu_devices=8.")
    if FLAGS.cpu_devices and FLAGS.slices > 1:
        raise UserError(f"--slices={FLAGS.slices} needs --topology; simulated devices have none.")
    config = cli.resolved_config()
    devices = topology_devices(FLAGS.topology, FLAGS.slices) if FLAGS.topology else jax.devices()
    if FLAGS.search:
        found = search(config, devices)
        print(json.dumps(found) if FLAGS.json else describe_search(found))
        return
    mesh = make_mesh(config.mesh, devices)
    config.check_mesh(batch_shards(mesh))
    plan = make_plan(config, mesh)
    print(json.dumps(plan) if FLAGS.json else describe(plan))


def topology_devices(topology: str, slices: int) -> list[jax.Device]:
    """Return the devices of a TPU topology such as v5e:4x4, through the compiler alone; raise
    UserError for others.
    """
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(
            topologies.get_topology_desc(
                platform="tpu", topology_name=topology, num_slices=slices
            ).devices
        )
    except ModuleNotFoundError as error:
        raise UserError('--topology needs the TPU compiler: pip install "tinylm[tpu]".') from error
    except (
        Exception
    ) as error:  # whatever the compiler's plugin raises, for it has no type of its own
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"--topology={topology} cannot be had ({reason}); give one like v5e:4x4 or v5p:2x2x1."
        ) from error


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    flags.DEFINE_string(
        "topology", "", "TPU topology to compile for, such as v5e:4x4, v5p:8x8x16 or v6e:16x16"
    )
    flags.DEFINE_bool(
        "search",
        False,
        "find mesh, model.remat and batch: rank all by formula, compile the best three",
    )
    flags.DEFINE_integer(
        "slices", 1, "slices of that topology; mesh.replica must be a multiple of it", lower_bound=1
    )
    cli.define_config()
    cli.define_json()
    cli.run(main, __doc__)
