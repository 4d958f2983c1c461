"""The train step is compiled with the flags that pay on its chip, and with no other."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from tinylm.core import tpu_options
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.core.tpu_options import TpuFlag, tpu_compiler_options


@pytest.fixture
def mesh(monkeypatch):
    """Return a mesh of one v5e chip, whose compiler knows two flags for it and one for a v6e."""
    flags = (
        TpuFlag("xla_a", "true", ("TPU v5 lite", "TPU v6 lite")),
        TpuFlag("xla_ab", "true", ("TPU v5 lite",)),
        TpuFlag("xla_b", "true", ("TPU v6 lite",)),
    )
    monkeypatch.setattr(tpu_options, "TPU_FLAGS", flags)
    monkeypatch.setattr(tpu_options, "_is_known", lambda flag, mesh: True)
    for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS"):
        monkeypatch.setenv(name, "")
    device = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    return SimpleNamespace(devices=np.array([[device]]))


def test_a_chip_gets_its_flags(mesh):
    assert tpu_compiler_options(mesh) == {"xla_a": "true", "xla_ab": "true"}
    assert tpu_compiler_options(make_mesh(MeshConfig())) is None


@pytest.mark.parametrize("variable", ["LIBTPU_INIT_ARGS", "XLA_FLAGS"])
def test_what_the_user_set_stays(mesh, monkeypatch, variable):
    monkeypatch.setenv(variable, "--xla_other=1 --xla_a=false")
    assert tpu_compiler_options(mesh) == {"xla_ab": "true"}


def test_a_flag_that_the_compiler_does_not_know_is_left_out(mesh, monkeypatch):
    monkeypatch.setattr(tpu_options, "_is_known", lambda flag, mesh: flag.name == "xla_a")
    assert tpu_compiler_options(mesh) == {"xla_a": "true"}


def test_the_compiler_itself_says_which_flags_it_knows():
    here = make_mesh(MeshConfig(data=1))
    assert tpu_options._is_known(TpuFlag("xla_cpu_enable_fast_math", "False", ()), here)
    assert not tpu_options._is_known(TpuFlag("xla_tpu_no_such_flag", "true", ()), here)
    # Another failure is not taken for a flag that is missing.
    with pytest.raises(jax.errors.JaxRuntimeError, match="perhaps"):
        tpu_options._is_known(TpuFlag("xla_cpu_enable_fast_math", "perhaps", ()), here)
