"""The config of a run as users meet it: files that return one, overrides on the command line, resolved numbers.

A config is a Python file whose `get_config()` returns a `Config`; ml_collections' config_flags turns
`--config.model.embed_dim=256` into an override. Everything a config file needs is imported from here.
"""

import pathlib
import traceback
from collections.abc import Iterable, Sequence

from absl import flags

from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig
from tinylm.core.settings import nearest, nearest_setting, settings_of
from tinylm.data.config import DataConfig
from tinylm.inference.config import EvalConfig, SampleConfig
from tinylm.model.config import ModelConfig
from tinylm.run.checkpoint import CheckpointConfig
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
    "find_config",
    "load_config",
    "shipped_configs",
]


def shipped_configs() -> pathlib.Path:
    """Return the folder of the configs that ship: beside the package in a checkout, inside it in a wheel."""
    here = pathlib.Path(__file__).resolve().parent
    inside, beside = here / "configs", here.parent / "configs"
    return inside if inside.is_dir() else beside


def find_config(name: str) -> str:
    """Return the path of a config file given by path or by the bare name of one that ships; else raise UserError."""
    path, _, argument = name.partition(":")
    suffix = f":{argument}" if argument else ""
    if pathlib.Path(path).is_file():
        return name
    shipped = shipped_configs() / f"{pathlib.Path(path).name.removesuffix('.py')}.py"
    if shipped.is_file() and pathlib.Path(path).parent.name in ("", "configs"):
        return f"{shipped}{suffix}"
    names = sorted(file.stem for file in shipped_configs().glob("*.py") if file.stem != "__init__")
    raise UserError(f"--config={name} is no file, nor one that ships ({', '.join(names)}){nearest(path, names)}.")


def prepare_arguments(argv: Sequence[str]) -> list[str]:
    """Return `argv` with --config as a path, its overrides behind it; raise UserError for keys that don't exist."""
    known = [key for key, _, _ in settings_of(Config())]
    rest, chosen, overrides = [], [], []
    arguments = iter(argv)
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        if not argument.startswith("-") or name.split(".")[0] != "config":
            rest.append(argument)
            continue
        if not equals:
            value = next(arguments, "")
        if name == "config":
            chosen = [f"--config={find_config(value)}"]
        else:
            _check_key(name.removeprefix("config."), known)
            overrides.append(f"--{name}={value}")
    if overrides and not chosen:
        raise UserError(f"{overrides[0]} needs --config=FILE as well.")
    return [rest[0], *chosen, *overrides, *rest[1:]] if rest else [*chosen, *overrides]


def _check_key(key: str, known: Iterable[str]) -> None:
    if key not in known:
        raise UserError(f"--config.{key} is not a setting{nearest_setting(key) or '.'}")


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Return the checked config of a file or shipped name with overrides like "model.embed_dim=256"."""
    from ml_collections import config_flags

    argv = prepare_arguments(["tinylm", f"--config={name}", *[f"--config.{line}" for line in overrides]])
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    parse_flags(values, argv)
    return checked(holder.value)


def parse_flags(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parse, with one line for what absl or the config file itself refuses; return what is left of `argv`."""
    try:
        return values(list(argv))
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from error
    except Exception as error:  # whatever the user's own file raises
        where = traceback.extract_tb(error.__traceback__)[-1]
        last = str(error).strip().splitlines()[-1] if str(error).strip() else ""
        raise UserError(
            f"the config file fails: {type(error).__name__}: {last} ({where.filename}:{where.lineno})"
        ) from error


def checked(config: Config) -> Config:
    """Return `config` after its checks; raise UserError for what is wrong in it."""
    if not isinstance(config, Config):
        raise UserError(f"get_config() must return a tinylm.config.Config, not {type(config).__name__}.")
    config.check()
    return config
