"""What all commands share: their common flags, and how they start and end.

A module that is a command holds a `Command`, and `main(argv=None)`, which hands it to `run` and
returns the exit code. So a command is called in three ways: `python -m tinylm.generate --flags`,
`tinylm generate --flags`, and `tinylm.generate.main(["--flags"])` from Python. Each call parses
into a `FlagValues` of its own, so one process can call several commands, one after another.

A UserError becomes one line on stderr and its exit code; any other exception is a bug of ours and
keeps its traceback. In a job of several processes the line names the process, and none begins
before all were found to run the same command, config and code.
"""

import contextlib
import dataclasses
import faulthandler
import gc
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import flags as absl_flags
from absl.flags import FlagValues

from tinylm import config as config_lib
from tinylm.core import agreement, distributed, log, platform, storage
from tinylm.core.errors import PeerLost, StorageError, UserError
from tinylm.core.files import user_cache
from tinylm.core.settings import settings_of
from tinylm.core.signals import SIGNALS

_HELP = {"--help", "-help", "-h", "--helpfull", "--helpshort"}

# The flags of one process of a job, which differ from the other processes' or are compared apart.
_OF_ONE_PROCESS = {"process_id", "cpu_devices", "config"}


def _no_flags(flags: FlagValues) -> None:
    """Define nothing, for a command without flags of its own."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of tinylm.

    Attributes:
      doc: what `--help` prints above the flags.
      run: does the work; it is given the parsed flags, and returns the exit code (None: 0).
      define_flags: adds the command's own flags.
      has_config: whether it takes --config and its overrides.
      resumes: whether --workdir alone stands for the config of the run that is there.
      joins_cluster: whether it takes part in the job that its cluster describes. Others do where
        --coordinator says so: a tool that is called in a shell of a cluster's node is alone there.
      on_cpu: whether it leaves accelerators alone, which others need or which aren't there.
    """

    doc: str | None
    run: Callable[[FlagValues], int | None]
    define_flags: Callable[[FlagValues], None] = _no_flags
    has_config: bool = False
    resumes: bool = False
    joins_cluster: bool = False
    on_cpu: bool = False

    def flags(self, arguments: Sequence[str] = ()) -> FlagValues:
        """Return all flags of the command, unparsed; `arguments` tell which settings are flags."""
        flags = FlagValues()
        _define_shared(flags)
        if self.has_config:
            config_lib.define_config(flags, ["tinylm", *arguments])
        self.define_flags(flags)
        return flags

    def parse(self, arguments: Sequence[str]) -> FlagValues:
        """Return the flags with their values; raise UserError where they are wrong."""
        arguments = config_lib.prepare_arguments(["tinylm", *arguments], self.resumes)[1:]
        flags = self.flags(arguments)
        rest = config_lib.parse_flags(flags, ["tinylm", *arguments])
        if len(rest) > 1:
            raise UserError(f"{rest[1]!r} is not a flag; flags begin with -- (see --help).")
        return flags

    def help(self) -> str:
        """Return what `--help` prints: what the command does, its flags, and all settings."""
        flags = self.flags()
        lines = [(self.doc or "").strip(), "", "Flags:"]
        for name in sorted(flags):
            lines.append(f"  --{name:<16} {flags[name].help}")
        if self.has_config:
            lines += ["", "Settings, each an override of the config file, with their defaults:"]
            for key, field, value in settings_of(config_lib.Config()):
                doc = field.metadata["doc"]
                bounds = str(field.metadata["bounds"])
                if bounds:
                    doc = f"{doc} ({bounds})"
                lines.append(f"  --config.{key}={value!r}")
                lines.append(f"      {doc}")
        return "\n".join(lines)


def _define_shared(flags: FlagValues) -> None:
    """Add the flags that every command has."""
    absl_flags.DEFINE_integer(
        "cpu_devices",
        0,
        "simulated CPU devices of this process (0: those that are here)",
        lower_bound=0,
        flag_values=flags,
    )
    absl_flags.DEFINE_string(
        "coordinator",
        "",
        "host:port of process 0, or auto: as the cluster says, which tinylm.main asks by itself",
        flag_values=flags,
    )
    absl_flags.DEFINE_integer(
        "num_processes", 0, "processes of the job, with --coordinator", flag_values=flags
    )
    absl_flags.DEFINE_integer(
        "process_id", -1, "number of this process, with --coordinator", flag_values=flags
    )
    absl_flags.DEFINE_float(
        "start_secs",
        distributed.START_SECS,
        "how long to wait for the job's other processes to start",
        flag_values=flags,
    )
    absl_flags.DEFINE_bool(
        "library_logs",
        False,
        "show what libraries (JAX, Orbax, fsspec, ...) log and warn of",
        flag_values=flags,
    )


def define_workdir(flags: FlagValues, is_required: bool = True) -> None:
    """Add --workdir."""
    absl_flags.DEFINE_string(
        "workdir",
        None,
        "folder of the run (a path, or a bucket such as gs://...)",
        flag_values=flags,
    )
    if is_required:
        require(flags, "workdir", "--workdir=runs/tales")


def define_step(flags: FlagValues, help_line: str = "checkpoint: best, latest or a step") -> None:
    """Add --step."""
    absl_flags.DEFINE_string("step", "best", help_line, flag_values=flags)


def define_json(flags: FlagValues) -> None:
    """Add --json."""
    absl_flags.DEFINE_bool(
        "json", False, "print one JSON object on stdout instead of text", flag_values=flags
    )


def require(flags: FlagValues, name: str, example: str) -> None:
    """Refuse a command line without a flag, in words that show how it is given."""
    absl_flags.register_validator(
        name,
        lambda value: value is not None,
        f"it is required, for example {example}.",
        flag_values=flags,
    )


def require_config(flags: FlagValues) -> None:
    """Raise UserError where --config was not given."""
    if flags.config is None:
        raise UserError("--config is required, for example --config=tales.")


def config(flags: FlagValues, takes_over: bool = True) -> config_lib.Config:
    """Return the checked config of --config.

    With `takes_over`, it has the model of the run that `train.init_model` takes it from. A caller
    that may find a run which has everything in its own folder takes over itself.
    """
    from tinylm.train.init_from import take_over

    require_config(flags)
    chosen = config_lib.checked(flags.config)
    return take_over(chosen)[0] if takes_over else chosen


def resolved_config(flags: FlagValues) -> config_lib.Config:
    """Return the resolved config of --config for a command that reads no text.

    Where the tokenizer decides the size of the vocabulary, say how large it is taken to be.
    """
    from tinylm.data import known_vocab_size

    chosen = config(flags)
    vocab_size = chosen.model.vocab_size
    if not vocab_size:
        vocab_size, origin = known_vocab_size(chosen.data)
        log.say(f"vocabulary of {vocab_size:,} ids: {origin}")
    return chosen.resolve(vocab_size)


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Say whether --help is among the arguments."""
    return bool(_HELP.intersection(arguments))


def run(command: Command, argv: Sequence[str] | None = None, is_guest: bool | None = None) -> int:
    """Run a command, and return the exit code that tells how it went.

    Args:
      command: the command.
      argv: its arguments, without the name of a program; None: those of this process.
      is_guest: whether the process goes on after the command and finds things as they were
        (default: where `argv` is given).
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if asks_for_help(arguments):
        print(command.help())
        return 0
    if is_guest is None:
        is_guest = argv is not None
    if is_guest:
        with _as_it_was():
            return _run(command, arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # For a character of a text that the encoding of stdout lacks.
        sys.stdout.reconfigure(errors="replace")
    # A crash outside Python, as of a file of weights that shrinks while it is mapped, then shows
    # on which line it happened.
    faulthandler.enable()
    # What was imported stays, so Python needn't look for garbage in it: not from here on, where it
    # looks again (see tinylm/__init__.py), and not at its end, which would take 0.6 s.
    gc.freeze()
    gc.enable()
    exit_code = _run(command, arguments)
    gc.freeze()
    return exit_code


def _run(command: Command, arguments: Sequence[str]) -> int:
    """Parse flags, start JAX, do the work; return the exit code."""
    try:
        flags = command.parse(arguments)
        if command.on_cpu:
            jax.config.update("jax_platforms", "cpu")
        distributed.start(
            cpu_devices=flags.cpu_devices,
            coordinator=flags.coordinator,
            num_processes=flags.num_processes,
            process_id=flags.process_id,
            secs=flags.start_secs,
            joins_cluster=command.joins_cluster,
        )
        with agreement.share_failures():
            agreement.agree(_facts(flags), flags.start_secs)
            platform.refuse_faulty(jax.default_backend())
        log.start(distributed.is_main(), flags.library_logs)
        if command.joins_cluster and distributed.is_shell_of_slurm():
            log.say(
                f"this Slurm job has {os.environ['SLURM_NTASKS']} tasks, but this command was not "
                "started by srun and runs alone here; start it with srun to run on all of them."
            )
        use_compile_cache()
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            # tinylm/__init__.py let Ctrl-C end the process at once until here.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        exit_code = command.run(flags)
        log.flush()
        return exit_code or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has enough of it
        _forget_output()
        return 0
    except UserError as error:
        log.flush()
        _complain(f"error: {distributed.speaker()}{error}")
        return _leave(error.exit_code)
    except Exception as error:
        if distributed.lost_peer(error):
            line = str(error).splitlines()[0]
            _complain(f"error: {distributed.speaker()}a peer was lost: {line}")
            return _leave(PeerLost.exit_code)
        if storage.is_from_bucket(error):
            log.flush()
            _complain(
                f"error: {distributed.speaker()}a bucket cannot be reached "
                f"({storage.in_words(error)}); check the network, its proxy, and that the service "
                "is up."
            )
            return _leave(StorageError.exit_code)
        # A bug of ours: the peers of this process must not wait for it.
        _complain(f"{distributed.speaker()}{traceback.format_exc()}".removesuffix("\n"))
        return _leave(1)


def _complain(text: str) -> None:
    """Write to stderr at once."""
    print(text, file=sys.stderr, flush=True)


def _leave(exit_code: int) -> int:
    """Return the exit code, after making sure that peers can't hold up the end of this process."""
    distributed.leave_soon(exit_code)
    return exit_code


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """Leave mesh, log and handlers of signals as they were, for a process that goes on."""
    mesh = jax.sharding.get_mesh()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        log.stop()
        jax.set_mesh(mesh)
        if in_main_thread:
            for number, handler in handlers.items():
                if handler is not None:  # one that C installed can't be put back, nor was it taken
                    signal.signal(number, handler)
            ours = signal.set_wakeup_fd(wakeup)
            if ours != -1:
                os.close(ours)  # the thread of StopRequest that reads from it ends


def print_last(text: str) -> None:
    """Print what a command ends with; where its terminal is gone, nobody reads it."""
    try:
        print(text, flush=True)
    except OSError:
        _forget_output()


def _forget_output() -> None:
    """Send stdout nowhere, so that Python doesn't fail to write the rest of it at the exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _facts(flags: FlagValues) -> dict[str, Any]:
    """Return what must be the same in every process of a job: flags, config, code."""
    facts = {}
    if "config" in flags and flags.config is not None:
        for key, _, value in settings_of(flags.config):
            facts[f"config.{key}"] = value
    for name in flags:
        if flags[name].present and name.split(".")[0] not in _OF_ONE_PROCESS:
            facts[f"--{name}"] = flags[name].value
    return facts | distributed.code_versions()


def use_compile_cache() -> None:
    """Keep compiled programs in a folder private to the user, where a home can hold it.

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
