"""Every test sees eight simulated CPU devices; tests that need another number start their own process."""

import os
import pathlib

# Test programs are compiled once and run for a moment: compile them fast rather than well, with one thread a worker,
# as there are as many workers as cores.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_multi_thread_eigen=false",
    ]
)

import jax
import numpy as np
import pytest

import tinylm  # noqa: F401  (sets the flags that a right result needs, before the first backend)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def session_folder(tmp_path_factory) -> pathlib.Path:
    """Return the temporary folder that all workers of a session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Let all workers and all processes that they start share compiled programs."""
    folder = session_folder(tmp_path_factory) / "cache" / "tinylm" / "xla"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """Keep token stores and compiled programs of a test session out of the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(session_folder(tmp_path_factory) / "cache"))


@pytest.fixture(autouse=True)
def no_mesh():
    """Forget the mesh that a command set for the rest of its process."""
    yield
    jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))
