"""What all commands share: their common flags, and how they start and end.

A command defines its own flags, and calls `run(main, __doc__)`. A UserError becomes one line on
stderr and its exit code; any other exception is a bug of ours and keeps its traceback. In a job of
several processes the line names the process, and none begins before all were found to run the same
command, config and code.
"""

import faulthandler
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from tinylm import config as config_lib
from tinylm.core import distributed, log, platform
from tinylm.core.errors import PeerLost, UserError
from tinylm.core.files import user_cache
from tinylm.core.settings import settings_of

FLAGS = flags.FLAGS

flags.DEFINE_integer(
    "cpu_devices",
    0,
    "simulated CPU devices of this process (0: those that are here)",
    lower_bound=0,
)
flags.DEFINE_string(
    "coordinator",
    "",
    "host:port of process 0, or auto: as the cluster says, which tinylm.main asks by itself",
)
flags.DEFINE_integer("num_processes", 0, "processes of the job, with --coordinator")
flags.DEFINE_integer("process_id", -1, "number of this process, with --coordinator")
flags.DEFINE_float(
    "start_secs", distributed.START_SECS, "how long to wait for the job's other processes to start"
)
_SHARED = ["cpu_devices", "coordinator", "num_processes", "process_id", "start_secs"]


def define_config() -> None:
    """Add --config and its overrides."""
    config_lib.define_config(FLAGS)
    _SHARED.append("config")


def require_config() -> None:
    """Raise UserError where --config was not given."""
    if FLAGS.config is None:
        raise UserError("--config is required, for example --config=tales.")


def config(takes_over: bool = True) -> config_lib.Config:
    """Return the checked config of --config, with the model of the run that `train.init_model`
    takes it from.

    Where a run may be there already, which has all in its own folder, the taking is left to the
    caller (`takes_over`).
    """
    from tinylm.train.init_from import take_over

    require_config()
    chosen = config_lib.checked(FLAGS.config)
    return take_over(chosen)[0] if takes_over else chosen


def resolved_config() -> config_lib.Config:
    """Return the resolved config of --config for a command that reads no text; say how large a
    vocabulary it takes.
    """
    from tinylm.data import known_vocab_size

    chosen = config()
    vocab_size = chosen.model.vocab_size
    if not vocab_size:
        vocab_size, origin = known_vocab_size(chosen.data)
        log.say(f"vocabulary of {vocab_size:,} ids: {origin}")
    return chosen.resolve(vocab_size)


def define_workdir(required: bool = True) -> None:
    """Add --workdir."""
    flags.DEFINE_string("workdir", None, "folder of the run (a path, or a bucket such as gs://...)")
    _SHARED.append("workdir")
    if required:
        require("workdir", "--workdir=runs/tales")


def require(name: str, example: str) -> None:
    """Refuse a command line without a flag, in words that show how it is given."""
    flags.register_validator(
        name, lambda value: value is not None, f"it is required, for example {example}."
    )


def define_json() -> None:
    """Add --json."""
    flags.DEFINE_bool("json", False, "print one JSON object on stdout instead of text")
    _SHARED.append("json")


def run(
    main: Callable[[], None], doc: str | None, joins_cluster: bool = False, resumes: bool = False
) -> None:
    """Parse flags, start JAX, call `main`, and exit with the code that tells how it went.

    A command that `joins_cluster` takes part in the job that its cluster describes; others do where
    --coordinator says so, for a tool that is called in a shell of a cluster's node is alone there.
    With `resumes`, --workdir alone stands for the config of the run that is there.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where its encoding lacks a character of a text
    # What kills the process, as a file of weights that shrinks while it is mapped, is said where.
    faulthandler.enable()
    try:
        _parse(doc or "", resumes)
        distributed.start(
            cpu_devices=FLAGS.cpu_devices,
            coordinator=FLAGS.coordinator,
            num_processes=FLAGS.num_processes,
            process_id=FLAGS.process_id,
            secs=FLAGS.start_secs,
            joins_cluster=joins_cluster,
        )
        distributed.agree(_facts(), FLAGS.start_secs)
        platform.refuse_faulty(jax.default_backend())
        log.start(distributed.is_main())
        if joins_cluster and distributed.is_shell_of_slurm():
            log.say(
                f"this Slurm job has {os.environ['SLURM_NTASKS']} tasks, but this command "
                "was not started by srun and "
                "runs alone here; start it with srun to run on all of them."
            )
        use_compile_cache()
        if (
            signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        ):  # it was nothing but this until here: see tinylm
            signal.signal(signal.SIGINT, signal.default_int_handler)
        main()
        log.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has enough of it
        _forget_output()
    except UserError as error:
        log.flush()
        print(f"error: {distributed.speaker()}{error}", file=sys.stderr, flush=True)
        distributed.leave(error.exit_code)
    except Exception as error:
        if distributed.lost_peer(error):
            line = str(error).splitlines()[0]
            print(
                f"error: {distributed.speaker()}a peer was lost: {line}",
                file=sys.stderr,
                flush=True,
            )
            distributed.leave(PeerLost.exit_code)
        # A bug of ours: the peers of this process must not wait for it.
        print(
            f"{distributed.speaker()}{traceback.format_exc()}", end="", file=sys.stderr, flush=True
        )
        distributed.leave(1)


def print_last(text: str) -> None:
    """Print what a command ends with; where its terminal is gone, nobody reads it."""
    try:
        print(text, flush=True)
    except OSError:
        _forget_output()


def _forget_output() -> None:
    """Send stdout nowhere, so that Python doesn't fail to write the rest of it at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _facts() -> dict[str, Any]:
    """Return what must be the same in every process of a job: flags, config, code."""
    own = {"process_id", "cpu_devices", "config"}
    given = {
        name: FLAGS[name].value
        for name in FLAGS
        if FLAGS[name].present and name.split(".")[0] not in own
    }
    settings = settings_of(FLAGS.config) if "config" in FLAGS and FLAGS.config is not None else []
    config = {f"config.{key}": value for key, _, value in settings}
    return {
        **config,
        **{f"--{name}": value for name, value in given.items()},
        **distributed.code_versions(),
    }


def _parse(doc: str, resumes: bool) -> None:
    if any(
        argument in ("--help", "-help", "-h", "--helpfull", "--helpshort")
        for argument in sys.argv[1:]
    ):
        print(f"{doc.strip()}\n\nFlags:\n{_help()}")
        sys.exit(0)
    sys.argv[:] = config_lib.prepare_arguments(sys.argv, resumes)
    rest = config_lib.parse_flags(FLAGS, sys.argv)
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; flags begin with -- (see --help).")


def _help() -> str:
    """Return a line for each flag of the running command."""
    own = [flag.name for flag in FLAGS.flags_by_module_dict().get(sys.argv[0], [])]
    names = sorted({*own, *_SHARED})
    lines = [f"  --{name:<16} {FLAGS[name].help}" for name in names]
    if "config" in names:
        lines += ["", "Settings, each an override of the config file, with their defaults:"]
        settings = settings_of(config_lib.Config())
        for key, field, value in settings:
            bounds = str(field.metadata["bounds"])
            lines.append(f"  --config.{key}={value!r}")
            lines.append(f"      {field.metadata['doc']}{bounds and f' ({bounds})'}")
    return "\n".join(lines)


def use_compile_cache() -> None:
    """Keep compiled programs in a folder private to the user, where there is a home that can hold
    it.

    A folder that the user has named (JAX_COMPILATION_CACHE_DIR) stays. No program is handed on to
    where it would be wrong: JAX's key of a program holds the version of jaxlib, XLA_FLAGS and what
    the processor can do.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = user_cache()
    if cache is None:
        return
    folder = cache / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
