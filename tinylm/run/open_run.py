"""Opening a run: what the commands have, for notebooks and forks too.

Reads the sections of config.json that concern the model and its text; parameters alone are
restored, straight onto the mesh, so a run opens on any machine whatever trained it.
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
from tinylm.data.tokenizers import load_tokenizer
from tinylm.model.config import ModelConfig
from tinylm.model.transformer import Transformer, abstract_transformer
from tinylm.run.checkpoint import Checkpoints
from tinylm.run.folder import RunFolder


@dataclasses.dataclass
class Run:
    """An opened run: `config` as in config.json, `model` ready to call, `params` and `graph` for
    jitted functions.
    """

    folder: RunFolder
    config: dict[str, Any]
    step: int
    mesh: Mesh
    model_config: ModelConfig
    graph: nnx.GraphDef
    params: dict
    tokenizer: Any
    # What a text begins with: the end of the one before, or what an imported model has for it.
    start_id: int
    end_ids: tuple[
        int, ...
    ] = ()  # what ends a text beside the tokenizer's end, in an imported model

    @property
    def model(self) -> Transformer:
        """The model as a callable module."""
        return nnx.merge(self.graph, self.params)


def open_run(workdir: str, step: str = "best", mesh_config: MeshConfig | None = None) -> Run:
    """Open the run in `workdir` at `step` (best, latest or a number) on a mesh (default: split over
    all devices).

    Raises UserError where there is no run, no such checkpoint, or the mesh doesn't fit.
    """
    refuse_faulty(jax.default_backend())
    folder = RunFolder(workdir)
    record = folder.read_config()
    config = record["config"]
    model_config = from_dict(ModelConfig, config["model"])
    model_config.check()
    checkpoints = Checkpoints(folder.checkpoints)
    found = checkpoints.find(str(step), ["params"])
    mesh_config = mesh_config or MeshConfig(fsdp=True)
    mesh = make_mesh(mesh_config)
    graph, shapes, axes = abstract_transformer(model_config)
    abstract = place_parameters(shapes, axes, mesh, mesh_config.fsdp)
    params = checkpoints.restore_params(found, abstract)
    checkpoints.close()
    tokenizer = load_tokenizer(str(folder.tokenizer))
    start_id = record.get("start_id", tokenizer.eot_id)
    end_ids = tuple(record.get("end_ids", ()))
    return Run(
        folder, config, found, mesh, model_config, graph, params, tokenizer, start_id, end_ids
    )
