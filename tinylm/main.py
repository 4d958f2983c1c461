"""Train a language model, or go on with a run: the same command does both.

python -m tinylm.main --config=configs/tales.py --workdir=runs/tales python -m tinylm.main
--config=tales --config.model.embed_dim=256 --cpu_devices=8 --config.mesh.model=2 python -m
tinylm.main --workdir=runs/tales
"""

import pathlib

from absl import flags

from tinylm import cli
from tinylm.core.distributed import is_main
from tinylm.core.preemption import StopRequest

FLAGS = flags.FLAGS


def main() -> None:
    """Train as the flags say."""
    from ml_collections import config_flags

    stop = StopRequest()
    config = cli.config(takes_over=False)
    file = pathlib.Path(config_flags.get_config_filename(FLAGS["config"]).partition(":")[0])
    name = file.parent.name if file.suffix == ".json" else file.stem
    workdir = FLAGS.workdir or f"runs/{name}"
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


if __name__ == "__main__":
    cli.define_config()
    cli.define_workdir(required=False)
    cli.run(main, __doc__, joins_cluster=True, resumes=True)
