"""The lines a run opens and closes with."""

from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from tinylm.core.log import say
from tinylm.core.mesh import batch_shards
from tinylm.inference.writing import numbered
from tinylm.model.flops import count_parameters
from tinylm.train.loop import Outcome, Trainer


def opening(trainer: Trainer) -> None:
    """Say what is about to be trained, on what, from what."""
    c = trainer.config
    model = c.model
    shapes = {
        path: leaf.shape
        for path, leaf in flatten_dict(trainer.blueprint.abstract.params, sep="/").items()
    }
    say(
        f"model   {count_parameters(shapes, model) / 1e6:.2f} M parameters: "
        f"{model.num_layers} layers, "
        f"{model.num_heads} heads, width {model.embed_dim}, vocabulary {model.vocab_size}, "
        f"{model.compute_dtype}"
    )
    say(f"mesh    {mesh_summary(trainer.mesh)}")
    say(
        f"data    {c.data.source}, {c.data.tokenizer}: {len(trainer.data.train):,} rows of "
        f"{c.data.seq_len} tokens"
    )
    say(
        f"train   {c.train.last_step:,} steps of {c.data.tokens_per_step:,} tokens "
        f"into {trainer.folder.path}{expected(trainer)}"
    )


def expected(trainer: Trainer, mfu: float = 0.4) -> str:
    """Return how long the steps that are left take where the chip's peak is known and a usual part
    of it is reached.
    """
    if not trainer.peak_flops:
        return ""
    c = trainer.config
    left = (c.train.last_step - max([0, *trainer.checkpoints.steps()])) * c.data.tokens_per_step
    return (
        f", about {left * trainer.flops_per_token / trainer.peak_flops / mfu / 60:.1f} min at "
        f"{mfu:.0%} of the peak"
    )


def closing(trainer: Trainer, outcome: Outcome) -> str:
    """Return where everything is and what to do next."""
    folder = trainer.folder
    lines = []
    if outcome.samples:
        lines += [numbered([text.strip() for text in outcome.samples]), ""]
    lines.append(f"Done in {outcome.seconds:.0f} s: step {outcome.step}, {outcome.reason}.")
    if outcome.valid_loss is not None:
        floor = trainer.data.floor_nats_per_token
        known = "" if floor is None else f"; floor of the corpus {floor:.4f}"
        best = min(outcome.best_loss, outcome.valid_loss)
        lines.append(
            f"Validation loss {outcome.valid_loss:.4f} (best {best:.4f}{known}) nats per token."
        )
    elif outcome.loss is not None:
        lines.append(f"Training loss {outcome.loss:.4f} nats per token.")
    lines.append(trainer.clock.summary(outcome.step))
    lines.append(f"Plot, metrics, samples and checkpoints: {folder.path}")
    if outcome.reason.startswith("train.stop_step"):
        lines.append("Go on: the same command with a later train.stop_step, or 0.")
    lines.append(f"Write more: python -m tinylm.generate --workdir={folder.path}")
    lines.append(f"Look at it: python -m tinylm.report --workdir={folder.path}")
    return "\n".join(lines)


def mesh_summary(mesh: Mesh) -> str:
    """Return the mesh in words."""
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    device = mesh.devices.flat[0].device_kind
    return (
        f"{mesh.size} x {device}"
        + (f" ({sizes})" if sizes else "")
        + f", batch in {batch_shards(mesh)}"
    )
