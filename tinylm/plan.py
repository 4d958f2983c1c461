"""Plan a run before it costs anything: compile its step for devices that you don't have.

python -m tinylm.plan --config=configs/gpt2_124m.py --topology=v5e:4x4 --config.mesh.fsdp=true
python -m tinylm.plan --config=gpt2_124m --topology=v5e:4x4 --search
python -m tinylm.plan --config=tales --cpu_devices=8 --json

Prints memory per device, FLOPs, traffic by mesh axis with the least that is needed, and the time to
train; allocates nothing. A topology needs the TPU compiler: pip install "tinylm[tpu]".
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence

import jax
from absl import flags as absl_flags
from absl.flags import FlagValues

from tinylm import cli
from tinylm.core.errors import UserError


def plan(flags: FlagValues) -> None:
    """Plan as the flags say."""
    from tinylm.core.mesh import make_mesh
    from tinylm.tools.plan import make_plan
    from tinylm.tools.plan_text import describe, describe_search
    from tinylm.tools.search import search

    if bool(flags.topology) == bool(flags.cpu_devices):
        raise UserError("give either --topology=v5e:4x4 or --cpu_devices=8.")
    if flags.cpu_devices and flags.slices > 1:
        raise UserError(f"--slices={flags.slices} needs --topology; simulated devices have none.")
    config = cli.resolved_config(flags)
    devices = topology_devices(flags.topology, flags.slices) if flags.topology else jax.devices()
    if flags.search:
        found = search(config, devices)
        if flags.json:
            print(json.dumps([row.as_json() for row in found]))
        else:
            print(describe_search(found))
        return
    mesh = make_mesh(config.mesh, devices)
    config.check_mesh(mesh)
    plan = make_plan(config, mesh)
    print(json.dumps(dataclasses.asdict(plan)) if flags.json else describe(plan))


def topology_devices(topology: str, slices: int) -> list[jax.Device]:
    """Return the devices of a TPU topology, through the compiler alone.

    Args:
      topology: such as v5e:4x4.
      slices: how many of them.

    Raises:
      UserError: the compiler isn't installed, or doesn't know such a topology.
    """
    # The compiler's plugin looks for a TPU's machine, waits for it, and writes about it.
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

    # The two cores of a v4 chip are one device, unless a run sets TPU_MEGACORE; by default the
    # compiler counts them as two.
    joined_cores = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology, num_slices=slices, **joined_cores
        )
        return list(described.devices)
    except ModuleNotFoundError as error:
        raise UserError('--topology needs the TPU compiler: pip install "tinylm[tpu]".') from error
    except Exception as error:
        # The compiler's plugin has no type of its own for what it raises.
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"--topology={topology} cannot be had ({reason}); give one like v5e:4x4 or v5p:2x2x1."
        ) from error


def define_flags(flags: FlagValues) -> None:
    """Add the flags of this command."""
    absl_flags.DEFINE_string(
        "topology",
        "",
        "TPU topology to compile for, such as v5e:4x4, v5p:8x8x16 or v6e:16x16",
        flag_values=flags,
    )
    absl_flags.DEFINE_bool(
        "search",
        False,
        "find mesh, model.remat and batch: rank all by formula, compile the best three",
        flag_values=flags,
    )
    absl_flags.DEFINE_integer(
        "slices",
        1,
        "slices of that topology; mesh.replica must be a multiple of it",
        lower_bound=1,
        flag_values=flags,
    )
    cli.define_json(flags)


COMMAND = cli.Command(__doc__, plan, define_flags, has_config=True, on_cpu=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: this process's); return its exit code."""
    return cli.run(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
