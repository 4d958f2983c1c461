"""The proof of the compiler: silent on what is right, loud on a known fault and on a planted
one.
"""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
import pytest
from helpers import ROOT, run_command

from tinylm.config import load_config, shipped_configs
from tinylm.core import platform
from tinylm.core.mesh import MeshConfig
from tinylm.model import layers
from tinylm.tools import compiler_proof
from tinylm.tools.op_by_op import operations_of

FAULTS = [fault for fault in platform.faults_of(jaxlib.__version__) if fault.flag]
TINY = [
    "model.vocab_size=65",
    "model.embed_dim=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "data.seq_len=16",
    "data.batch_size=8",
    "train.steps_per_dispatch=1",
]
SHIPPED = sorted(path.stem for path in shipped_configs().glob("*.py") if path.stem != "__init__")
MESHES = {
    "1x1": MeshConfig(data=1),
    "4x2": MeshConfig(data=4, model=2),
    "8x1 fsdp": MeshConfig(data=8, fsdp=True),
}


def tiny_config(*overrides, mesh="1x1"):
    config = load_config("tales", [*TINY, *overrides])
    config.mesh = MESHES[mesh]
    return config.resolve(65)


def test_operations_one_by_one_are_the_function():
    def function(x, ids):
        rows = jnp.take(x, ids, axis=0)
        total = jax.lax.fori_loop(0, 3, lambda i, sum: sum + jnp.sum(rows * i), 0.0)
        square = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
        # Its number of trips is not known when compiling.
        squares = jax.lax.fori_loop(
            0, ids[1], lambda i, y: y + i * square(x.T, x), jnp.zeros((3, 3))
        )
        grad = jax.grad(lambda x: jnp.sum(jnp.tanh(x[ids] @ x.T) ** 2))(x)
        chosen = [jax.lax.cond(total * sign > 0, jnp.min, jnp.max, x) for sign in (1, -1)]
        return {
            "sum": total,
            "squares": squares,
            "grad": grad,
            "one": chosen[0],
            "other": chosen[1],
        }

    x, ids = (
        np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32),
        np.array([0, 3, 3]),
    )
    expected = jax.jit(function)(x, ids)
    operations = operations_of(function, x, ids)
    single, exact = operations.run(x, ids), operations.run(x, ids, wide=True)
    assert {value.dtype for value in single.values()} == {np.dtype(np.float32)}
    assert {value.dtype for value in exact.values()} == {np.dtype(np.float64)}
    for name, value in expected.items():
        np.testing.assert_allclose(single[name], value, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(exact[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mesh", ["4x2", pytest.param("8x1 fsdp", marks=pytest.mark.slow)])
def test_a_right_step_is_proved(mesh):
    proof = compiler_proof.prove_compiler(tiny_config("model.dropout=0.1", mesh=mesh))
    assert proof.holds, proof.rows
    kinds = {row[0] for row in proof.rows[1:]}
    assert kinds >= {
        "known fault",
        "loss",
        "gradient norm",
        "gradients",
        "second moments",
        "parameters",
    }


def test_a_fault_in_the_compiled_step_is_found(monkeypatch):
    # One element in a thousand of one operation is a thousandth off, in the compiled step alone.
    right = layers.rms_normalize

    def wrong(x, *rest):
        traced_alone = jax.config.jax_disable_jit
        y = right(x, *rest)
        return y if traced_alone else y.at[..., 0, 0].multiply(1.001)

    monkeypatch.setattr(layers, "rms_normalize", wrong)
    proof = compiler_proof.prove_compiler(tiny_config())
    assert not proof.holds
    assert any(row[0] == "gradients" and row[-1].endswith("WRONG") for row in proof.rows)


def test_a_fault_of_single_operations_is_not_taken_for_rounding():
    before = {"w": np.zeros(3)}
    exact = ({"mu": np.ones(3)}, {"loss": np.ones(1)})
    wrong = ({"mu": np.float32([1, 1, 1.1])}, {"loss": np.float32([1])})
    assert not all(
        one.holds for one in compiler_proof.compare(before, wrong, wrong, exact, "float32")
    )


def test_rounding_where_a_gradient_is_zero_is_not_a_fault():
    # The bias of keys has no gradient but rounding: its square differs many times over, and is
    # nothing to its kind.
    exact, single, compiled = (
        ({"nu": {"bias": np.full(3, bias), "kernel": np.ones(3)}}, {})
        for bias in (0.0, 1e-12, 1e-11)
    )
    before = {"nu": {"bias": np.zeros(3), "kernel": np.zeros(3)}}
    assert all(
        one.holds for one in compiler_proof.compare(before, compiled, single, exact, "float32")
    )


@pytest.mark.skipif(not FAULTS, reason="this jaxlib has no known fault")
def test_the_known_fault_is_found_where_its_remedy_is_off():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": FAULTS[0].flag.replace("-reduce", "reduce"),
    }
    command = [sys.executable, "-m", "tinylm.prove", "compiler", "--config=tales"]
    settings = [f"--config.{line}" for line in TINY]
    done = subprocess.run(
        [*command, *settings], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "known fault" in done.stdout
    assert "NOT proved" in done.stdout


def test_a_large_config_is_scaled_down_and_says_how():
    config = load_config("gpt2_124m", []).resolve(50_257)
    small, lowered = compiler_proof.scaled_down(config, shards=8)
    assert small.model.num_layers == 2
    assert small.model.attention_scale == small.model.head_dim**-0.5
    assert "model.num_layers=2" in lowered
    unchanged, nothing = compiler_proof.scaled_down(tiny_config(), shards=1)
    assert dataclasses.asdict(unchanged) == dataclasses.asdict(tiny_config())
    assert nothing == []


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", SHIPPED)
def test_no_shipped_config_gives_a_false_alarm(name, mesh):
    config = load_config(name, [])
    config.mesh = MESHES[mesh]
    if config.data.batch_size % 8:
        config.data.batch_size = 8 * config.train.accumulation_steps
    proof = compiler_proof.prove_compiler(config.resolve(config.model.vocab_size or 65))
    assert proof.holds, proof.rows


@pytest.mark.slow
def test_the_command_takes_its_vocabulary_from_the_config():
    done = run_command(
        "tinylm.prove", "compiler", "--config=tales", *[f"--config.{line}" for line in TINY]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "proved: the compiled step of this config (at its own size)" in done.stdout
