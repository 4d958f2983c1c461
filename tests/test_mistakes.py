"""Every mistake a user can make ends in one clear line, before anything is compiled or written."""

import json
import logging
import pathlib
import re
import signal
import sys

import jax
import pytest
from absl import flags
from helpers import ROOT, call_command, run_command

from tinylm import __main__ as script
from tinylm import show
from tinylm.config import Config, define_config, load_config, parse_flags, prepare_arguments
from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.core.optional import optional_module
from tinylm.core.settings import to_dict
from tinylm.run.folder import RunFolder

MISTAKES = {
    "bucket that lost a slash": (
        ["data.store_dir=gs:/b/x"],
        "data.store_dir=gs:/b/x must be gs://b/x for a bucket",
    ),
    "tfds in a bucket": (
        ["data.tfds_data_dir=s3://b"],
        "data.tfds_data_dir=s3://b must be a file or folder on a disk",
    ),
    "files of tfds in a bucket": (
        ["data.tfds_manual_dir=gs://b"],
        "data.tfds_manual_dir=gs://b must be a file or",
    ),
    "text in a bucket that lost a slash": (
        ["data.source=text:gs:/b/*.txt"],
        "data.source=gs:/b/*.txt must be gs://b/*.txt for a bucket",
    ),
    "tokenizer in a bucket": (
        ["data.tokenizer=hf:gs://b/t.json"],
        "data.tokenizer=gs://b/t.json must be a file or",
    ),
    "checkpoints": (
        ["checkpoint.dir=gs:/b/x"],
        "checkpoint.dir=gs:/b/x must be gs://b/x for a bucket, or a folder",
    ),
    "unknown key": (["model.embd_dim=3"], "did you mean 'model.embed_dim'"),
    "unknown section": (["modl.embed_dim=3"], "did you mean 'model.embed_dim'"),
    "wrong type": (["model.embed_dim=wide"], "--config.model.embed_dim=wide"),
    "heads": (["model.embed_dim=30", "model.num_heads=4"], "model.embed_dim=30 must be divisible"),
    "kv heads": (["model.num_kv_heads=3"], "model.num_kv_heads=3"),
    "more experts a token than there are": (
        ["model.num_experts=4", "model.experts_per_token=5"],
        "model.experts_per_token=5 must be at most model.num_experts=4",
    ),
    "dense layers alone": (
        ["model.num_experts=4", "model.dense_layers=3"],
        "model.dense_layers=3 must be below model.num_layers=3",
    ),
    "biased experts": (["model.num_experts=4", "model.bias=true"], "set model.mlp_bias=False"),
    "experts that are whole on each device": (
        ["model.num_experts=4", "model.expert_parallel=true"],
        "model.expert_parallel needs mesh.fsdp=True",
    ),
    "width of experts that are not there": (
        ["model.expert_dim=64"],
        "model.expert_dim=64 is for models with experts; set model.num_experts",
    ),
    "tokens sent to experts that are not there": (
        ["mesh.fsdp=true", "model.expert_parallel=true"],
        "model.expert_parallel=True is for models with experts; set model.num_experts",
    ),
    "syncs of workers that are not there": (
        ["train.outer_momentum=0.5"],
        "train.outer_momentum=0.5 is for workers that train by themselves; set train.sync_every",
    ),
    "decay of a schedule that has none": (
        ["optimizer.decay_fraction=0.5"],
        "optimizer.decay_fraction=0.5 is for optimizer.schedule=wsd (here linear)",
    ),
    "scales of a norm that is off": (
        ["model.qk_norm=false", "model.qk_norm_scale=head"],
        "model.qk_norm_scale=head needs model.qk_norm=True",
    ),
    "choice": (["model.norm=batchnorm"], "must be one of layernorm, rmsnorm"),
    "warm-up": (["optimizer.warmup_steps=5000"], "optimizer.warmup_steps=5000 must be at most"),
    "accumulation": (
        ["train.accumulation_steps=7"],
        "must be divisible by train.accumulation_steps=7",
    ),
    "context": (["model.context=8"], "must be at most model.context=8"),
    "dropout": (["model.dropout=1.5"], "model.dropout=1.5"),
    "temperature": (["sample.temperature=-1"], "sample.temperature=-1.0 must be at least 1e-06"),
    "prompts": (["sample.prompts=(1,)"], "sample.prompts=1 must be a text"),
    "top_p": (["sample.top_p=0"], "sample.top_p=0.0 must be above 0"),
    "mesh": (["mesh.data=-1", "mesh.model=-1"], "only one axis"),
    "window": (
        ["model.num_layers=3", "model.attention_window=(0, 4)"],
        "model.num_layers=3 must be divisible",
    ),
    "no number": (["train.hang_secs=inf"], "train.hang_secs=inf must be a finite number"),
    "below 0": (["model.norm_epsilon=-1"], "model.norm_epsilon=-1.0 must be at least 0"),
    "too long": (
        ["train.num_steps=3000000000"],
        "train.num_steps=3000000000 must be at least 1 and below 2^31",
    ),
    "schedule": (["optimizer.schedule=cosin"], "must be one of cosine"),
    "nearest choice": (["optimizer.schedule=cosin"], "wsd; did you mean 'cosine'?"),
    "one tap": (["model.conv_taps=1"], "model.conv_taps=1 must be at least 2, or 0"),
    "epsilon": (["optimizer.epsilon=0"], "optimizer.epsilon=0.0 must be at least 1e-30"),
    "tiny epsilon": (["optimizer.epsilon=1e-50"], "optimizer.epsilon=1e-50 must be at least 1e-30"),
    "decay that float32 rounds to 1": (
        ["optimizer.beta1=0.99999999999"],
        "must be at least 0 and at most 0.999999",
    ),
    "nearly all dropped": (
        ["model.dropout=0.9999999"],
        "model.dropout=0.9999999 must be at least 0 and at most 0.99",
    ),
    "soft limit that float32 rounds to 0": (
        ["model.logit_softcap=1e-50"],
        "must be at least 1e-06, or 0",
    ),
    "no rotation": (["model.rotary_fraction=0.01"], "must be even and at least 2"),
    "factor without scaling": (
        ["model.rotary_factor=4.0"],
        "model.rotary_factor=4.0 is for model.rotary_scaling=linear or llama3 or yarn (here none)",
    ),
    "scaling without rotation": (
        ["model.rotary_scaling=yarn", "model.position=learned"],
        "model.rotary_scaling=yarn needs model.position=rotary (here learned)",
    ),
    "blend that ends before it begins": (
        ["model.rotary_scaling=llama3", "model.rotary_fast_turns=1.0"],
        "model.rotary_fast_turns=1.0 must be above model.rotary_slow_turns=1.0",
    ),
    "rows longer than positions count": (
        ["data.seq_len=3000000000"],
        "data.seq_len=3000000000 must be",
    ),
    "cudnn in float32": (
        ["model.attention=cudnn"],
        "model.attention=cudnn needs model.compute_dtype=bfloat16 (here f",
    ),
    "cudnn with large heads": (
        ["model.attention=cudnn", "model.compute_dtype=bfloat16", "model.embed_dim=1024"],
        (
            "model.attention=cudnn needs a head size of at most 128 that 8 divides "
            "(model.head_dim, here 256)"
        ),
    ),
    "cudnn with dropout": (
        ["model.attention=cudnn", "model.compute_dtype=bfloat16", "model.dropout=0.1"],
        "model.attention=cudnn needs model.dropout=0 (here 0.1); or set model.attention=auto",
    ),
    "splash on short rows": (
        ["model.attention=splash"],
        "model.attention=splash needs a data.seq_len that 128 divides",
    ),
    "splash with local heads": (
        [
            "model.attention=splash",
            "data.seq_len=128",
            "model.local_heads=2",
            "model.attention_window=8",
        ],
        "model.attention=splash needs model.local_heads=0 (here 2)",
    ),
    "rows that the mesh doesn't divide": (
        ["data.seq_len=132", "mesh.context=4"],
        "data.seq_len=132 must be divisible by twice mesh.context (4)",
    ),
    "another program's name": (
        ["block_size=64"],
        "--config.block_size is not a setting; did you mean 'data.seq_len'?",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_config_is_one_line(name):
    overrides, wanted = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        load_config("tales", overrides)
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "name", [path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__"]
)
def test_every_config_that_ships_is_sound_and_opens_with_its_command(name):
    assert not load_config(name).unused()
    assert f"--config=configs/{name}.py" in (ROOT / "configs" / f"{name}.py").read_text()


def test_what_an_override_turns_off_may_keep_its_settings_and_is_told():
    turned_off = ["optimizer.name=adamw", "model.local_heads=2", "model.position=learned"]
    turned_off += ["model.rotary_base=500.0", "optimizer.schedule=constant"]
    turned_off += ["eval.answer_pattern=(.+)"]
    assert load_config("tales", turned_off).unused() == [
        "optimizer.adam_learning_rate=0.005 is for optimizer.name=muon",
        "optimizer.min_ratio=0.0 is for schedules that decay",
        "model.rotary_base=500.0 is for model.position=rotary",
        "model.local_heads=2 is for a model.attention_window",
        "eval.answer_pattern=(.+) is for eval.exact_match",
    ]


def test_a_default_may_be_given_where_it_changes_nothing():
    given = ["model.num_experts=0", "model.experts_per_token=2", "model.expert_parallel=false"]
    given += ["train.outer_momentum=0.9", "optimizer.decay_fraction=0.2"]
    assert load_config("tales", given) == load_config("tales")


@pytest.mark.parametrize("name", ["tinystories", "llama"])
def test_a_config_of_several_sizes_names_them(name):
    with pytest.raises(UserError, match=f"{name}:7b must end in one of .*m") as caught:
        load_config(f"{name}:7b")
    assert "\n" not in str(caught.value)
    assert (
        load_config(f"{name}.py:{'1m' if name == 'tinystories' else '42m'}").model.num_layers == 8
    )


def test_a_missing_config_names_those_that_ship():
    with pytest.raises(
        UserError, match=r"not a file, nor one that ships .*tales.*did you mean 'tales'"
    ):
        load_config("talse")


def test_a_config_that_fails_is_one_line(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match=rf"the config file fails: .*division by zero \({path}:2\)"):
        load_config(str(path))


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("report --workdir=runs/a --out=gs:/b/a.html", "--out=gs:/b/a.html must be gs://b/a.html"),
        ("generate --workdir=runs/a --prompt_file=gs://b/p", "--prompt_file=gs://b/p must be a f"),
        ("convert --workdir=runs/a --to_hf=gs://b/x", "--to_hf=gs://b/x must be a file or folder"),
        ("convert --workdir=runs/a --from_hf=gs://b/x", "--from_hf=gs://b/x must be a file or"),
        ("convert --workdir=a --from_llama2c=gs://b/x", "--from_llama2c=gs://b/x must be a file"),
        ("bench --config=tales --profile=gs://b/x", "--profile=gs://b/x must be a file or folder"),
    ],
)
def test_a_bucket_where_none_is_supported_is_one_line(command, wanted):
    done = call_command(*f"tinylm.{command}".split())
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {wanted}")
    assert done.stderr.count("\n") == 1


BODIES = {
    "return {'data': 1}": r"^get_config\(\) must return a tinylm.config.Config, not dict",
    "import ml_collections; return ml_collections.ConfigDict()": "must return a tinylm.config.Config, not ConfigDict",
    "pass": r"not NoneType \(is its return statement missing\?\)",
    "c.train.max_steps = 5; return c": "own.py:4: train.max_steps is not a setting; did you mean 'train.num_steps'",
    "c.evla.patience = 5; return c": r"evla is not a setting; did you mean 'eval'\? \(.*own.py:4\)",
    "return tinylm.config.TrainConfig(max_iters=5)": "own.py:4: train.max_iters is not a setting; did you mean",
    "return open('nowhere')": r"the config file fails: FileNotFoundError: .*nowhere.* \(.*own.py:4\)",
    "return 1 + 'a'": r"the config file fails: TypeError: .* \(.*own.py:4\)",
    "return (": r"the config file fails: SyntaxError: .* \(.*own.py:4\)",
}


@pytest.mark.parametrize("overrides", [[], ["train.num_steps=3", "sample.prompts=a"]])
@pytest.mark.parametrize("body", BODIES)
def test_a_config_file_that_returns_no_config_is_one_line(tmp_path, body, overrides):
    path = tmp_path / "own.py"
    path.write_text(
        f"import tinylm.config\nc = tinylm.config.Config()\ndef get_config():\n    {body}\n"
    )
    with pytest.raises(UserError, match=BODIES[body]) as caught:
        load_config(str(path), overrides)
    assert "\n" not in str(caught.value)


def test_a_config_file_without_get_config_says_so(tmp_path):
    path = tmp_path / "own.py"
    path.write_text("config = 3\n")
    with pytest.raises(UserError, match=r"own.py: it must define get_config\(\)"):
        load_config(str(path))


def test_the_config_of_a_run_is_a_config(tmp_path):
    config = load_config("tales", ["model.embed_dim=64"]).resolve(1024)
    RunFolder(str(tmp_path)).write_config({"config": to_dict(config), "versions": {"mesh": {}}})
    again = load_config(f"{tmp_path}/config.json", ["data.batch_size=8"])
    assert (again.model, again.data.batch_size) == (config.model, 8)


def test_a_tuple_and_a_bool_can_be_overridden():
    config = load_config(
        "tales", ["model.attention_window=(0, 4, 4)", "mesh.fsdp=true", "sample.prompts=('a b',)"]
    )
    assert (config.model.attention_window, config.mesh.fsdp, config.sample.prompts) == (
        (0, 4, 4),
        True,
        ("a b",),
    )


@pytest.mark.parametrize(
    ("mesh", "wanted"),
    [
        (MeshConfig(data=16), "mesh of 16 devices .* larger than the 8 devices"),
        (MeshConfig(model=3), "8 devices are not divisible by 3"),
        (MeshConfig(data=0), "mesh.data=0 must be at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, wanted):
    with pytest.raises(UserError, match=wanted):
        make_mesh(mesh)


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    config = load_config("tales", ["data.batch_size=30"])
    with pytest.raises(
        UserError, match=r"data.batch_size=30 must be divisible by the data axis \(8\)"
    ):
        config.check_mesh(make_mesh(MeshConfig()))


@pytest.mark.parametrize(("length", "parts"), [(36, 8), (24, 8), (64, 3)])
def test_rows_that_the_mesh_does_not_divide_are_refused(length, parts):
    """Else each device would have whole rows, or the last one most of the work. Only the mesh tells
    how many devices -1 stands for.
    """
    config = load_config("tales", [f"data.seq_len={length}", "mesh.context=-1", "mesh.data=1"])
    wanted = rf"data.seq_len={length} must be divisible by twice mesh.context \({parts}\)"
    mesh = make_mesh(config.mesh, jax.devices()[:parts])
    with pytest.raises(UserError, match=wanted):
        config.check_mesh(mesh)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--config=tales", "--config.model.embed_dim=wide"], "embed_dim=wide"),
        (["--config=talse"], "did you mean 'tales'"),
        (
            ["--config=tales", "--wrokdir=x"],
            "--wrokdir is not a flag of this command; did you mean '--workdir'?",
        ),
        (
            ["--config=tales", "--n_layer=3", "--wrokdir=x"],
            "; did you mean '--config.model.num_layers'?",
        ),
        (
            ["--config=tales", "--cpu_devices=2", "--config.mesh.data=4"],
            "larger than the 2 devices",
        ),
        (["--config=tales", "--cpu_devices=-1"], "--cpu_devices=-1"),
        ([], "holds no run to go on with; give --config for a new one"),
    ],
)
def test_the_command_exits_with_2_and_one_line(arguments, wanted, tmp_path):
    # Only a process of its own can see another number of devices than this one.
    command = run_command if "--cpu_devices=2" in arguments else call_command
    done = command(
        "tinylm.main",
        *arguments,
        *([] if "--wrokdir=x" in arguments else [f"--workdir={tmp_path}/run"]),
    )
    assert done.returncode == 2
    assert wanted in done.stderr
    assert done.stderr.strip().count("\n") == 0
    assert done.stdout == ""
    assert not (pathlib.Path(tmp_path) / "run").exists()


@pytest.mark.parametrize(
    ("unknown", "defined", "wanted"),
    [
        ("--start=a", "prompt", "--start is not a flag of this command; did you mean '--prompt'?"),
        ("--max_new_tokens=9", "max_tokens", "did you mean '--max_tokens'?"),
        ("--out_dir=x", "workdir", "did you mean '--workdir'?"),
        ("--tempreature=1", "temperature", "did you mean '--temperature'?"),
        ("--block_size=9", "", "did you mean '--config.data.seq_len'?"),
        ("--learning_rate=9", "", "did you mean '--config.optimizer.learning_rate'?"),
    ],
)
def test_a_flag_of_another_program_leads_to_ours(unknown, defined, wanted):
    values = flags.FlagValues()
    if defined:
        flags.DEFINE_string(defined, None, "", flag_values=values)
    else:
        define_config(values, ["tool"])
    with pytest.raises(UserError) as caught:
        parse_flags(values, ["tool", unknown])
    assert wanted in str(caught.value)


def test_a_workdir_alone_gives_the_config_of_its_run(tmp_path):
    RunFolder(str(tmp_path)).write_config(
        {"config": to_dict(Config().resolve(257)), "versions": {"mesh": {}}}
    )
    file = f"--config={tmp_path}/config.json"
    for given in ([f"--workdir={tmp_path}"], ["--workdir", str(tmp_path)]):
        assert prepare_arguments(["main", *given], resumes=True) == ["main", file, *given]
    longer = "--config.train.stop_step=9"
    assert prepare_arguments(["main", longer, *given], resumes=True) == [
        "main",
        file,
        longer,
        *given,
    ]
    assert prepare_arguments(["main", "--config=tales", *given], resumes=True)[1].endswith(
        "tales.py"
    )


def test_help_names_every_flag():
    done = call_command("tinylm.main", "--help")
    assert done.returncode == 0
    for flag in ("--config", "--workdir", "--cpu_devices", "--coordinator"):
        assert flag in done.stdout


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        UserError, match=r"needs the package sentencepiece: pip install 'tinylm\[tokens\]'"
    ):
        optional_module("sentencepiece", "tokens")


def test_commands_follow_each_other_in_one_process_and_leave_it_as_it_was(capfd):
    """Each has flags of its own, and the caller's handlers, mesh and log stay."""
    before = [
        signal.getsignal(signal.SIGTERM),
        jax.sharding.get_mesh(),
        logging.getLogger("jax").level,
        logging.getLogger("tinylm").handlers,
    ]
    settings = ["--config.model.embed_dim=32", "--config.model.num_layers=1"]
    assert show.main(["--config=tales", *settings, "--json"]) == 0
    small = json.loads(capfd.readouterr().out)
    assert show.main(["--config=tales", "--json", "--library_logs"]) == 0
    large = json.loads(capfd.readouterr().out)
    assert small["num_parameters"] < large["num_parameters"]
    assert show.main(["--config=tales", "--cpu_devices=3"]) == 2
    assert "--cpu_devices=3 comes too late: JAX has 8 cpu devices" in capfd.readouterr().err
    assert before == [
        signal.getsignal(signal.SIGTERM),
        jax.sharding.get_mesh(),
        logging.getLogger("jax").level,
        logging.getLogger("tinylm").handlers,
    ]


def test_the_script_lists_the_commands_and_names_the_nearest(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tinylm"])
    assert script.main() == 0
    listed = re.findall(r"^  (\w+) +\w", capsys.readouterr().out, re.M)
    assert listed == list(script.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["tinylm", "trian", "--config=tales"])
    assert script.main() == 2
    assert "did you mean 'train'" in capsys.readouterr().err
