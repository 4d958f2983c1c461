"""Sweeps: every point is trained once, what failed or was killed again, and the table is in
order.
"""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from helpers import ROOT, SMALL, lines, png_of
from matplotlib.backends.backend_agg import FigureCanvasAgg
from pod import serve_bucket

from tinylm import report
from tinylm import sweep as command
from tinylm.config import load_config
from tinylm.core.errors import UserError
from tinylm.tools import sweep as module

GRID = ["optimizer.learning_rate=1e-2,2e-2", "model.attention_window=(0,),(8,)"]


def sweep(base: list[str], grid: list[str], workdir: str, jobs: int) -> list[module.Row]:
    """Sweep with the configs that ship."""
    return module.sweep(base, grid, workdir, jobs, load_config)


@pytest.fixture
def trained(monkeypatch):
    """Stand in for training: note each command, log a loss, and exit with what `codes` say of a
    learning rate.
    """
    commands, codes = [], {}

    def run(command, stdout, **_):
        given = dict(argument.split("=", 1) for argument in command[3:])
        commands.append(given)
        folder, rate = pathlib.Path(given["--workdir"]), given["--config.optimizer.learning_rate"]
        losses = [5.0, float(rate), 3.0]
        records = [{"step": i, "split": "valid", "loss": loss} for i, loss in enumerate(losses, 1)]
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
        stdout.write("error: loss is not finite\n" if codes.get(rate) else "done\n")
        stdout.flush()
        return types.SimpleNamespace(returncode=codes.get(rate, 0), poll=lambda: True)

    monkeypatch.setattr(module, "subprocess", types.SimpleNamespace(Popen=run))
    return commands, codes


def test_each_point_is_trained_once(tmp_path, trained):
    commands, codes = trained
    base = ["--config=tales", "--config.seed=3"]
    codes["2e-2"] = 3
    rows = sweep(base, GRID, str(tmp_path), jobs=2)
    assert len(commands) == 4
    assert len({command["--workdir"] for command in commands}) == 4
    assert {command["--config.seed"] for command in commands} == {"3"}
    assert [row.loss for row in rows] == [0.01, 0.01, None, None]
    assert rows[-1].result == "exit code 3: error: loss is not finite"
    commands.clear()
    codes.clear()
    rows = sweep(base, GRID, str(tmp_path), jobs=1)
    assert {command["--config.optimizer.learning_rate"] for command in commands} == {"2e-2"}
    assert [row.loss for row in rows] == [0.01, 0.01, 0.02, 0.02]
    # Their order is that of the grid.
    drawn = sorted(rows, key=lambda row: list(row.point.values()))
    assert (tmp_path / "sweep.png").read_bytes() == png_of(module.figure_of(drawn))
    commands.clear()
    sweep([*base, "--config.train.stop_step=50"], GRID, str(tmp_path), jobs=1)
    assert len(commands) == 4  # another setting of all: they go on


def test_the_picture_has_a_line_for_each_setting_of_the_other_keys():
    """A run that failed leaves a gap at its place."""
    losses = {
        ("3e-4", "(0,)"): 5.0,
        ("3e-4", "$8$"): 4.0,
        ("1e-3", "(0,)"): None,
        ("1e-3", "$8$"): 3.0,
    }
    rows = []
    for (rate, window), loss in losses.items():
        point = {"optimizer.learning_rate": rate, "model.attention_window": window}
        rows.append(module.Row(point, loss, 1, ""))
    figure = module.figure_of(rows)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "optimizer.learning_rate"
    assert axes.get_ylabel() == "loss (nats per token)"
    assert list(axes.get_xticks()) == [0, 1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["3e-4", "1e-3"]
    points = [line.get_xydata() for line in axes.get_lines()]
    np.testing.assert_array_equal(points, [[(0, 5.0), (1, np.nan)], [(0, 4.0), (1, 3.0)]])
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "model.attention_window"
    assert [text.get_text() for text in legend.get_texts()] == ["(0,)", r"\$8\$"]


def test_long_values_stand_side_by_side_below_the_picture():
    points = [{"data.source": f"0.{i}*tales, 0.{9 - i}*text:/a/long/path"} for i in range(6)]
    figure = module.figure_of([module.Row(point, 1.0, 1, "") for point in points])
    FigureCanvasAgg(figure).draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert len(boxes) == 6
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


def test_a_picture_that_fails_takes_no_table_away(tmp_path, trained, monkeypatch):
    said = []
    monkeypatch.setattr(module, "say", said.append)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0)
    rows = sweep(
        ["--config=tales"], ["seed=0,1", "optimizer.learning_rate=1e-2"], str(tmp_path), jobs=1
    )
    assert [row.loss for row in rows] == [0.01, 0.01]
    assert said[-1] == f"warning: {tmp_path}/sweep.png cannot be written: division by zero"


def test_the_table_is_best_first_and_the_best_validation_loss_counts(tmp_path, trained):
    rows = sweep(
        ["--config=tales"],
        ["optimizer.learning_rate=3e-1,1e-1", "model.attention_window=(0,)"],
        str(tmp_path),
        jobs=1,
    )
    lines = command.text_of(rows).splitlines()
    assert lines[0].split() == ["optimizer.learning_rate", "model.attention_window", "result"]
    assert [line.split()[0] for line in lines[1:]] == ["1e-1", "3e-1"]
    assert [row.step for row in rows] == [2, 2]
    assert rows[0].result == "best validation loss 0.1000 at step 2"


def test_a_run_without_validation_is_judged_by_the_end_of_its_training(tmp_path):
    """A step that was passed over as bad, and logged after it, doesn't count."""
    lines = [("train", 1, 3.0), ("train", 2, 4.0), ("bad", 3, 99.0), ("time", 3, None)]
    records = [{"split": split, "step": step, "loss": loss} for split, step, loss in lines]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records)
    )
    assert module.best_loss(str(tmp_path)) == ("last training", 4.0, 2)


def test_the_name_of_a_run_is_one_folder_and_no_pattern():
    assert (
        module.name_of({"data.source": "0.7*text:a/[b]?.txt"}) == "data.source=0.7_text:a__b]_.txt"
    )
    long = [module.name_of({"data.source": f"text:{'é' * 200}{end}"}) for end in "ab"]
    assert max(len(name.encode()) for name in long) <= 255
    assert len(set(long)) == 2


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (["optimizer.learning_rat=1"], "did you mean"),
        (["seed"], "KEY=VALUE"),
        (["model.num_heads=4,3"], "embed_dim=128"),
        (["seed=1,2", "seed=3"], "has seed twice"),
        (["seed=1,1", "model.num_heads=4"], "has seed=1,model.num_heads=4 twice"),
    ],
)
def test_mistakes_come_before_the_first_run(tmp_path, trained, grid, said):
    with pytest.raises(UserError, match=said):
        sweep(["--config=tales"], grid, str(tmp_path), jobs=1)
    with pytest.raises(UserError, match="must be free of"):
        sweep(["--config=tales"], GRID, f"{tmp_path}/a*", jobs=1)
    with pytest.raises(UserError, match="--workdir=gs:/bucket/sweep must be gs://bucket/sweep"):
        sweep(["--config=tales"], GRID, "gs:/bucket/sweep", jobs=1)
    with pytest.raises(UserError, match=r"knows gs:// and s3:// alone; set checkpoint\.dir"):
        sweep(["--config=tales"], GRID, "az://bucket/sweep", jobs=1)
    assert trained[0] == []


def test_what_is_asked_to_stop_leaves_no_process_and_starts_none(tmp_path):
    note, fake = tmp_path / "note", tmp_path / "python"
    fake.write_text(
        f'#!/bin/bash\necho "$$ $*" >> {note}\ntrap "exit 75" TERM\nwhile :; do sleep 0.05; done\n'
    )
    fake.chmod(0o755)
    code = (
        f"import runpy, sys; sys.executable = {str(fake)!r}; runpy.run_module('tinylm.sweep', "
        "run_name='__main__')"
    )
    job = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            "--config=tales",
            "--cpu_devices",
            "2",
            "--grid=seed=0,1",
            f"--workdir={tmp_path}/w",
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    while not (note.exists() and note.read_text()):
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    error = job.communicate(timeout=60)[1]
    assert (job.returncode, error) == (75, "error: asked to stop; the same command goes on.\n")
    (line,) = note.read_text().splitlines()
    assert "--cpu_devices=2" in line
    with pytest.raises(ProcessLookupError):
        os.kill(int(line.split()[0]), 0)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optimizer.learning_rate=1e-3,3e-3", ["1e-3", "3e-3"]),
        ("sample.prompts=('a','b'),('c',)", ["('a','b')", "('c',)"]),
        ("model.attention_window=[8,0],[0,0,(1,2)],4", ["[8,0]", "[0,0,(1,2)]", "4"]),
        ("data.separator=)a,b", [")a", "b"]),
    ],
)
def test_commas_inside_brackets_separate_nothing(text, values):
    assert module.parse_axis(text) == (text.partition("=")[0], values)


@pytest.mark.slow
def test_a_sweep_lies_in_a_bucket_as_on_a_disk(tmp_path, monkeypatch, capsys):
    (tmp_path / "store" / "bucket").mkdir(parents=True)
    server, port = serve_bucket(tmp_path / "store", tmp_path / "server.log")
    for name in "STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL":
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    flags = [*SMALL, "--config.train.num_steps=6", "--grid=seed=0,1", "--workdir=gs://bucket/sweep"]
    try:
        tables = []
        for _ in range(2):
            assert command.main([*flags, "--json"]) == 0
            tables.append(json.loads(capsys.readouterr().out))
        there = tmp_path / "store" / "bucket" / "sweep"
        assert tables[0] == tables[1] and len(tables[0]) == 2
        assert (there / "sweep.png").read_bytes().startswith(b"\x89PNG")
        for seed in 0, 1:
            log = (there / f"seed={seed}" / "log.txt").read_text()
            assert log.count("Done in ") == 1, "the second sweep trains nothing"
            losses = lines(there / f"seed={seed}", "valid")
            (row,) = (row for row in tables[0] if row["point"] == {"seed": str(seed)})
            assert row["loss"] == min(losses.values())
        assert report.main(["--workdir=gs://bucket/sweep", f"--out={tmp_path}/report.html"]) == 0
        page = (tmp_path / "report.html").read_text()
        assert "seed=0" in page and "seed=1" in page
    finally:
        server.kill()
        server.wait()
