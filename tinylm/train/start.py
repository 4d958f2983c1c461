"""Starting a run or going on with one: the checks that come before anything is compiled.

Mistakes are found before anything is written, and another run in the same workdir is never
touched: a resumed run must have the config (in all that changes its numbers), the tokenizer and the
tokens that it was begun with.
"""

import contextlib
import os
import pathlib
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
import optax
from etils import epath
from jax.sharding import Mesh

from tinylm import __version__
from tinylm.core.agreement import (
    agree,
    from_main,
    is_shared,
    leads,
    share_failures,
    wait_for_all,
)
from tinylm.core.distributed import START_SECS, host, is_main
from tinylm.core.errors import StorageError, UserError
from tinylm.core.log import say
from tinylm.core.mesh import make_mesh, sizes_by_name
from tinylm.core.settings import differing_settings, from_dict, to_dict
from tinylm.core.storage import in_bucket
from tinylm.data import Data, open_data, store_names
from tinylm.data.config import differ_in_place
from tinylm.data.stores import note_run, store_folder
from tinylm.data.tokenizers import Tokenizer, load_tokenizer
from tinylm.run.bucket_lock import BucketLock
from tinylm.run.checkpoint import finished_steps
from tinylm.run.folder import RunFolder
from tinylm.run.lock import WorkdirLock
from tinylm.train.config import Config
from tinylm.train.evaluator import check_evaluation, encode_prompts
from tinylm.train.init_from import check_origin, take_over
from tinylm.train.local_steps import fix_workers
from tinylm.train.loop import Trainer
from tinylm.train.optimizer import make_schedule
from tinylm.train.state import make_blueprint

# Stores up to this size are verified whenever a run goes on; larger ones by prepare --verify.
_VERIFIED_BYTES = 1 << 30
# How long to wait for other processes that tell of no progress in preparing their data.
_SILENT_SECS = 1800.0
_DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"


def start_run(config: Config, workdir: str) -> Trainer:
    """Return the trainer of the run in `workdir`, new or to be resumed.

    Args:
      config: checked; it needn't be resolved.
      workdir: a folder, or an address in a bucket. It is the trainer's alone until its run ends.

    Raises:
      UserError: for a config that doesn't fit the devices or the data, or that differs from the
        run's own in an identity setting, and for a workdir in use.
    """
    # A failure of any process ends all of them, until a step is under way.
    with share_failures():
        trainer = _start_run(config, workdir)
        # What fails on another process just now is told within this body, or not at all.
        wait_for_all("to start", _SILENT_SECS)
        return trainer


def _start_run(config: Config, workdir: str) -> Trainer:
    """Do what `start_run` does, on one process of the job."""
    # What needs neither data nor the workdir's lock comes first; nothing is written yet.
    folder = RunFolder(workdir)
    folder.check_checkpoint_dir(config.checkpoint.dir)
    from_main(folder.check_bucket)
    config, tokenizer = take_over(config, folder)
    mesh = make_mesh(config.mesh)
    config.check_mesh(mesh)
    check_deterministic(config)
    check_found_run(config, folder)
    config = fix_workers(config, mesh, recorded_config(folder))
    for line in config.unused():
        say(f"{line}: it changes nothing here")

    data = open_shared_data(config, tokenizer)
    config = config.resolve(data.vocab_size)
    encode_prompts(config, data.tokenizer)
    check_evaluation(config, data)
    if not folder.exists():
        check_origin(config, data.tokenizer)

    folder.create()
    check_shared("--workdir", folder.path)
    # The lock is let go where something fails, or else by the trainer at the end of its run.
    with contextlib.ExitStack() as lock:
        from_main(lambda: take_lock(folder, lock))
        # Between the first look and the lock another process may have begun a run here.
        exists = check_found_run(config, folder)
        if exists:
            check_same_tokenizer(data.tokenizer.fingerprint, folder)
            check_same_stores(data, folder)
        checkpoints = from_main(lambda: folder.place_checkpoints(config.checkpoint.dir))
        folder.checkpoints = epath.Path(checkpoints)
        # Without checkpoint.dir they are in the workdir, in a folder that the first save makes.
        if config.checkpoint.dir:
            check_shared("checkpoint.dir", folder.checkpoints)
        if is_main():
            if not exists:
                data.tokenizer.save(str(folder.tokenizer))
            write_record(config, data, mesh, folder)
        jax.set_mesh(mesh)
        trainer = Trainer(config, data, mesh, folder, make_blueprint(config, mesh))
        trainer.lock = lock.pop_all()
    return trainer


def open_shared_data(config: Config, tokenizer: Tokenizer | None) -> Data:
    """Return the data of a run, the same on all processes of the job.

    Of the processes that see the same folder of stores one prepares them; hosts that share none
    prepare each their own, from the same text.

    Raises:
      UserError: on all processes, where the text, the tokenizer or a store of one differs.
    """
    # Before anything is prepared, which may take hours. Where the stores are in a bucket process 0
    # alone reads the text, and the others are told what it found.
    if jax.process_count() > 1 and not in_bucket(config.data.store_dir):
        agree_on_data(store_names(config.data, tokenizer), _SILENT_SECS)
    is_writer = leads(store_folder(config.data))
    data = open_data(config.data, seed=config.seed, is_writer=is_writer, tokenizer=tokenizer)
    wait_for_all("to prepare their data", _SILENT_SECS)
    facts = {"tokenizer": data.tokenizer.fingerprint[:12]}
    for store in data.every_store:
        facts[f"tokens of {store.spec}"] = store.digest[:12]
    facts["rows of an epoch"] = str(len(data.train))
    facts["rows to evaluate"] = str(data.valid_rows)
    agree_on_data(facts, START_SECS)
    return data


def agree_on_data(facts: dict[str, str], secs: float) -> None:
    """Raise UserError on all processes where the data of one differ from those of process 0."""
    agree(
        facts,
        secs,
        what="has other data than",
        remedy="give every host the same text and tokenizer; where they are the same, remove the "
        "token store of the one that differs",
    )


def check_shared(setting: str, path: epath.Path) -> None:
    """Raise UserError where a folder that all processes write to is not the same on all hosts, or
    where this process can't write to it.
    """
    if in_bucket(path):
        return
    is_same = is_shared(pathlib.Path(path))
    if not os.access(path, os.W_OK):
        raise StorageError(
            f"{setting}={os.fspath(path)} on {host()} can't be written by this user; change its "
            "permissions, or name another folder."
        )
    if is_same:
        return
    # It was made a moment ago, or holds something of an earlier run.
    with contextlib.suppress(OSError):
        os.rmdir(path)
    raise UserError(
        f"{setting}={os.fspath(path)} on {host()} is not the folder that process 0 has under that "
        "name; set it to a bucket (gs://...), or to a folder on a disk that all hosts "
        "share."
    )


def take_lock(folder: RunFolder, lock: contextlib.ExitStack) -> None:
    """Lock the workdir until `lock` is closed; raise UserError where it is in use."""
    kind = BucketLock if in_bucket(folder.path) else WorkdirLock
    lock.callback(kind(folder.path).release)


def write_record(config: Config, data: Data, mesh: Mesh, folder: RunFolder) -> None:
    """Write config.json: the resolved config, and what else the run's numbers depend on."""
    record = {
        "config": to_dict(config),
        "versions": versions(mesh),
        "token_stores": store_digests(data),
    }
    folder.write_config({**record, **folder.checkpoints_note})
    for store in data.every_store:
        note_run(store.folder, os.fspath(folder.path))


def check_deterministic(config: Config) -> None:
    """Raise UserError where bits are to be the same on a GPU, and XLA isn't told so."""
    flags = os.environ.get("XLA_FLAGS", "")
    is_needed = config.train.deterministic and jax.default_backend() == "gpu"
    if is_needed and _DETERMINISTIC_FLAG not in flags:
        raise UserError(
            f"train.deterministic on GPU needs XLA_FLAGS={_DETERMINISTIC_FLAG} in the environment; "
            "set it and retry."
        )


def check_found_run(config: Config, folder: RunFolder) -> bool:
    """Say whether there is a run in `folder`; raise UserError where it isn't that of `config`."""
    if folder.exists():
        check_same_config(config, folder)
        return True
    if finished_steps(folder.checkpoints):
        raise UserError(
            f"--workdir={folder.path} holds checkpoints but no config.json, so nothing tells which "
            "run they belong to; restore config.json, or use another workdir."
        )
    return False


def recorded_config(folder: RunFolder) -> Config | None:
    """Return what the run in `folder` was last started with; None where there is none."""
    if not folder.exists():
        return None
    return from_dict(Config, folder.read_config()["config"])


def check_same_config(config: Config, folder: RunFolder) -> None:
    """Raise UserError, naming the keys, where the run in `folder` was made by another config.

    A config that isn't resolved yet is compared as it would be with the vocabulary of that run.
    With patience, when to evaluate decides when the run ends, so it must stay. Where files lie may
    differ; `check_same_stores` compares what is in them.
    """
    record = folder.read_config()
    if "imported_from" in record:
        raise UserError(
            f"--workdir={folder.path} holds an imported model; name a new one and set "
            f"train.init_from={folder.path}."
        )
    theirs = from_dict(Config, record["config"])
    resolved = config.resolve(config.model.vocab_size or theirs.model.vocab_size)
    decisive = ("eval.every_steps", "eval.max_batches") if config.eval.patience else ()
    differing = [
        (key, here, there)
        for key, here, there in differing_settings(resolved, theirs, decisive)
        if not differ_in_place(key, here, there)
    ]
    if [key for key, _, _ in differing] == ["train.num_steps"]:
        check_length(resolved, theirs, folder)
        return
    if differing:
        shown = ", ".join(
            f"{key} (there {there!r}, here {here!r})" for key, here, there in differing[:4]
        )
        raise UserError(
            f"--workdir={folder.path} holds another run, which differs in {shown}; use another "
            "workdir."
        )


def check_length(config: Config, theirs: Config, folder: RunFolder) -> None:
    """Raise UserError unless a run of another length would have taken the same steps up to here.

    It would where the learning rate of each of them is the same: always with a constant schedule,
    and with wsd (warm-up, stable, decay) up to the first step at which one of the two decays.
    """
    there = theirs.train.num_steps
    here = config.train.num_steps
    taken = max(finished_steps(folder.checkpoints), default=0)
    # Where nothing was saved, metrics of steps that were lost are there all the same.
    steps = jnp.arange(taken or min(there, here))
    rates_there = make_schedule(theirs.optimizer, there)(steps)
    rates_here = make_schedule(config.optimizer, here)(steps)
    # What counts for patience is an evaluation at the last step too, which a longer run would not
    # have made.
    same_evaluations = not config.eval.patience or taken < there
    if taken <= here and same_evaluations and bool(jnp.all(rates_there == rates_here)):
        return
    raise UserError(
        f"--workdir={folder.path} holds another run: it has train.num_steps={there} (here {here}), "
        "on which the steps that it took depend with "
        f"optimizer.schedule={theirs.optimizer.schedule}. A run can be made longer with a constant "
        "schedule, or with wsd before it decays; to go on from these weights, start another run "
        f"(--workdir) with train.init_from={folder.path}."
    )


def check_same_tokenizer(fingerprint: str, folder: RunFolder) -> None:
    """Raise UserError where the run in `folder` learned with another tokenizer."""
    if load_tokenizer(str(folder.tokenizer)).fingerprint != fingerprint:
        raise UserError(
            f"--workdir={folder.path} holds a run with another tokenizer: the text it learned from "
            "changed."
        )


def check_same_stores(data: Data, folder: RunFolder) -> None:
    """Raise UserError where the run in `folder` read other tokens, StorageError where their files
    were altered.

    What counts is the content of the token stores, not their names or where the text lies.
    """
    record = folder.read_config()
    there = list(record.get("token_stores", {}).values())
    if not there and "stores" in record:
        say(
            "this run was begun by an older tinylm, which noted its tokens in another way; they "
            "are not compared"
        )
    here = list(store_digests(data).values())
    for i, store in enumerate(data.every_store):
        if there and there[i : i + 1] != here[i : i + 1]:
            raise UserError(
                f"{store.spec} doesn't give the tokens that the run in --workdir={folder.path} "
                "learned from: its content changed since; restore it, or use another workdir."
            )
        if store.num_bytes < _VERIFIED_BYTES:
            store.verify()
    if there and len(there) != len(here):
        raise UserError(
            f"--workdir={folder.path} holds a run that read other data; use another workdir."
        )


def store_digests(data: Data) -> dict[str, str]:
    """Return a digest of the content of each token store, by the store's name."""
    return {store.folder.name: store.digest for store in data.every_store}


def versions(mesh: Mesh) -> dict[str, Any]:
    """Return what a run's numbers depend on besides its config."""
    return {
        "tinylm": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "flax": flax.__version__,
        "optax": optax.__version__,
        "device": mesh.devices.flat[0].device_kind,
        "mesh": sizes_by_name(mesh),
    }
