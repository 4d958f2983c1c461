"""Every test sees eight simulated CPU devices; tests that need another number start their own
process.
"""

import importlib.metadata
import os
import pathlib
import signal

# Test programs are compiled once and run for a moment, so they are compiled fast rather than well,
# with one thread a worker, as there are as many workers as cores.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_multi_thread_eigen=false",
]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # The older emitter of fused loops compiles a train step in half the time. Later versions don't
    # have it.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
for library in "OMP", "OPENBLAS", "MKL":
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import jax
import numpy as np
import pytest
from helpers import session_folder

import tinylm  # noqa: F401  (sets the flags that a right result needs, before the first backend)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


# Processes inherit which signals are ignored. Started by nohup, or by a shell in the background,
# the tests that interrupt a run would wait for its end until their limit.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Let all workers and all processes that they start share compiled programs.

    They are in a folder of the session, empty at first, or in the one that
    JAX_COMPILATION_CACHE_DIR names, which stays for the next session.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(
        session_folder(tmp_path_factory) / "xla"
    )
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """Keep the token stores of a test session out of the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(session_folder(tmp_path_factory) / "cache"))


@pytest.fixture(autouse=True)
def no_mesh():
    """Forget the mesh that a command set for the rest of its process."""
    yield
    jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))
