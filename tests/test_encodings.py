"""Texts are read and written as UTF-8 whatever the locale says, which containers and cron leave at
C.
"""

import ast
import json
import pathlib
import subprocess

import pytest
from helpers import ROOT, run_command

from tinylm.config import load_config
from tinylm.core.settings import to_dict
from tinylm.run.folder import RunFolder

C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PROGRAMS = [
    path
    for room in ("tinylm", "configs", "launch", "docs", "benchmarks")
    for path in (ROOT / room).rglob("*.py")
]
# Calls by their last name, for ruff's PLW1514 sees only those on a path that it knows for one.
TEXT_FILES = {"read_text", "write_text"}
OPENERS = {"open", "fdopen", "NamedTemporaryFile", "TemporaryFile"}
PROCESSES = {"run", "Popen", "check_output", "check_call"}


def without_encoding(source: str) -> list[int]:
    """Return the lines on which a program opens text without saying in which encoding."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(
            keyword.arg == "encoding" for keyword in node.keywords
        ):
            continue
        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        modes += [
            k.value.value
            for k in node.keywords
            if k.arg == "mode" and isinstance(k.value, ast.Constant)
        ]
        is_binary = any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)
        is_no_text_file = ast.unparse(node.func) in ("os.open", "tensorstore.KvStore.open")
        asks_for_text = {k.arg for k in node.keywords} & {"text", "universal_newlines"}
        opens_text = name in OPENERS and not is_binary and not is_no_text_file
        if name in TEXT_FILES or opens_text or (name in PROCESSES and asks_for_text):
            lines.append(node.lineno)
    return lines


def test_the_rule_sees_what_it_should():
    refused = [
        "p.read_text()",
        "p.write_text(x)",
        "open(p)",
        "p.open('a')",
        "subprocess.run(c, text=True)",
    ]
    assert [line for line in refused if not without_encoding(line)] == []
    allowed = [
        "p.read_text(encoding='utf-8')",
        "p.open('rb')",
        "open(p, mode='wb')",
        "os.open(p, 0)",
        "work.run(x)",
    ]
    assert [line for line in allowed if without_encoding(line)] == []


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_is_opened_with_its_encoding(path: pathlib.Path):
    assert without_encoding(path.read_text(encoding="utf-8")) == []


def test_the_locale_of_the_test_is_no_utf_8():
    command = ["python3", "-c", "import locale; print(locale.getpreferredencoding(False))"]
    found = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", **C_LOCALE}, capture_output=True, encoding="ascii"
    )
    assert "utf" not in found.stdout.lower()


def test_report_and_prepare_work_in_the_c_locale(tmp_path):
    config = load_config(
        "tales", [f"data.source=text:{tmp_path}/čeština.txt", "sample.prompts=('Kočka ',)"]
    )
    folder = RunFolder(str(tmp_path / "běh"))
    folder.create()
    folder.write_config(
        {"config": to_dict(config.resolve(257)), "versions": {"jax": "1", "mesh": {}}}
    )
    for step in (1, 2):
        folder.log({"step": step, "split": "train", "loss": 4 / step, "unix_secs": 1e9 + step})
    folder.append(folder.samples_file, "--- step 2 ---\nKočka spala 猫.\n")
    done = run_command(
        "tinylm.report", f"--workdir={tmp_path}/běh", f"--out={tmp_path}/zpráva.html", env=C_LOCALE
    )
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "zpráva.html").read_text(encoding="utf-8")
    assert "<title>běh" in written and json.dumps("Kočka spala 猫.")[1:-1] in written
    (tmp_path / "čeština.txt").write_text("Byla jednou jedna kočka. 猫\n" * 40, encoding="utf-8")
    flags = [
        "--config=tales",
        f"--config.data.source=text:{tmp_path}/čeština.txt",
        "--config.data.tokenizer=char",
    ]
    sizes = [
        "--config.data.seq_len=16",
        "--config.data.batch_size=2",
        "--config.data.packing=stream",
    ]
    done = run_command(
        "tinylm.prepare", *flags, *sizes, env={**C_LOCALE, "XDG_CACHE_HOME": str(tmp_path / "c")}
    )
    assert done.returncode == 0, done.stderr
    assert "held out for validation: the end of the last document, 10.0% of the text" in done.stderr
