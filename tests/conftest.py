"""Every test sees eight simulated CPU devices; tests that need another number start their own process."""

import os

# Test programs are compiled once and run for a moment: compile them fast rather than well.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_llvm_disable_expensive_passes=true"

import jax
import numpy as np
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """Keep token stores and compiled programs of a test session out of the user's own cache."""
    base = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))


@pytest.fixture(autouse=True)
def no_mesh():
    """Forget the mesh that a command set for the rest of its process."""
    yield
    jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))
