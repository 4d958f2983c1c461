"""Weights between a model's files and the mesh, by a family's table.

In: each device asks for its own part of each parameter, and only that part is read from the
memory-mapped file and converted, so no device ever holds a whole copy. Out: one tensor at a time is
gathered to the host. The rows that pad our vocabulary are zeros on the way in and are cut on the
way out.
"""

import dataclasses
import functools
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


def import_params(
    tensors: Tensors, family: Family, config: ModelConfig, mesh: Mesh, fsdp: bool
) -> dict:
    """Return our parameters, laid out on `mesh`, from tensors by their names; raise UserError where
    these don't fit.
    """
    _, abstract, axes = abstract_transformer(config)
    cut = unpadded_shapes(config)
    check_tensors(tensors, family, config)
    layers: dict[str, list[np.ndarray]] = {path: [] for path in cut}
    for row, layer in _walk(family, config):
        shapes = [layer_shape(path, cut) for path in row.ours]
        views = row.layout.split(tensors[row.theirs.format(layer)], shapes)
        for path, view in zip(row.ours, views, strict=True):
            layers[path].append(view)
    placed = place_parameters(abstract, axes, mesh, fsdp)
    params = {}
    for path, leaf in traverse_util.flatten_dict(placed, sep="/").items():
        params[path] = jax.make_array_from_callback(
            leaf.shape, leaf.sharding, _reader(layers[path], path, leaf.shape)
        )
    return traverse_util.unflatten_dict(params, sep="/")


def _reader(views: list[np.ndarray], path: str, shape: Shape):
    """Return the callback that reads one device's part of a parameter as float32, zeros where
    theirs ends.
    """

    def part(view: np.ndarray, index: tuple[slice, ...], size: Shape) -> np.ndarray:
        out, found = np.zeros(size, np.float32), view[index]
        out[tuple(slice(n) for n in found.shape)] = found
        return out

    def read(index: tuple[slice, ...]) -> np.ndarray:
        size = tuple(len(range(*cut.indices(n))) for cut, n in zip(index, shape, strict=True))
        if not is_stacked(path):
            return part(views[0], index, size)
        return np.stack([part(view, index[1:], size[1:]) for view in views[index[0]]])

    return read


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


def export_tensors(
    params: dict, family: Family, config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (their name, float32 tensor) in the order of `their_shapes`."""
    flat, cut = traverse_util.flatten_dict(params, sep="/"), unpadded_shapes(config)
    gathered: tuple[Row | None, list[np.ndarray]] = None, []
    for row, layer in _walk(family, config):
        if gathered[0] is not row:
            wanted = [flat[path][tuple(slice(n) for n in cut[path])] for path in row.ours]
            gathered = row, [np.asarray(x) for x in wanted]
        ours = [x[layer] if is_stacked(row.ours[0]) else x for x in gathered[1]]
        yield row.theirs.format(layer), row.layout.join(ours)


def their_shapes(family: Family, config: ModelConfig) -> Shapes:
    """Return the shape of every tensor of theirs by name."""
    cut = unpadded_shapes(config)
    return {
        row.theirs.format(layer): row.layout.shape([layer_shape(path, cut) for path in row.ours])
        for row, layer in _walk(family, config)
    }


def unpadded_shapes(config: ModelConfig) -> Shapes:
    """Return the shape of every parameter of ours by path, without the rows that pad the
    vocabulary.
    """
    return _unpadded_shapes(dataclasses.astuple(config))


@functools.cache
def _unpadded_shapes(settings: tuple) -> Shapes:
    config = ModelConfig(*settings)
    _, abstract, axes = abstract_transformer(config)
    flat = traverse_util.flatten_dict(abstract, sep="/")
    return {
        path: tuple(
            config.vocab_size if axis == "vocab" else n
            for axis, n in zip(axes[path], leaf.shape, strict=True)
        )
        for path, leaf in flat.items()
    }


def with_family_names(tensors: Tensors, family: Family) -> Tensors:
    """Return tensors by the names of the family's table.

    Some versions of transformers name a tensor otherwise, and files of a bare model (published
    GPT-2's) leave out the prefix.
    """
    named = {family.renamed.get(name, name): tensor for name, tensor in tensors.items()}
    if any(name.startswith(family.prefix) for name in named):
        return named
    outside = {row.theirs for row in family.rows if not row.theirs.startswith(family.prefix)}
    return {
        name if name in outside else family.prefix + name: tensor for name, tensor in named.items()
    }


def is_stacked(path: str) -> bool:
    """Say whether a parameter of ours holds all layers."""
    return path.startswith("blocks/")


def layer_shape(path: str, shapes: Shapes) -> Shape:
    """Return the shape of one layer of a parameter of ours."""
    return shapes[path][1:] if is_stacked(path) else shapes[path]


def _walk(family: Family, config: ModelConfig) -> Iterator[tuple[Row, int]]:
    """Yield each line of the table that the model has, for each layer."""
    shapes = unpadded_shapes(config)
    rows = [row for row in family.rows if all(path in shapes for path in row.ours)]
    covered = {path for row in rows for path in row.ours}
    assert covered == set(shapes), (
        f"{family.model_type} has no name for {sorted(set(shapes) - covered)}"
    )
    for row in rows:
        for layer in range(config.num_layers if is_stacked(row.ours[0]) else 1):
            yield row, layer


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
