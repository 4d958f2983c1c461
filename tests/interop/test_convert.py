"""The command: out, in again, and writing with what came in; flags that make no sense."""

import json

import pytest
from helpers import call_command, run_command
from small import small_model, small_run

from tinylm.interop import models
from tinylm.interop.tensor_files import open_folder
from tinylm.run.open_run import open_run


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ([], "one of --from_hf=DIR, --to_hf=DIR and --from_llama2c=FILE is required"),
        (["--from_hf=a", "--to_hf=b"], "one of --from_hf=DIR"),
        (["--from_hf=nowhere"], "--from_hf=nowhere is not a folder"),
        (["--to_hf=b"], "holds no run"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(tmp_path, flags, wanted):
    done = call_command("tinylm.convert", f"--workdir={tmp_path / 'run'}", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert wanted in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_model_goes_in_writes_and_comes_out_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "transformers_logits", lambda folder, tokens: None)
    models.export_hf(small_run(small_model("gpt_neox")), str(tmp_path / "first"))
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    (tmp_path / "first" / "config.json").write_text(json.dumps(config | {"eos_token_id": [256, 9]}))
    (tmp_path / "first" / "old.safetensors").write_bytes(b"")
    run = f"--workdir={tmp_path / 'run'}"
    done = run_command(
        "tinylm.convert", f"--from_hf={tmp_path / 'first'}", run, "--cpu_devices=4", "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["context"], result["left_out"]) == (
        24,
        ["old.safetensors: a file that transformers does not read"],
    )
    assert open_run(str(tmp_path / "run")).end_ids == (9,)
    done = run_command(
        "tinylm.generate", run, "--prompt=ab", "--max_tokens=12", "--cpu_devices=2", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"][0].startswith("ab")
    done = run_command(
        "tinylm.convert", run, f"--to_hf={tmp_path / 'second'}", "--cpu_devices=2", "--json"
    )
    assert json.loads(done.stdout)["logits"] == "equal after reading back"
    first, second = (open_folder(tmp_path / name) for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)
