"""The config of a run as users meet it: files that return one, and overrides on the command line.

A config is a Python file whose `get_config()` returns a `Config`, or the config.json of a run;
ml_collections' config_flags turns `--config.model.embed_dim=256` into an override. Everything a
config file needs is imported from here.
"""

import ast
import importlib.util
import pathlib
import traceback
from collections.abc import Sequence
from typing import Any

from absl import flags

from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig
from tinylm.core.settings import from_dict, meant_setting, nearest, nearest_setting, settings_of
from tinylm.data.config import DataConfig
from tinylm.inference.config import EvalConfig, SampleConfig
from tinylm.model.config import ModelConfig
from tinylm.run.checkpoint import CheckpointConfig
from tinylm.run.folder import RunFolder
from tinylm.train.config import Config, OptimizerConfig, TrainConfig, WritersConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "SampleConfig",
    "TrainConfig",
    "WritersConfig",
    "define_config",
    "find_config",
    "load_config",
    "shipped_configs",
]

# The config of a run, which the run writes into its folder.
RUN_CONFIG = "/config.json"

# What other programs call a flag of ours; names of settings lead to these by themselves.
FLAG_ALIASES = {
    "start": "prompt",
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "num_return_sequences": "num_samples",
    "out_dir": "workdir",
    "output_dir": "workdir",
    "base_output_directory": "workdir",
    "logdir": "workdir",
    "checkpoint": "step",
    "eval_iters": "max_batches",
    "limit": "max_batches",
}


def shipped_configs() -> pathlib.Path:
    """Return the folder of the configs that ship: in a wheel inside the package, or next to it."""
    package = pathlib.Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def find_config(name: str) -> str:
    """Return the path of a config file, which may carry an argument as in `tinystories:33m`.

    Args:
      name: a path, or the bare name of a config that ships.

    Raises:
      UserError: where there is neither.
    """
    if name.endswith(RUN_CONFIG):
        return name
    given, _, argument = name.partition(":")
    path = pathlib.Path(given)
    if path.is_file():
        return name
    bare_name = path.name.removesuffix(".py")
    shipped = shipped_configs() / f"{bare_name}.py"
    if shipped.is_file() and path.parent.name in ("", "configs"):
        suffix = f":{argument}" if argument else ""
        return f"{shipped}{suffix}"
    names = [file.stem for file in shipped_configs().glob("*.py")]
    names = sorted(set(names) - {"__init__"})
    hint = nearest(given, names) or "."
    raise UserError(f"--config={name} is not a file, nor one that ships ({', '.join(names)}){hint}")


def prepare_arguments(argv: Sequence[str], resumes: bool = False) -> list[str]:
    """Return `argv` as config_flags wants it: --config with a path, its overrides behind it.

    Args:
      argv: a command line, the program's name first.
      resumes: whether --workdir alone stands for the config of the run that is there.

    Raises:
      UserError: for a config or a setting that doesn't exist.
    """
    kinds = {key: field.type for key, field, _ in settings_of(Config())}
    rest = []
    chosen = []
    overrides = []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or name.split(".")[0] != "config":
            rest.append(argument)
            continue
        key = name.removeprefix("config.")
        kind = kinds.get(key)
        if not equals:
            # As with any other flag of absl, --config.mesh.fsdp alone means true.
            value = "true" if kind is bool else next(arguments, "")
        if name == "config":
            chosen = [f"--config={find_config(value)}"]
            continue
        if kind is None:
            raise UserError(f"--config.{key} is not a setting{nearest_setting(key) or '.'}")
        if kind == tuple[str, ...] and not _is_text_literal(value):
            value = repr(value)
        overrides.append(f"--{name}={value}")
    if resumes and not chosen:
        chosen = _config_of_workdir(rest)
    if overrides and not chosen:
        raise UserError(f"{overrides[0]} needs --config=FILE as well.")
    return [*rest[:1], *chosen, *overrides, *rest[1:]]


def _config_of_workdir(arguments: Sequence[str]) -> list[str]:
    """Return --config with the config of the run in --workdir, or nothing where none is named."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or name != "workdir":
            continue
        workdir = value
        if not equals:
            # The folder is the next argument, if there is one.
            workdir = "".join(arguments[place + 1 : place + 2])
        folder = RunFolder(workdir)
        if not folder.exists():
            raise UserError(
                f"--workdir={workdir} holds no run to go on with; give --config for a new one."
            )
        return [f"--config={folder.path}{RUN_CONFIG}"]
    return []


def _is_text_literal(value: str) -> bool:
    """Say whether a value is a text or several as Python writes them, not a text as it stands."""
    try:
        return isinstance(ast.literal_eval(value), str | tuple | list)
    except (ValueError, SyntaxError):
        return False


class _ConfigFiles(flags.ArgumentParser):
    """What absl makes of the value of --config: the `Config` that the file returns."""

    def parse(self, argument: str) -> Config:
        """Read a config file."""
        return read_config_file(argument)

    def flag_type(self) -> str:
        """Return how absl names the type."""
        return "config file"


def define_config(values: flags.FlagValues, argv: Sequence[str] | None = None) -> Any:
    """Define --config and its overrides among the flags of `values`.

    config_flags makes a flag of each override that it finds in `argv`. We read the file ourselves,
    to report what is wrong in it in one line.
    """
    from ml_collections import config_flags

    help_line = (
        "a config file, the name of one that ships, or a run's config.json; --config.KEY=VALUE "
        "overrides"
    )
    holder = config_flags.DEFINE_config_file(
        "config", None, help_line, flag_values=values, sys_argv=argv
    )
    values["config"].parser = _ConfigFiles()
    return holder


def read_config_file(name: str) -> Config:
    """Return what `get_config()` of a Python file returns, or the config of a run.

    Raises:
      UserError: in one line, whatever goes wrong in the file.
    """
    if name.endswith(RUN_CONFIG):
        record = RunFolder(name.removesuffix(RUN_CONFIG)).read_config()
        return from_dict(Config, record["config"])
    path, _, argument = name.partition(":")
    spec = importlib.util.spec_from_file_location("tinylm_config_file", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path} must be a Python file (.py), or a run's config.json.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError("it must define get_config(), which returns a tinylm.config.Config")
        found = module.get_config(argument) if argument else module.get_config()
    except Exception as error:  # whatever the user's own file raises
        raise UserError(_failure(error, path)) from error
    return checked_type(found)


def _failure(error: Exception, path: str) -> str:
    """Return the line about an error that a config file raised, with the place in the file."""
    where = path
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == path:
            where = f"{path}:{frame.lineno}"
    if isinstance(error, SyntaxError):
        where = f"{error.filename}:{error.lineno}"
    if isinstance(error, UserError):
        return f"{where}: {error}"
    last_line = str(error).strip().rpartition("\n")[2]
    return f"the config file fails: {type(error).__name__}: {last_line} ({where})"


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Return the checked config of a file or shipped name.

    Args:
      name: as --config takes it.
      overrides: such as "model.embed_dim=256".
    """
    flags_of_settings = [f"--config.{line}" for line in overrides]
    argv = prepare_arguments(["tinylm", f"--config={name}", *flags_of_settings])
    values = flags.FlagValues()
    holder = define_config(values, argv)
    parse_flags(values, argv)
    return checked(holder.value)


def parse_flags(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parse, with one line for what absl or the config refuses; return what is left of `argv`."""
    try:
        return values(list(argv))
    except flags.UnrecognizedFlagError as error:
        name = error.flagname
        raise UserError(
            f"--{name} is not a flag of this command{_flag_meant(name, values) or '.'}"
        ) from error
    except flags.Error as error:
        # absl wraps what a parser raises.
        if isinstance(error.__context__, UserError):
            raise error.__context__ from None
        raise UserError(" ".join(str(error).split())) from error


def _flag_meant(name: str, values: flags.FlagValues) -> str:
    """Return "; did you mean --X?" for what an unknown flag means, or nothing."""
    alias = FLAG_ALIASES.get(name, "")
    if alias in values:
        return f"; did you mean '--{alias}'?"
    setting = meant_setting(name)
    if setting and "config" in values:
        return f"; did you mean '--config.{setting}'?"
    return nearest(f"--{name}", [f"--{flag}" for flag in values])


def checked_type(config: Any) -> Config:
    """Return `config` if it is a Config; raise UserError for another type."""
    if not isinstance(config, Config):
        hint = " (is its return statement missing?)" if config is None else ""
        raise UserError(
            f"get_config() must return a tinylm.config.Config, not {type(config).__name__}{hint}."
        )
    return config


def checked(config: Config) -> Config:
    """Return `config` after its checks; raise UserError for what is wrong in it."""
    checked_type(config).check()
    return config
