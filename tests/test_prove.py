"""The proofs hold on a tiny config, and a proof that does not hold exits with 1."""

import numpy as np
import pytest
from helpers import SMALL, call_command, run_command

from tinylm.config import load_config
from tinylm.tools import prove as proofs

SMALLER = [*SMALL, "--config.model.num_layers=1"]


def overrides():
    return [flag.removeprefix("--config.") for flag in SMALLER if flag.startswith("--config.")]


def test_hosts_give_the_same_batches():
    proof = proofs.prove_hosts(load_config("tales", overrides()))
    assert proof.holds
    assert [row[0] for row in proof.rows] == ["processes", "1", "2", "4", "8"]


def test_batches_that_differ_are_told(monkeypatch):
    hashes = proofs._hashes
    monkeypatch.setattr(
        proofs, "_hashes", lambda config, data, n: ["x"] * 3 if n == 4 else hashes(config, data, n)
    )
    assert not proofs.prove_hosts(load_config("tales", overrides())).holds


def test_losses_that_are_no_numbers_prove_nothing(monkeypatch):
    monkeypatch.setattr(proofs, "_one_step", lambda *_: (float("nan"), 1.0, [np.zeros(1)]))
    assert not proofs.prove_mesh(load_config("tales", overrides())).holds


def test_gradient_norms_that_differ_are_told(monkeypatch):
    # As where a sum over eight devices is taken for a mean: the loss is right, the gradient
    # eight-fold.
    def one_step(config, mesh, batch):
        return 1.0, 8.0 if mesh.fsdp else 1.0, [np.zeros(1)]

    monkeypatch.setattr(proofs, "_one_step", one_step)
    assert not proofs.prove_mesh(load_config("tales", overrides())).holds


def test_a_proof_must_be_named():
    done = call_command("tinylm.prove", *SMALLER)
    assert done.returncode == 2
    assert done.stderr == "error: say first what to prove: compiler, mesh, resume, hosts.\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mesh", "resume", "hosts"])
def test_each_proof_as_a_command(name):
    done = run_command(
        "tinylm.prove", name, *SMALLER, *(["--cpu_devices=4"] if name == "mesh" else [])
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nproved: " in done.stdout
