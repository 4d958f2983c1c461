"""Safetensors files, read as views and written as a stream.

The format is 8 bytes of length, a JSON header (type, shape, offsets of each tensor) and the raw
numbers: nothing in it can be run. Tensors are memory-mapped, so transposing and cutting make views,
and only what a device needs is read. A header is checked before it is believed: its length, its
types, and that every tensor lies inside the file. Source of the format:
github.com/huggingface/safetensors, section "Format".
"""

import json
import math
import pathlib
import struct
from collections.abc import Iterable

import ml_dtypes
import numpy as np

from tinylm.core.errors import StorageError, UserError

_MAX_HEADER_BYTES = 100_000_000
_MAX_NUMBERS = 1 << 48  # of a tensor
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

Tensors = dict[str, np.ndarray]


def open_folder(folder: pathlib.Path) -> Tensors:
    """Return every tensor of a model's folder by name, memory-mapped; raise UserError for what
    can't be trusted.

    Of several files those are read that transformers reads: model.safetensors, or what an index
    names.
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
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} holds pickled weights alone ({pickled[0]}); reading a pickle can run any "
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
    where = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{folder / _INDEX} has no weight_map of names to files.")
    return where


def _open_sharded(folder: pathlib.Path) -> Tensors:
    """Open the files that the index names; they must lie in the same folder."""
    where = _weight_map(folder)
    opened: dict[str, Tensors] = {}
    for name in sorted(set(where.values())):
        if pathlib.PurePath(name).name != name or "\\" in name or name == "..":
            raise UserError(
                f"{folder / _INDEX} names {name!r}; a file of weights must lie beside its index."
            )
        opened[name] = open_file(folder / name)
    missing = [
        f"{tensor} in {name}" for tensor, name in where.items() if tensor not in opened[name]
    ]
    if missing:
        raise UserError(
            f"{folder / _INDEX} names {missing[0]}, which isn't there ({len(missing)} such)."
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
    length = struct.unpack("<Q", content[:8].tobytes())[0] if len(content) >= 8 else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, len(content) - 8):
        raise UserError(
            f"{path} is no safetensors file: its header would be {length:,} bytes (at most "
            f"{_MAX_HEADER_BYTES:,}, and the file has {len(content):,})."
        )
    try:
        header = json.loads(content[8 : 8 + length].tobytes())
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no safetensors file: its header is not JSON ({error})."
        ) from error
    if not isinstance(header, dict):
        raise UserError(f"{path} is no safetensors file: its header is no object.")
    return header, 8 + length


def _view(path: pathlib.Path, data: np.ndarray, name: str, entry: dict) -> np.ndarray:
    try:
        kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype = np.dtype(_DTYPES[kind]) if kind in _DTYPES else None
        fits = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and begin <= end <= len(
            data
        )
        fits = fits and len(shape) <= 32 and math.prod(max(n, 1) for n in shape) <= _MAX_NUMBERS
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} describes {name} wrongly: {entry}.") from error
    if not fits or (dtype is not None and end - begin != math.prod(shape) * dtype.itemsize):
        raise UserError(
            f"{path} is cut short or altered: {name} {shape} isn't in bytes {begin} to {end}."
        )
    if dtype is None:
        return np.broadcast_to(
            np.zeros((), bool), shape
        )  # a mask or a quantized weight, refused where it is wanted
    return data[begin:end].view(dtype).reshape(shape)


def write_file(
    path: pathlib.Path,
    shapes: dict[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Write float32 tensors, which must come in the order of `shapes`, one at a time."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
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
    """Return the object in a JSON file; raise UserError where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} can't be read: {error}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object.")
    return found
