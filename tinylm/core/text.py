"""Figures and tables as text: what all commands print alike."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax


def columns(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Return one line of a table, each cell padded to its width.

    Args:
      cells: the texts. A longer one than its width pushes the rest to the right.
      widths: of the columns; a negative one aligns to the right, as figures want.
    """
    line = ""
    for cell, width in zip(cells, widths, strict=True):
        line += cell.ljust(width) if width >= 0 else cell.rjust(-width)
    return line.rstrip()


def table(rows: Sequence[Sequence[str]], num_right: int = 0) -> list[str]:
    """Return rows as lines, two spaces between the columns, each as wide as its widest cell.

    Args:
      rows: of equally many cells; the first one may be the heads.
      num_right: how many columns, the last ones, are aligned to the right.
    """
    widths = []
    for column in zip(*rows, strict=True):
        widths.append(max(len(cell) for cell in column))
    first_right = len(widths) - num_right
    lines = []
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        for number in range(first_right, len(widths)):
            padded[number] = row[number].rjust(widths[number])
        lines.append("  ".join(padded).rstrip())
    return lines


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Return the sizes of a mesh's axes as "replica 1 x data 8 x model 2"."""
    return " x ".join(f"{name} {size}" for name, size in sizes.items())


def bytes_text(count: float) -> str:
    """Return a number of bytes as "1.50 GiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def secs_text(secs: float) -> str:
    """Return a duration as "1.50 h"."""
    for unit, size in (("d", 86400), ("h", 3600), ("s", 1), ("ms", 1e-3)):
        if secs >= size:
            return f"{secs / size:.2f} {unit}"
    return f"{secs * 1e6:.2f} us"


def path_text(path: tuple[Any, ...]) -> str:
    """Return the path of a leaf in a tree as "blocks/mlp/up/kernel", which names a parameter."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
