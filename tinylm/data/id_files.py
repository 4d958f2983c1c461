"""Files of ready ids: their type is told by their content, and what is not a plain stream of ids is
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
    """Map a file of ids in the type that it has.

    Args:
      path: the file.
      vocab_size: how many ids the tokenizer has that made it.

    Raises:
      UserError: the file holds something other than plain ids.
    """
    num_bytes = pathlib.Path(path).stat().st_size
    if not num_bytes or num_bytes % 2:
        raise UserError(
            f"{path} has {num_bytes} bytes, which can't be ids of 2 or 4 bytes; tokens: reads "
            "uint16 or uint32."
        )
    with pathlib.Path(path).open("rb") as file:
        head = file.read(_HEAD_BYTES)
    _refuse_marked(path, head)
    _refuse_text(path, head)
    halves = np.memmap(path, np.uint16, mode="r")
    looked_at = halves[: 2 * _LOOK_TOKENS]
    _refuse_integers_of_8_bytes(path, looked_at)
    for kind in (np.float32, np.float64):
        _refuse_floats(path, looked_at, kind, vocab_size)
    if _are_uint32(looked_at, num_bytes, vocab_size):
        return np.memmap(path, np.uint32, mode="r")
    return halves


def _are_uint32(halves: np.ndarray, num_bytes: int, vocab_size: int) -> bool:
    """Return whether the first ids of a file of `num_bytes` have four bytes.

    The upper half of such an id is as small as the vocabulary says. That nearly all are is enough,
    since an id out of range may be among them.
    """
    upper_halves = halves[1::2]
    if num_bytes % 4 or len(upper_halves) < 2:
        return False
    largest = (vocab_size - 1) >> 16
    return float(np.mean(upper_halves <= largest)) > 0.5


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
    """Raise UserError where a file reads as text: that the bytes of ids all do so by chance is not
    to be expected.
    """
    if len(head) < 32:
        return
    # A full head may end inside a character, whose bytes are then left out.
    may_be_cut = len(head) == _HEAD_BYTES
    text = head.decode(errors="ignore" if may_be_cut else "replace")
    num_left_out = len(head) - len(text.encode())
    is_utf8 = 0 <= num_left_out < 4 and "\ufffd" not in text
    if is_utf8 and all(char.isprintable() or char.isspace() for char in text):
        raise UserError(
            f"{path} holds text, not ids; read it with data.source=text:, or another kind of text."
        )


def _refuse_integers_of_8_bytes(path: str, halves: np.ndarray) -> None:
    """Raise UserError for integers of 8 bytes, of which the upper four are nearly all 0."""
    if halves.nbytes % 8:
        return
    words = halves.view(np.uint32)
    lower = words[0::2]
    upper = words[1::2]
    if len(lower) < 2 or not lower.any():
        return
    # -1 stands for "no target" in some files, and fills the upper half too.
    is_extension = (upper == 0) | (upper == 0xFFFFFFFF)
    if np.mean(is_extension) > 0.99:
        raise UserError(
            f"{path} holds integers of 8 bytes (int64 is NumPy's default), not plain ids; {_WRITE}."
        )


def _refuse_floats(path: str, halves: np.ndarray, kind: type, vocab_size: int) -> None:
    """Raise UserError for floats of a type, which would give more ids than there are."""
    whole_words = len(halves) // 4 * 4
    floats: np.ndarray = halves[:whole_words].view(kind)
    if len(floats) < 2:
        return
    end = max(vocab_size, 1 << 16)
    with np.errstate(invalid="ignore", over="ignore"):
        are_ids = (floats == np.floor(floats)) & (floats >= 0) & (floats < end)
        # As floats, plain ids are next to 0 or far out of range.
        if are_ids.all() and np.mean(floats >= 1) > 0.5:
            raise UserError(
                f"{path} holds floats ({np.dtype(kind).name}), not plain ids; {_WRITE}."
            )


def range_hint(ids: np.ndarray, vocab_size: int) -> str:
    """Return a remark where ids out of range would be in range with their bytes swapped."""
    swapped = ids[:_LOOK_TOKENS].byteswap()
    return " (its bytes are in big-endian order)" if int(swapped.max()) < vocab_size else ""
