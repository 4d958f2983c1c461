"""Train a language model, or go on with a run: the same command does both.

python -m tinylm.main --config=configs/tales.py --workdir=runs/tales
python -m tinylm.main --config=tales --config.model.embed_dim=256 --cpu_devices=8
python -m tinylm.main --workdir=runs/tales
"""

import pathlib
import sys
from collections.abc import Sequence

from absl.flags import FlagValues

from tinylm import cli
from tinylm.core.distributed import is_main
from tinylm.core.preemption import StopRequest


def train(flags: FlagValues) -> None:
    """Train as the flags say."""
    # From here on a signal ends the run in an orderly way, so this comes before what takes time.
    stop = StopRequest()
    config = cli.config(flags, takes_over=False)
    workdir = flags.workdir or f"runs/{_config_name(flags)}"
    from tinylm.train.start import start_run
    from tinylm.train.summary import closing, opening

    trainer = start_run(config, workdir)
    opening(trainer)
    try:
        outcome = trainer.run(stop)
    finally:
        trainer.trackers.close(hurry=lambda: stop.signalled)
    if is_main():
        cli.print_last(closing(trainer, outcome))


def _config_name(flags: FlagValues) -> str:
    """Return the name of the config file or, for the config.json of a run, of the run's folder."""
    from ml_collections import config_flags

    path, _, _ = config_flags.get_config_filename(flags["config"]).partition(":")
    file = pathlib.Path(path)
    return file.parent.name if file.suffix == ".json" else file.stem


def define_flags(flags: FlagValues) -> None:
    """Add the flags of this command."""
    cli.define_workdir(flags, is_required=False)


COMMAND = cli.Command(
    __doc__, train, define_flags, has_config=True, resumes=True, joins_cluster=True
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: this process's); return its exit code."""
    return cli.run(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main())
