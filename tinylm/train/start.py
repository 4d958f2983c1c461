"""Starting a run or going on with one: the checks that come before anything is compiled or written."""

from typing import Any

import flax
import jax
import optax
from jax.sharding import Mesh

from tinylm import __version__
from tinylm.core.distributed import is_main
from tinylm.core.errors import UserError
from tinylm.core.mesh import batch_shards, make_mesh
from tinylm.core.settings import differing_keys, from_dict, to_dict
from tinylm.data import open_data
from tinylm.run.folder import RunFolder
from tinylm.train.config import Config
from tinylm.train.init_from import check_origin
from tinylm.train.loop import Trainer
from tinylm.train.state import make_blueprint


def start_run(config: Config, workdir: str) -> Trainer:
    """Return the trainer of the run in `workdir`, new or to be resumed.

    Raises UserError for a config that doesn't fit the devices or the data, or that differs from the run's own in an
    identity setting.
    """
    mesh = make_mesh(config.mesh)
    config.check_mesh(batch_shards(mesh))
    folder = RunFolder(workdir)
    if config.train.deterministic and jax.default_backend() == "gpu":
        raise UserError(
            "train.deterministic on GPU needs XLA_FLAGS=--xla_gpu_deterministic_ops=true; set it and retry."
        )
    data = open_data(config.data, seed=config.seed, is_writer=is_main())
    config.resolve(data.vocab_size)
    if folder.exists():
        check_same_run(config, folder)
    else:
        check_origin(config, data.tokenizer)
    folder.create()
    if is_main():
        data.tokenizer.save(str(folder.tokenizer))
        folder.write_config({"config": to_dict(config), "versions": versions(mesh)})
    jax.set_mesh(mesh)
    blueprint = make_blueprint(config.model, config.optimizer, config.mesh, config.train.num_steps, mesh)
    return Trainer(config, data, mesh, folder, blueprint)


def check_same_run(config: Config, folder: RunFolder) -> None:
    """Raise UserError, naming the keys, where the run in `folder` was made by another config."""
    record = folder.read_config()
    if "imported_from" in record:
        raise UserError(
            f"--workdir={folder.path} holds an imported model; name a new one and set train.init_from={folder.path}."
        )
    theirs = from_dict(Config, record["config"])
    keys = differing_keys(config, theirs)
    if keys:
        values = dict(_flat(to_dict(theirs)))
        ours = dict(_flat(to_dict(config)))
        shown = ", ".join(f"{key} (there {values[key]!r}, here {ours[key]!r})" for key in keys[:4])
        raise UserError(f"--workdir={folder.path} holds another run, which differs in {shown}; use another workdir.")


def versions(mesh: Mesh) -> dict[str, Any]:
    """Return what a run's numbers depend on beside its config."""
    return {
        "tinylm": __version__,
        "jax": jax.__version__,
        "flax": flax.__version__,
        "optax": optax.__version__,
        "device": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
    }


def _flat(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
