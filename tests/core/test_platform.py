"""Known faults of jaxlib are avoided wherever tinylm runs, and a fault that nothing avoids is
refused.
"""

import os
import re
import subprocess
import sys

import jaxlib
import pytest
from helpers import ROOT

from tinylm.core import platform
from tinylm.core.errors import UserError

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# The product's right side is the same in all its columns; sums over the columns are wrong where XLA
# fuses the two.
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
{before}
import tinylm
a, b = np.arange(65 * 31 * 5.0).reshape(65, 31, 5) % 7, np.arange(65 * 5.0).reshape(65, 5, 1) % 5
def f(a, b):
    return jnp.sum(a @ jnp.broadcast_to(b, (65, 5, 8)), axis=2)
if {cache!r}:
    jax.config.update("jax_compilation_cache_dir", {cache!r})
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
right = 8 * (a @ b)[..., 0]
print(np.array_equal(jax.jit(f)(a.astype(np.float32), b.astype(np.float32)), right))
"""
FAULTY = any(fault.flag for fault in platform.faults_of(jaxlib.__version__))
needs_remedy = pytest.mark.skipif(not FAULTY, reason="this jaxlib has no known fault")


def run_program(before="", flags=None, cache=""):
    """Run PROGRAM in a process of its own; return (whether it is right, what it wrote to
    stderr).
    """
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | (
        {} if flags is None else {"XLA_FLAGS": flags}
    )
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    program = PROGRAM.format(before=before, cache=str(cache))
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout == "True\n", done.stderr


def test_sums_are_right_where_tinylm_is_imported_after_jax():
    assert run_program() == (True, "")


@needs_remedy
def test_without_its_flag_this_jaxlib_is_wrong():
    # Where this fails, the installed version is right by itself: shorten its line in KNOWN_FAULTS.
    assert not run_program(flags=f"{FLAG}=reduce")[0]


@needs_remedy
def test_a_backend_made_before_is_told():
    right, said = run_program(before="jax.devices()")
    assert not right
    assert "restart Python and import tinylm first" in said


def test_flags_in_a_file_stay(tmp_path):
    (tmp_path / "flags").write_text("--xla_dump_max_hlo_modules=3\n")
    assert run_program(flags=str(tmp_path / "flags"))[0]


@needs_remedy
def test_the_compile_cache_hands_no_wrong_program_on(tmp_path):
    assert not run_program(flags=f"{FLAG}=reduce", cache=tmp_path)[0]
    assert list(tmp_path.iterdir())
    assert run_program(cache=tmp_path)[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", f"{FLAG}=-reduce"),
        ("--xla_foo=1", f"--xla_foo=1 {FLAG}=-reduce"),
        (f"{FLAG}= --xla_foo=1", f"{FLAG}= --xla_foo=1"),
    ],
)
def test_flags_of_the_user_stay(monkeypatch, given, expected):
    monkeypatch.setattr(platform, "_backend_exists", lambda: False)
    monkeypatch.setattr(platform.jaxlib_version, "__version__", "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", given)
    platform.set_flags()
    assert os.environ["XLA_FLAGS"] == expected


def test_versions_without_the_fault_get_no_flag():
    assert not [fault for fault in platform.faults_of("0.10.1") if fault.flag]
    assert platform.faults_of("0.10.2+local")[0].issue == "jax#39103"


def test_a_version_that_nothing_helps_is_refused_and_excluded():
    with pytest.raises(
        UserError, match=re.escape("jaxlib 0.11.1 computes wrong numbers on GPU (jax#40633")
    ):
        platform.refuse_faulty("gpu", "0.11.1")
    platform.refuse_faulty("cpu", "0.11.1")
    platform.refuse_faulty("gpu", "0.11.2")
    excluded = re.search(r'"jax>=([^"]*)"', (ROOT / "pyproject.toml").read_text())[1]
    assert "!=0.11.0,!=0.11.1" in excluded


@pytest.mark.parametrize("name", ["tinylm", "another"])
def test_garbage_is_collected_in_commands_and_in_programs_of_others(name):
    """Only while a command imports what it needs there is none to look for."""
    program = (
        "import gc, sys\n"
        "sys.argv = [sys.argv[1]]\n"
        "from tinylm import cli\n"
        "seen = [gc.isenabled()]\n"
        "cli.run(cli.Command('', lambda flags: seen.append(gc.isenabled())))\n"
        "print(seen)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, name], capture_output=True, text=True)
    assert done.stdout == f"{[name != 'tinylm', True]}\n", done.stderr
