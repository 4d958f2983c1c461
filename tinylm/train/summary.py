"""The lines that a run opens and closes with."""

import os

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from tinylm.core.log import say
from tinylm.core.mesh import batch_shards, sizes_by_name
from tinylm.core.text import mesh_text
from tinylm.inference.text import numbered
from tinylm.model.flops import count_active_parameters, count_parameters
from tinylm.train.config import Config
from tinylm.train.loop import Outcome, Trainer

# The part of a chip's peak that training usually reaches.
_USUAL_MFU = 0.4


def opening(trainer: Trainer) -> None:
    """Say what is about to be trained, on what, from what."""
    c = trainer.config
    model = c.model
    leaves = flatten_dict(trainer.blueprint.abstract.params, sep="/")
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    millions = count_parameters(shapes, model) / 1e6
    experts = ""
    if model.num_experts:
        active_millions = count_active_parameters(shapes, model) / 1e6
        experts = (
            f" ({active_millions:.2f} M of them active: {model.experts_per_token} of "
            f"{model.num_experts} experts)"
        )
    say(
        f"model   {millions:.2f} M parameters{experts}: {model.num_layers} layers, "
        f"{model.num_heads} heads, width {model.embed_dim}, vocabulary {model.vocab_size}, "
        f"{model.compute_dtype}"
    )
    say(f"mesh    {mesh_summary(trainer.mesh)}")
    say(
        f"data    {c.data.source}, {c.data.tokenizer}: {len(trainer.data.train):,} rows of "
        f"{c.data.seq_len} tokens"
    )
    say(
        f"train   {c.train.last_step:,} steps of {c.data.tokens_per_step:,} tokens into "
        f"{trainer.folder.path}{expected_time(trainer)}"
    )
    num_workers = trainer.blueprint.num_workers
    if num_workers:
        say(
            f"workers {num_workers}, each by itself between syncs, which come every "
            f"{c.train.sync_every_steps} steps"
        )
    say_odd_syncs(c, num_workers)


def say_odd_syncs(config: Config, num_workers: int) -> None:
    """Warn of settings of workers that work, but seldom as they were meant."""
    train = config.train
    if num_workers == 1:
        say("warning: one worker has no other to be averaged with; set train.workers.")
    if num_workers and config.eval.every_steps % train.sync_every_steps:
        say(
            f"warning: some evaluations (eval.every_steps={config.eval.every_steps}) come between "
            f"syncs (train.sync_every_steps={train.sync_every_steps}); they see the parameters of "
            "the last one."
        )


def expected_time(trainer: Trainer) -> str:
    """Return how long the steps that are left should take, where the chip's peak is known."""
    if not trainer.peak_flops:
        return ""
    c = trainer.config
    steps_done = max(trainer.checkpoints.steps(), default=0)
    steps_left = max(0, c.train.last_step - steps_done)
    flops_left = steps_left * c.data.tokens_per_step * trainer.flops_per_token
    minutes = flops_left / (_USUAL_MFU * trainer.peak_flops) / 60
    return f", about {minutes:.1f} min at {_USUAL_MFU:.0%} of the peak"


def closing(trainer: Trainer, outcome: Outcome) -> str:
    """Return how the run ended, where everything is, and what to do next."""
    folder = trainer.folder.path
    lines = []
    if outcome.samples:
        lines += [numbered([text.strip() for text in outcome.samples]), ""]
    lines.append(f"Done in {outcome.seconds:.0f} s: step {outcome.step}, {outcome.reason}.")
    if outcome.valid_loss is not None:
        best = min(outcome.best_loss, outcome.valid_loss)
        floor = trainer.data.floor_nats_per_token
        known = "" if floor is None else f"; floor of the corpus {floor:.4f}"
        lines.append(
            f"Validation loss {outcome.valid_loss:.4f} (best {best:.4f}{known}) nats per token."
        )
    elif outcome.loss is not None:
        lines.append(f"Training loss {outcome.loss:.4f} nats per token.")
    lines.append(trainer.clock.summary(outcome.step))
    if outcome.slowest_host:
        lines.append(outcome.slowest_host)
    if trainer.folder.checkpoints_note:
        lines.append(f"Plot, metrics and samples: {folder}")
        lines.append(f"Checkpoints: {os.fspath(trainer.folder.checkpoints)}")
    else:
        lines.append(f"Plot, metrics, samples and checkpoints: {folder}")
    if outcome.reason.startswith("train.stop_step"):
        lines.append("Go on: the same command with a later train.stop_step, or 0.")
    lines.append(f"Write more: python -m tinylm.generate --workdir={folder}")
    lines.append(f"Look at it: python -m tinylm.report --workdir={folder}")
    return "\n".join(lines)


def mesh_summary(mesh: Mesh) -> str:
    """Return the mesh in words."""
    kind = mesh.devices.flat[0].device_kind
    sizes = mesh_text({name: size for name, size in sizes_by_name(mesh).items() if size > 1})
    shape = f" ({sizes})" if sizes else ""
    return f"{mesh.size} x {kind}{shape}, batch in {batch_shards(mesh)}"
