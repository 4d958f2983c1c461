"""The proofs hold on a tiny config, and a proof that does not hold exits with 1."""

import numpy as np
import pytest
from helpers import SMALL, call_command, run_command

from tinylm.config import load_config
from tinylm.core.errors import UserError
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


def test_losses_that_are_not_numbers_prove_nothing(monkeypatch):
    monkeypatch.setattr(proofs, "_one_step", lambda *_: (float("nan"), 1.0, [np.zeros(1)]))
    assert not proofs.prove_mesh(load_config("tales", overrides())).holds


def test_gradient_norms_that_differ_are_told(monkeypatch):
    # As where a sum over eight devices is taken for a mean: the loss is right, the gradient
    # eight-fold.
    def one_step(config, case, batch):
        return 1.0, 8.0 if case.mesh.fsdp else 1.0, [np.zeros(1)]

    monkeypatch.setattr(proofs, "_one_step", one_step)
    assert not proofs.prove_mesh(load_config("tales", overrides())).holds


def test_a_proof_covers_every_axis_and_both_ways_to_the_experts(monkeypatch):
    """Of the shapes of eight devices, those that divide 8 rows of 32 tokens."""
    monkeypatch.setattr(proofs, "_one_step", lambda *_: (1.0, 1.0, [np.zeros(1)]))
    with_experts = load_config("tales", [*overrides(), "model.num_experts=4"])
    names = [row[0] for row in proofs.prove_mesh(with_experts).rows[1:]]
    assert {
        "data 8",
        "data 8, fsdp",
        "model 8",
        "context 8",
        "replica 8",
        "data 4 x model 2, fsdp, tokens sent to experts",
        "replica 2 x data 4, fsdp, tokens sent to experts",
        "data 2 x context 4, fsdp, tokens sent to experts",
        "data 2 x context 2 x model 2",
        "data 2 x context 2 x model 2, fsdp, tokens sent to experts",
    } <= set(names)
    assert "data 8, fsdp, tokens sent to experts" not in names, "8 does not divide 4 experts"
    dense = [row[0] for row in proofs.prove_mesh(load_config("tales", overrides())).rows[1:]]
    assert dense == [name for name in names if "experts" not in name]
    # Two workers are two on every mesh, so no more than two replicas have any.
    slow = load_config("tales", [*overrides(), "mesh.replica=2", "train.sync_every_steps=4"])
    replicas = {row[0][:9] for row in proofs.prove_mesh(slow).rows if row[0][:7] == "replica"}
    assert replicas == {"replica 2"}


@pytest.mark.parametrize(
    ("moved_steps", "holds"), [(range(11, 26), True), (range(0), False), (range(11, 25), False)]
)
def test_each_resumed_run_must_train_on_to_the_same_step(monkeypatch, moved_steps, holds):
    """The last kill strikes at step 10, so 15 steps are left, on the other mesh as well."""
    saved = iter((5, 10))
    stops = []

    def killed(arguments, workdir, after):
        workdir.mkdir(exist_ok=True)
        return next(saved)

    steps = {"whole": range(1, 26), "killed": range(1, 26), "moved": moved_steps}
    monkeypatch.setattr(proofs, "_kill_after_save", killed)
    monkeypatch.setattr(proofs, "_train", lambda arguments, workdir, stop: stops.append(stop))
    monkeypatch.setattr(proofs, "_finish", lambda process: None)
    monkeypatch.setattr(
        proofs, "_losses", lambda workdir, last: dict.fromkeys(steps[workdir.name], 2.0)
    )
    assert proofs.prove_resume(load_config("tales", overrides()), []).holds == holds
    assert stops == [25, 25, 25]


def test_a_run_too_short_to_be_killed_twice_is_one_line(monkeypatch):
    saved = iter((5, 30))
    monkeypatch.setattr(proofs, "_kill_after_save", lambda *_, **__: next(saved))
    with pytest.raises(UserError, match=r"set train\.num_steps to 45 at least"):
        proofs.prove_resume(load_config("tales", overrides()), [])


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
