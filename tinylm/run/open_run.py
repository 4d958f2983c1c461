"""Opening a run: what the commands have, for notebooks and forks too.

    import tinylm
    run = tinylm.open_run("runs/tales")
    logits_BTV = run.model(tokens_BT)

This reads the sections of config.json that concern the model and its text, and restores parameters
alone, straight onto the mesh, so a run opens on any machine whatever machine trained it.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from tinylm.core.mesh import MeshConfig, make_mesh
from tinylm.core.placement import place_parameters
from tinylm.core.platform import refuse_faulty
from tinylm.core.settings import from_dict
from tinylm.data.tokenizers import Tokenizer, load_tokenizer
from tinylm.model.config import ModelConfig
from tinylm.model.transformer import Transformer, abstract_transformer
from tinylm.run.checkpoint import Checkpoints
from tinylm.run.folder import RunFolder


@dataclasses.dataclass(kw_only=True)
class Run:
    """An opened run.

    Attributes:
      folder: of the run.
      config: as in config.json.
      step: at which the parameters were saved.
      mesh: on which they lie.
      model_config: the settings of the model, resolved.
      graph: of the model; with `params` it makes `model`, and goes into jitted functions.
      params: a nested dict of arrays.
      tokenizer: of the run.
      start_id: the token that a text begins with: the end of the text before it, or what an
        imported model has for it.
      end_ids: the tokens that end a text, besides the tokenizer's own end; an imported model may
        have several.
    """

    folder: RunFolder
    config: dict[str, Any]
    step: int
    mesh: Mesh
    model_config: ModelConfig
    graph: nnx.GraphDef
    params: dict
    tokenizer: Tokenizer
    start_id: int
    end_ids: tuple[int, ...] = ()

    @property
    def model(self) -> Transformer:
        """The model as a callable module."""
        return nnx.merge(self.graph, self.params)


def open_run(workdir: str, step: str = "best", mesh_config: MeshConfig | None = None) -> Run:
    """Open a run.

    Args:
      workdir: its folder, on a disk or in a bucket.
      step: best (by validation loss), latest or a number.
      mesh_config: of the mesh; by default that of `mesh_here`.

    Raises:
      UserError: where there is no run, no such checkpoint, or the mesh doesn't fit.
      StorageError: where no such checkpoint is whole.
    """
    refuse_faulty(jax.default_backend())
    folder = RunFolder(workdir)
    record = folder.read_config()
    config = record["config"]
    model_config = from_dict(ModelConfig, config["model"])
    model_config.check()
    checkpoints = Checkpoints(folder.checkpoints)
    found_step = checkpoints.find(str(step), ["params"])

    mesh_config = mesh_config or mesh_here(from_dict(MeshConfig, config.get("mesh", {})))
    mesh = make_mesh(mesh_config)
    graph, shapes, axes = abstract_transformer(model_config)
    abstract = place_parameters(shapes, axes, mesh, mesh_config.fsdp)
    params = checkpoints.restore_params(found_step, abstract)
    checkpoints.close()

    tokenizer = load_tokenizer(str(folder.tokenizer))
    return Run(
        folder=folder,
        config=config,
        step=found_step,
        mesh=mesh,
        model_config=model_config,
        graph=graph,
        params=params,
        tokenizer=tokenizer,
        start_id=record.get("start_id", tokenizer.eot_id),
        end_ids=tuple(record.get("end_ids", ())),
    )


def mesh_here(trained_on: MeshConfig) -> MeshConfig:
    """Return the mesh of all devices here on which a run is read.

    Parameters are split over them. So are rows, over as many as in training, where that divides the
    number of devices: rows that one device couldn't train on it may not be able to read either.
    """
    num_devices = jax.device_count()
    num_parts = num_devices if trained_on.context == -1 else trained_on.context
    if num_devices % num_parts:
        num_parts = 1
    return MeshConfig(context=num_parts, fsdp=True)
