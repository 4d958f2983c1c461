"""Files of ready ids: their type is told by their content, and what is no plain stream of ids is
named.

nanoGPT and llama2.c write uint16 (or uint32) ids and nothing else, so a file says nothing about
itself. Read as ids, a file of NumPy's default int64, of floats, with a header, or of text would
train a model on garbage without a word. Each shows in its first bytes.
"""

import pathlib
import re

import numpy as np

from tinylm.core.errors import UserError

_LOOK_TOKENS = 1 << 20
_HEAD_BYTES = 1 << 12
_WRITE = (
    "write plain ids with np.array(ids, np.uint16).tofile(FILE), or np.uint32 from 65,537 ids on"
)
_LLMC_HEADER = {20240520: "uint16", 20240801: "uint32"}
# Longer than the marks themselves, for the first ids of a plain file may be any.
_MARKED = {
    "a NumPy .npy file, which has a header": rb"\x93NUMPY",
    "a zip archive, as np.savez and torch.save write": rb"PK\x03\x04",
    "a gzip file": rb"\x1f\x8b\x08[\0-\x1f]",
    "a zstd file": rb"\x28\xb5\x2f\xfd",
    "a Parquet file": rb"PAR1[\0-\x1f]",
    "a pickle": rb"\x80[\x04\x05]\x95.{3}\0{5}",
    "an index of Megatron": rb"MMIDIDX|TNTIDX",
}


def open_ids(path: str, vocab_size: int) -> np.memmap:
    """Map a file of ids in the type that it has; raise UserError where it holds something else than
    plain ids.
    """
    size = pathlib.Path(path).stat().st_size
    if not size or size % 2:
        raise UserError(
            f"{path} has {size} bytes, which are no ids of 2 or 4 bytes; tokens: reads uint16 or "
            "uint32."
        )
    with pathlib.Path(path).open("rb") as file:
        head = file.read(_HEAD_BYTES)
    _refuse_marked(path, head)
    _refuse_text(path, head)
    halves = np.memmap(path, np.uint16, mode="r")
    _refuse_types(path, halves[: 2 * _LOOK_TOKENS], vocab_size)
    upper = halves[1 : 2 * _LOOK_TOKENS : 2]
    # Of uint32 ids nearly every upper half is small, though an id out of range may be among them.
    is_uint32 = size % 4 == 0 and len(upper) > 1 and np.mean(upper <= (vocab_size - 1) >> 16) > 0.5
    return np.memmap(path, np.uint32, mode="r") if is_uint32 else halves


def _refuse_marked(path: str, head: bytes) -> None:
    """Raise UserError for a file that begins with the mark of a known kind."""
    for kind, mark in _MARKED.items():
        if re.match(mark, head, re.DOTALL):
            raise UserError(f"{path} is {kind}, not plain ids; {_WRITE}.")
    first = int.from_bytes(head[:4], "little")
    if first in _LLMC_HEADER:
        raise UserError(
            f"{path} has the header of llm.c's files before its {_LLMC_HEADER[first]} ids; cut it "
            f"off: tail -c +1025 {path} > ids.bin"
        )


def _refuse_text(path: str, head: bytes) -> None:
    """Raise UserError where a file reads as text; ids of two bytes with a text of them each are not
    to be expected.
    """
    if len(head) < 32:
        return
    # The head may end inside a character.
    text = (
        head.decode(errors="ignore") if len(head) == _HEAD_BYTES else head.decode(errors="replace")
    )
    dropped = len(head) - len(text.encode())
    if (
        0 <= dropped < 4
        and "\ufffd" not in text
        and all(char.isprintable() or char.isspace() for char in text)
    ):
        raise UserError(
            f"{path} holds text, not ids; read it with data.source=text:, or another kind of text."
        )


def _refuse_types(path: str, halves: np.ndarray, vocab_size: int) -> None:
    """Raise UserError for integers of 8 bytes, and for floats, which would give more ids than there
    are.
    """
    size = halves.nbytes
    words = halves[: size // 8 * 4].view(np.uint32)
    low, high = words[0::2], words[1::2]
    # -1 stands for "no target" in some files, and fills the upper half too.
    if (
        size % 8 == 0
        and len(low) > 1
        and np.mean((high == 0) | (high == 0xFFFFFFFF)) > 0.99
        and low.any()
    ):
        raise UserError(
            f"{path} holds integers of 8 bytes (int64 is NumPy's default), not plain ids; {_WRITE}."
        )
    for kind in (np.float32, np.float64):
        floats: np.ndarray = halves[: size // 8 * 4].view(kind)
        with np.errstate(invalid="ignore", over="ignore"):
            are_ids = (
                (floats == np.floor(floats)) & (floats >= 0) & (floats < max(vocab_size, 1 << 16))
            )
        # As floats, plain ids are next to 0 or far out of range.
        if len(floats) > 1 and are_ids.all() and np.mean(floats >= 1) > 0.5:
            raise UserError(
                f"{path} holds floats ({np.dtype(kind).name}), not plain ids; {_WRITE}."
            )


def range_hint(ids: np.ndarray, vocab_size: int) -> str:
    """Return a remark where ids out of range would be in range with their bytes swapped."""
    swapped = ids[:_LOOK_TOKENS].byteswap()
    return " (its bytes are in big-endian order)" if int(swapped.max()) < vocab_size else ""
