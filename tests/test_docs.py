"""README and docs are true: commands run as written, flags and settings exist, named tests and
links are there.

Commands stand in blocks of ```sh; those of a file run in order in one folder. A comment above a
block says `slow` (run with -m slow) or `elsewhere` (needs a cluster, a package index or an extra:
not run, but its flags are still checked).
"""

import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess

import pytest
from helpers import ROOT

from tinylm.__main__ import COMMANDS
from tinylm.config import load_config

FILES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "BUILD.md",
    ROOT / "CONTRIBUTING.md",
]
BLOCK = re.compile(r"(?:<!-- (\w+) -->\n)?```sh\n(.*?)```", re.S)


def blocks(path):
    """Return (mark, commands) of each block of a file."""
    return [(mark, text) for mark, text in BLOCK.findall(path.read_text())]


def tool_commands():
    """Return every command of ours in the docs as a list of words."""
    lines = [line for path in FILES for _, text in blocks(path) for line in text.splitlines()]
    parts = [part for line in lines for part in re.split(r" && | \|\| ", line)]
    return [shlex.split(part) for part in parts if re.match(r"python3? (-m tinylm|launch/)", part)]


@functools.cache
def known_flags(module):
    """Return the flags that the help of a command lists."""
    with contextlib.redirect_stdout(io.StringIO()) as help:
        assert importlib.import_module(module).main(["--help"]) == 0
    return {*re.findall(r"^  --(\w+) ", help.getvalue(), re.M), "help"}


@pytest.mark.parametrize("words", tool_commands(), ids=" ".join)
def test_every_flag_and_setting_in_the_docs_exists(words):
    if words[1] != "-m":
        words = ["python", "-m", "tinylm.main", *words[words.index("--") + 1 :]]
    module, arguments = words[2], words[3:]
    if module.startswith("tinylm.interop"):
        return  # flags of another program
    for word in arguments:
        if word.startswith("--") and not word.startswith("--config."):
            assert word[2:].partition("=")[0] in known_flags(module), word
    settings = [
        word.removeprefix("--config.") for word in arguments if word.startswith("--config.")
    ]
    config = [word.removeprefix("--config=") for word in arguments if word.startswith("--config=")]
    for name in config:
        load_config(str(ROOT / name) if "/" in name else name, settings)


@pytest.fixture
def reader(tmp_path):
    """Give the folder of a reader: the checkout's files, and texts of their own where the docs say
    PATH.
    """
    for name in ("launch", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    own = tmp_path / "PATH"
    own.mkdir()
    given = os.environ.get("TINYLM_TEST_DATA")
    text = "\n".join(path.read_text() for path in FILES)
    if given:
        text = (pathlib.Path(given) / "tinyshakespeare" / "input.txt").read_text()
    (own / "input.txt").write_text(text)
    stories = [{"text": f"Once there was a fox number {i}. It slept."} for i in range(200)]
    pairs = [{"prompt": f"What comes after {i}? ", "completion": str(i + 1)} for i in range(500)]
    for name, records in (("stories", stories), ("pairs", pairs)):
        (own / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def run_blocks(path, marks, folder):
    """Run the blocks with these marks in order; each command must exit with 0."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    for mark, text in blocks(path):
        if mark not in marks:
            continue
        for line in text.splitlines():
            done = subprocess.run(
                ["bash", "-euc", line], cwd=folder, env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            assert "Traceback" not in done.stderr, line


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_command_runs_as_written(path, reader):
    run_blocks(path, ("", "slow"), reader)


def test_dry_runs_run(reader):
    assert any(not mark for path in FILES for mark, _ in blocks(path))
    for path in FILES:
        run_blocks(path, ("",), reader)


def test_the_reference_of_settings_is_complete_and_current():
    reference = runpy.run_path(str(ROOT / "docs" / "make_config_md.py"))["reference"]()
    assert (ROOT / "docs" / "config.md").read_text() == reference, (
        "run python docs/make_config_md.py > docs/config.md"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_links_and_named_tests_are_there(path):
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / link).exists(), link
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_readme_is_short_and_has_one_test_command():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 150
    assert len([line for line in lines if re.search(r"pip install .*\[test\].*pytest", line)]) == 1
    assert set(COMMANDS.values()) == set(re.findall(r"^\| `(\w+)` \|", "\n".join(lines), re.M))


def notebook():
    """Return the cells of the tour."""
    return json.loads((ROOT / "docs" / "tour.ipynb").read_text())["cells"]


def test_the_tour_shows_what_it_ran_and_no_path_of_a_machine():
    code = [cell for cell in notebook() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = json.dumps([cell["outputs"] for cell in code])
    assert outputs.count('"image/png": "') == 2
    assert not re.search(
        r"/(tmp|home|root|work|usr)/|stderr|Traceback", re.sub(r'"image/png": "[^"]*"', "", outputs)
    )


@pytest.mark.slow
def test_the_tour_runs_from_start_to_end(monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    tour = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    nbclient.NotebookClient(
        tour, timeout=600, kernel_name="python3"
    ).execute()  # raises where a cell does
