"""What the installed jaxlib needs to compute right numbers: its known faults and their remedies.

A compiler that drops a row of a sum says nothing. So every fault that is known of a jaxlib which
tinylm admits stands in one table here, with the flag of XLA that avoids it. `import tinylm` sets
these flags in the environment, from which worker processes have them too; XLA reads them when JAX
makes its first backend, so importing jax before does no harm. A flag that the user has set stays as
it is. A fault without a remedy ends the program with one line.

`python -m tinylm.prove compiler` looks for faults that nobody knows yet.
"""

import dataclasses
import os
import pathlib
import re
import sys
import warnings

from jaxlib import version as jaxlib_version

from tinylm.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Fault:
    """What some jaxlibs get wrong on a platform."""

    first: str  # of the versions that have it
    last: str
    platform: str  # cpu, gpu or tpu
    issue: str
    what: str
    flag: str  # avoids it; "" where none does


# On CPU, XLA hands reductions, and the products that it fuses into them, to YNNPACK. Without them
# all versions below are right, and as fast (jax#37465: some reductions twice as fast).
_NO_YNN_REDUCTIONS = "--xla_cpu_experimental_ynn_fusion_type=-reduce"

KNOWN_FAULTS = (
    Fault(
        "0.10.2",
        "0.10.2",
        "cpu",
        "jax#39103",
        "sums over a product take other rows",
        _NO_YNN_REDUCTIONS,
    ),
    Fault(
        "0.10.2",
        "0.11.0",
        "cpu",
        "jax#39257 and jax#40412",
        "sums of arrays of seven axes crash",
        _NO_YNN_REDUCTIONS,
    ),
    # Seen in every version tried, 0.10.2, 0.11.0 to 0.11.2, 0.12.0 and 0.12.0.1, which is the
    # newest; so taken for granted in the rest of 0.12. tests/core/test_platform.py tells when a
    # version is right by itself.
    Fault(
        "0.10.2",
        "0.12.999",
        "cpu",
        "no issue yet",
        "sums over a product with a broadcast operand read memory that is not theirs",
        _NO_YNN_REDUCTIONS,
    ),
    Fault(
        "0.11.0",
        "0.11.1",
        "gpu",
        "jax#40633",
        "single operations give NaN and other wrong values",
        "",
    ),
)


def faults_of(version: str) -> list[Fault]:
    """Return the known faults of a version of jaxlib."""
    found = []
    for fault in KNOWN_FAULTS:
        if _numbers(fault.first) <= _numbers(version) <= _numbers(fault.last):
            found.append(fault)
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release numbers of a version, without what follows (".dev3", "rc1", "+cuda")."""
    release = re.match(r"\d+(\.\d+)*", version)
    if release is None:
        return ()
    return tuple(int(part) for part in release[0].split("."))


def set_flags() -> None:
    """Set the flags of XLA that this jaxlib needs and the user has not set.

    Warns where JAX no longer reads them.
    """
    given = _given_flags()
    given_names = [flag.partition("=")[0] for flag in given.split()]
    missing: list[str] = []
    issues: list[str] = []
    for fault in faults_of(jaxlib_version.__version__):
        name = fault.flag.partition("=")[0]
        if not fault.flag or name in given_names:
            continue
        issues.append(fault.issue)
        if fault.flag not in missing:
            missing.append(fault.flag)
    if not missing:
        return
    if _backend_exists():
        warnings.warn(
            f"JAX was in use before tinylm was imported, and jaxlib {jaxlib_version.__version__} "
            f"computes some sums wrong ({', '.join(issues)}); restart Python and import tinylm "
            f"first, or set XLA_FLAGS={' '.join(missing)}.",
            stacklevel=3,
        )
        return
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()


def _given_flags() -> str:
    """Return the user's flags of XLA: those of XLA_FLAGS, or of the file that it names."""
    given = os.environ.get("XLA_FLAGS", "").strip()
    if given and not given.startswith("-"):
        try:
            return pathlib.Path(given).read_text(encoding="utf-8").strip()
        except OSError:
            # XLA passes over it, too.
            return ""
    return given


def _backend_exists() -> bool:
    """Say whether JAX has made a backend, after which flags have no effect.

    JAX has no public question for that, but settings that it locks from then on.
    """
    jax = sys.modules.get("jax")
    if jax is None:
        return False
    before = jax.config.jax_num_cpu_devices
    try:
        jax.config.update("jax_num_cpu_devices", before + 1)
    except RuntimeError:
        return True
    jax.config.update("jax_num_cpu_devices", before)
    return False


def refuse_faulty(platform: str, version: str = jaxlib_version.__version__) -> None:
    """Raise UserError where a jaxlib is wrong on `platform` (cpu, gpu, tpu) and no flag helps."""
    for fault in faults_of(version):
        if fault.platform == platform and not fault.flag:
            raise UserError(
                f"jaxlib {version} computes wrong numbers on {platform.upper()} ({fault.issue}: "
                f"{fault.what}), and no flag helps; install another version of jax."
            )
