"""Sweeps: every point is trained once, what failed or was killed again, and the table is in order."""

import json
import pathlib
import types

import pytest

from tinylm import sweep as module
from tinylm.core.errors import UserError

GRID = ["optimizer.learning_rate=1e-2,2e-2", "model.attention_window=(0,),(8,)"]


@pytest.fixture
def trained(monkeypatch):
    """Stand in for training: note each command, log a loss, and exit with what `codes` say of a learning rate."""
    commands, codes = [], {}

    def run(command, stdout, **_):
        given = dict(argument.split("=", 1) for argument in command[3:])
        commands.append(given)
        folder, rate = pathlib.Path(given["--workdir"]), given["--config.optimizer.learning_rate"]
        losses = [5.0, float(rate), 3.0]
        records = [{"step": i, "split": "valid", "loss": loss} for i, loss in enumerate(losses, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        stdout.write("error: loss is not finite\n" if codes.get(rate) else "done\n")
        stdout.flush()
        return types.SimpleNamespace(returncode=codes.get(rate, 0))

    monkeypatch.setattr(module, "subprocess", types.SimpleNamespace(run=run))
    return commands, codes


def test_each_point_is_trained_once(tmp_path, trained):
    commands, codes = trained
    base = ["--config=tales", "--config.seed=3"]
    codes["2e-2"] = 3
    rows = module.sweep(base, GRID, str(tmp_path), jobs=2)
    assert len(commands) == 4
    assert len({command["--workdir"] for command in commands}) == 4
    assert {command["--config.seed"] for command in commands} == {"3"}
    assert [row["loss"] for row in rows] == [0.01, 0.01, None, None]
    assert rows[-1]["result"] == "exit code 3: error: loss is not finite"
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    commands.clear()
    codes.clear()
    rows = module.sweep(base, GRID, str(tmp_path), jobs=1)
    assert {command["--config.optimizer.learning_rate"] for command in commands} == {"2e-2"}
    assert [row["loss"] for row in rows] == [0.01, 0.01, 0.02, 0.02]
    commands.clear()
    module.sweep([*base, "--config.train.stop_step=50"], GRID, str(tmp_path), jobs=1)
    assert len(commands) == 4  # another setting of all: they go on


def test_the_table_is_best_first_and_the_best_validation_loss_counts(tmp_path, trained):
    rows = module.sweep(["--config=tales"], ["optimizer.learning_rate=3e-1,1e-1", "model.attention_window=(0,)"],
                        str(tmp_path), jobs=1)  # fmt: skip
    lines = module.text_of(rows).splitlines()
    assert lines[0].split() == ["optimizer.learning_rate", "model.attention_window", "result"]
    assert [line.split()[0] for line in lines[1:]] == ["1e-1", "3e-1"]
    assert [row["step"] for row in rows] == [2, 2]


def test_the_name_of_a_run_is_one_folder_and_no_pattern():
    assert module.name_of({"data.source": "0.7*text:a/[b]?.txt"}) == "data.source=0.7_text:a__b]_.txt"


@pytest.mark.parametrize(
    ("grid", "said"),
    [("optimizer.learning_rat=1", "did you mean"), ("seed", "KEY=VALUE"), ("model.num_heads=4,3", "embed_dim=128")],
)
def test_mistakes_come_before_the_first_run(tmp_path, trained, grid, said):
    with pytest.raises(UserError, match=said):
        module.sweep(["--config=tales"], [grid], str(tmp_path), jobs=1)
    with pytest.raises(UserError, match="must be free of"):
        module.sweep(["--config=tales"], GRID, f"{tmp_path}/a*", jobs=1)
    assert trained[0] == []
