"""What the TPU's compiler is asked for besides its defaults: flags that hide or save communication.

The train step is compiled with them on TPUs, by the trainer and by `plan` alike. They go with the
program (`jax.jit(compiler_options=...)`), since an environment variable that names a flag which the
installed compiler doesn't know ends the process. A flag that the user has set, in LIBTPU_INIT_ARGS
or XLA_FLAGS, stays as it is. docs/scaling.md has what each flag changes; one that changes nothing
there is not shipped, and tests/test_plan.py holds that each still does.
"""

import dataclasses
import functools
import os
import re

import jax
from jax.sharding import Mesh

from tinylm.core.log import say_once
from tinylm.core.mesh import replicated


@dataclasses.dataclass(frozen=True)
class TpuFlag:
    """A flag of the compiler."""

    name: str
    value: str
    kinds: tuple[str, ...]  # the devices for which it pays


_V5E = "TPU v5 lite"
_V5P = "TPU v5"
_V6E = "TPU v6 lite"
_V7X = "TPU7x"
# Other chips were not measured.
TPU_FLAGS = (
    # Parameters of which each of many chips has a few columns are gathered as such, and behind
    # products. By default each chip adds its columns to zeros in an all-reduce, which sends twice
    # as much and hides behind nothing.
    TpuFlag("xla_tpu_prefer_async_allgather_to_allreduce", "true", (_V5E, _V5P, _V6E, _V7X)),
    # Gathers are cut into pieces that move while products run, as they are on v5e by default.
    # Neither flag does anything without the other.
    TpuFlag("xla_enable_async_all_gather", "true", (_V5P, _V6E)),
    TpuFlag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", (_V5P, _V6E)),
)


def tpu_compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Return the flags to compile with for a mesh of TPUs; None for other devices."""
    device = mesh.devices.flat[0]
    if device.platform != "tpu":
        return None
    given = os.environ.get("LIBTPU_INIT_ARGS", "") + " " + os.environ.get("XLA_FLAGS", "")
    # `--xla_tpu_one=true`
    set_by_user = re.findall(r"--(\w+)", given)
    options = {}
    for flag in TPU_FLAGS:
        pays = device.device_kind in flag.kinds
        if pays and flag.name not in set_by_user and _is_known(flag, mesh):
            options[flag.name] = flag.value
    return options


@functools.cache
def _is_known(flag: TpuFlag, mesh: Mesh) -> bool:
    """Say whether the installed compiler knows a flag, by a program of one addition."""
    number = jax.ShapeDtypeStruct((), "float32", sharding=replicated(mesh))
    program = jax.jit(lambda x: x + 1, compiler_options={flag.name: flag.value})
    try:
        program.lower(number).compile()
    except jax.errors.JaxRuntimeError as error:
        # jaxlib 0.10 with libtpu 0.0.42: "No such compile option: 'xla_...'"
        if "No such compile option" not in str(error):
            raise
        say_once(f"this TPU compiler doesn't know {flag.name}; the run goes on without it.")
        return False
    return True
