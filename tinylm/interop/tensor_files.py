"""Safetensors files, read as views and written as a stream.

The format is three parts, in which there is nothing that can be run:

    8 bytes   the length of the header, little endian
    header    JSON: {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    numbers   of all tensors; the offsets count from here

Tensors are memory-mapped, so transposing and cutting make views, and only what a device needs is
read. A header is checked before it is believed: its length, its types, and that every tensor lies
inside the file. Source of the format: github.com/huggingface/safetensors, section "Format".
"""

import json
import math
import pathlib
import struct
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from tinylm.core.errors import StorageError, UserError

_MAX_HEADER_BYTES = 100_000_000
# Limits of one tensor. NumPy has one for dimensions, too.
_MAX_DIMENSIONS = 32
_MAX_NUMBERS = 1 << 48
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

Tensors = dict[str, np.ndarray]


def open_folder(folder: pathlib.Path) -> Tensors:
    """Return every tensor of a model's folder by name, memory-mapped.

    Of several files those are read that transformers reads: model.safetensors, or what an index
    names.

    Raises:
      UserError: where there are no such files, or none that can be trusted.
    """
    if (folder / _ADAPTER).exists():
        raise UserError(
            f"{folder} holds an adapter ({_ADAPTER}), which changes its model; merge it into the "
            "model first (peft's merge_and_unload), or remove it to read the model alone."
        )
    if (folder / _SINGLE).exists():
        return open_file(folder / _SINGLE)
    if (folder / _INDEX).exists():
        return _open_sharded(folder)
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        raise UserError(
            f"{folder} holds {len(files)} .safetensors files, but no {_SINGLE} or {_INDEX}."
        )
    if files:
        return open_file(files[0])
    pickled: list[str] = []
    for pattern in _PICKLED:
        pickled.extend(file.name for file in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} holds pickled weights alone ({min(pickled)}); reading a pickle can run any "
            "code in it, so tinylm reads safetensors only: save the model with "
            "save_pretrained(..., safe_serialization=True)."
        )
    raise UserError(f"{folder} holds no {_SINGLE}.")


def unread_files(folder: pathlib.Path) -> list[str]:
    """Return the names of the .safetensors files in a folder that `open_folder` leaves alone."""
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if _SINGLE in names:
        return [name for name in names if name != _SINGLE]
    if (folder / _INDEX).exists():
        read = set(_weight_map(folder).values())
        return [name for name in names if name not in read]
    return []


def _weight_map(folder: pathlib.Path) -> dict[str, str]:
    """Return the file of each tensor, as the index of a folder has it."""
    where = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{folder / _INDEX} has no weight_map of names to files.")
    return where


def _open_sharded(folder: pathlib.Path) -> Tensors:
    """Open the files that the index names, each of which must lie in the same folder."""
    where = _weight_map(folder)
    opened: dict[str, Tensors] = {}
    for name in sorted(set(where.values())):
        if pathlib.PurePath(name).name != name or "\\" in name or name == "..":
            raise UserError(
                f"{folder / _INDEX} names {name!r}; a file of weights must lie in the folder of "
                "its index."
            )
        opened[name] = open_file(folder / name)
    missing = [tensor for tensor, name in where.items() if tensor not in opened[name]]
    if missing:
        raise UserError(
            f"{folder / _INDEX} names {missing[0]} in {where[missing[0]]}, which isn't there "
            f"({len(missing)} such)."
        )
    return {tensor: opened[name][tensor] for tensor, name in where.items()}


def open_file(path: pathlib.Path) -> Tensors:
    """Return the tensors of one safetensors file as read-only views of it."""
    try:
        content = np.memmap(path, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as safetensors: {error}.") from error
    header, start = _read_header(path, content)
    header.pop("__metadata__", None)
    return {name: _view(path, content[start:], name, entry) for name, entry in header.items()}


def _read_header(path: pathlib.Path, content: np.ndarray) -> tuple[dict, int]:
    """Return the header of a file, and where the numbers begin.

    Args:
      path: for errors.
      content: all bytes of the file.
    """
    length = 0
    if len(content) >= 8:
        length = struct.unpack("<Q", content[:8].tobytes())[0]
    if not 2 <= length <= min(_MAX_HEADER_BYTES, len(content) - 8):
        raise UserError(
            f"{path} is not a safetensors file: its header would be {length:,} bytes (at most "
            f"{_MAX_HEADER_BYTES:,}, and the file has {len(content):,})."
        )
    try:
        header = json.loads(content[8 : 8 + length].tobytes())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a safetensors file: its header is not JSON ({error})."
        ) from error
    if not isinstance(header, dict):
        raise UserError(f"{path} is not a safetensors file: its header is not an object.")
    return header, 8 + length


def _view(path: pathlib.Path, data: np.ndarray, name: str, entry: dict) -> np.ndarray:
    """Return one tensor as a view of its bytes.

    A tensor of a type that isn't read (a mask, quantized weights) is given as False in its shape,
    which takes no memory; where it is wanted as weights, it is refused then.

    Args:
      path: for errors.
      data: all bytes behind the header.
      name: of the tensor.
      entry: what the header has for it.
    """
    try:
        shape = entry["shape"]
        begin, end = entry["data_offsets"]
        is_read = entry["dtype"] in _DTYPES
        fits = _fits(shape, begin, end, len(data))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} describes {name} wrongly: {entry}.") from error
    dtype = np.dtype(_DTYPES[entry["dtype"]] if is_read else bool)
    if fits and is_read:
        fits = end - begin == math.prod(shape) * dtype.itemsize
    if not fits:
        raise UserError(
            f"{path} is cut short or altered: {name} {shape} isn't in bytes {begin} to {end}."
        )
    if not is_read:
        return np.broadcast_to(np.zeros((), bool), shape)
    return data[begin:end].view(dtype).reshape(shape)


def _fits(shape: Any, begin: Any, end: Any, num_bytes: int) -> bool:
    """Say whether a tensor may have this shape, and lie at these offsets of so many bytes."""
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        return False
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        return False
    # A dimension of 0 doesn't excuse others that no array can have.
    if math.prod(max(n, 1) for n in shape) > _MAX_NUMBERS:
        return False
    return begin <= end <= num_bytes


def write_file(
    path: pathlib.Path,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Write tensors as float32, one at a time.

    Args:
      path: of the file.
      shapes: of all tensors by their names; the header is made of them.
      tensors: (name, tensor) in the order of `shapes`.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape in shapes.items():
        end = begin + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    # Spaces behind the JSON align the numbers to 8 bytes, as the format asks for.
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for (name, tensor), expected in zip(tensors, shapes, strict=True):
                assert name == expected and tensor.shape == shapes[name], (
                    f"{name} {tensor.shape} is out of order"
                )
                file.write(np.ascontiguousarray(tensor, "<f4").data)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}.") from error


def read_json(path: pathlib.Path) -> dict:
    """Return the object in a JSON file; raise UserError where it holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object.")
    return found
