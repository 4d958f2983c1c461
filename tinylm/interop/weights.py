"""Weights between a model's files and the mesh, by a family's table.

One parameter followed from file to device: the queries of a Llama of 2 layers, with 32 features and
4 heads of 8. The table has the line

    model.layers.{}.self_attn.q_proj.weight   blocks/attention/query/kernel   OUTPUT_FIRST

1. Theirs is a matrix [outputs, inputs] = [32, 32] for each layer, ours one array for all layers,
   [layers, embed, heads, head_dim] = [2, 32, 4, 8].
2. OUTPUT_FIRST transposes theirs and cuts its outputs into heads, so that
   ours[1, e, n, h] = theirs of layer 1 [n * 8 + h, e]. Both are views of the memory-mapped file.
3. On a mesh whose model axis of 2 splits the heads, the first device asks for ours[:, :, 0:2, :].
   So of the file it reads rows 0 to 15 of each layer's matrix, and converts these to float32.

So no device ever holds a whole copy. On the way out, one kind of parameter at a time is gathered to
the host. The rows that pad our vocabulary are zeros on the way in and are cut on the way out.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh

from tinylm.core.errors import UserError
from tinylm.core.placement import place_parameters
from tinylm.interop.families import Family, Row
from tinylm.interop.layouts import Shape
from tinylm.interop.tensor_files import Tensors
from tinylm.model.config import ModelConfig
from tinylm.model.transformer import abstract_transformer

Shapes = dict[str, Shape]
# The parts of a parameter by layer, or by layer and expert; by () where it has neither.
Views = dict[tuple[int, ...], np.ndarray]


def import_params(
    tensors: Tensors, family: Family, config: ModelConfig, mesh: Mesh, fsdp: bool
) -> dict:
    """Return our parameters, laid out on a mesh.

    Args:
      tensors: by the names of the family's table.
      family: whose table it is.
      config: of the model, resolved.
      mesh: for the parameters.
      fsdp: whether its data axis splits them too.

    Returns:
      A nested dict of float32 arrays, as `abstract_transformer` describes it.

    Raises:
      UserError: where a tensor is missing, too many, or of another shape.
    """
    check_tensors(tensors, family, config)
    shapes = unpadded_shapes(config)
    # The views of each parameter, by layer and expert where it has them.
    views: dict[str, Views] = {path: {} for path in shapes}
    for row in _rows(family, config):
        row_shapes = _shapes_of_one(row, shapes)
        for place in _places(row, config):
            ours = row.layout.split(tensors[row.theirs.format(*place)], row_shapes)
            for path, view in zip(row.ours, ours, strict=True):
                views[path][place] = view

    _, abstract, axes = abstract_transformer(config)
    placed = place_parameters(abstract, axes, mesh, fsdp)
    params = {}
    for path, leaf in traverse_util.flatten_dict(placed, sep="/").items():
        read = functools.partial(_read_part, views[path], leaf.shape)
        params[path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
    return traverse_util.unflatten_dict(params, sep="/")


def _read_part(views: Views, shape: Shape, index: tuple[slice, ...]) -> np.ndarray:
    """Return one device's part of a parameter as float32.

    Args:
      views: of the parameter.
      shape: of the whole parameter, with the rows that pad the vocabulary.
      index: the part, a slice for each dimension.
    """
    ranges = [range(*part.indices(n)) for part, n in zip(index, shape, strict=True)]
    sizes = tuple(map(len, ranges))
    num_stacked = len(next(iter(views)))
    if num_stacked == 0:
        return _padded(views[()][index], sizes)
    in_view = index[num_stacked:]
    parts = []
    for place in itertools.product(*ranges[:num_stacked]):
        parts.append(_padded(views[place][in_view], sizes[num_stacked:]))
    return np.stack(parts).reshape(sizes)


def _padded(part: np.ndarray, shape: Shape) -> np.ndarray:
    """Return `part` as float32, filled up to `shape` with zeros behind its end."""
    out = np.zeros(shape, np.float32)
    real = tuple(slice(n) for n in part.shape)
    out[real] = part
    return out


def check_tensors(tensors: Tensors, family: Family, config: ModelConfig) -> None:
    """Raise UserError for a tensor that is missing, too many, or of another shape."""
    expected = their_shapes(family, config)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise UserError(
            f"the weights lack {missing[0]}{_more(missing)}, which config.json asks for."
        )
    extra = [name for name in tensors if name not in expected]
    if extra:
        raise UserError(
            f"the weights have {extra[0]}{_more(extra)}, which config.json doesn't ask for."
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"{name} has shape {tensors[name].shape}; config.json asks for {shape}."
            )


def _more(names: list[str]) -> str:
    if len(names) == 1:
        return ""
    return f" and {len(names) - 1} more"


def export_tensors(
    params: dict, family: Family, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (their name, float32 tensor) in the order of `their_shapes`."""
    flat = traverse_util.flatten_dict(params, sep="/")
    shapes = unpadded_shapes(config)
    for row in _rows(family, config):
        # All layers are gathered at once, because slicing a layer out of an array that is split
        # over devices would be a program of its own for each.
        gathered = []
        for path in row.ours:
            real = tuple(slice(n) for n in shapes[path])
            gathered.append(np.asarray(flat[path][real]))
        for place in _places(row, config):
            ours = [array[place] for array in gathered]
            yield row.theirs.format(*place), row.layout.join(ours)


def their_shapes(family: Family, config: ModelConfig) -> Shapes:
    """Return the shape of every tensor of theirs by name."""
    shapes = unpadded_shapes(config)
    theirs = {}
    for row in _rows(family, config):
        row_shape = row.layout.shape(_shapes_of_one(row, shapes))
        for place in _places(row, config):
            theirs[row.theirs.format(*place)] = row_shape
    return theirs


def unpadded_shapes(config: ModelConfig) -> Shapes:
    """Return the shape of every parameter of ours by path, without the vocabulary's padding."""
    # A config can't be hashed, but its settings can.
    return _unpadded_shapes(dataclasses.astuple(config))


@functools.cache
def _unpadded_shapes(settings: tuple) -> Shapes:
    config = ModelConfig(*settings)
    _, abstract, axes = abstract_transformer(config)
    shapes = {}
    for path, leaf in traverse_util.flatten_dict(abstract, sep="/").items():
        sizes = list(leaf.shape)
        if "vocab" in axes[path]:
            sizes[axes[path].index("vocab")] = config.vocab_size
        shapes[path] = tuple(sizes)
    return shapes


def with_family_names(tensors: Tensors, family: Family) -> Tensors:
    """Return tensors by the names of the family's table.

    Some versions of transformers give a tensor another name, and files of a bare model (as GPT-2
    was published) leave out the prefix.
    """
    named = {family.renamed.get(name, name): tensor for name, tensor in tensors.items()}
    if any(name.startswith(family.prefix) for name in named):
        return named
    # The names that have no prefix in a whole model either: the output matrix's.
    outside = {row.theirs for row in family.rows if not row.theirs.startswith(family.prefix)}
    prefixed = {}
    for name, tensor in named.items():
        if name not in outside:
            name = family.prefix + name
        prefixed[name] = tensor
    return prefixed


def _shapes_of_one(row: Row, shapes: Shapes) -> list[Shape]:
    """Return the shapes of what one tensor of a line holds: of one layer, and of one expert."""
    return [shapes[path][row.num_stacked :] for path in row.ours]


def _rows(family: Family, config: ModelConfig) -> list[Row]:
    """Return the lines of the family's table for which the model has parameters."""
    shapes = unpadded_shapes(config)
    rows = [row for row in family.rows if all(path in shapes for path in row.ours)]
    missing = set(shapes)
    for row in rows:
        missing.difference_update(row.ours)
    assert not missing, f"{family.model_type} has no name for {sorted(missing)}"
    return rows


def _places(row: Row, config: ModelConfig) -> Iterator[tuple[int, ...]]:
    """Return the layers, or layers and experts, for which a line of the table names tensors."""
    numbers = (range(config.num_layers), range(config.num_experts))
    return itertools.product(*numbers[: row.num_stacked])
