"""The report as one HTML page that needs no network, and as PNGs.

The page is `page.html` with the runs as JSON inside; its script draws. Colours are Okabe and Ito's (2008), which
colour-blind readers tell apart; runs differ in their dashes too, for print.
"""

import base64
import html
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("", "7 3", "2 3", "10 3 2 3", "5 2", "1 2", "12 4")
PANELS = (
    ("Loss (nats per token)", ("loss",)),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("learning_rate",)),
    ("Tokens per second", ("tokens_per_sec",)),
    ("Model FLOPs utilization", ("mfu",)),
    ("Exact match", ("exact_match",)),
)
Heads = Sequence[tuple[int, int]]  # (layer, head)


def page(title: str, runs: list[dict[str, Any]]) -> str:
    """Return the HTML of a report."""
    data = {"runs": runs, "colors": COLORS, "dashes": DASHES, "panels": PANELS}
    inside = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # no text of a run may end the script
    template = pathlib.Path(__file__).with_name("page.html").read_text()
    return template.replace("__TITLE__", html.escape(title)).replace("__DATA__", inside)


def attention_part(tokens: list[str], weights_LNTS: np.ndarray, heads: Heads) -> dict[str, Any]:
    """Return the attention of some heads for the page: 256 grades of weight."""
    grades = np.round(weights_LNTS * 255).astype(np.uint8)
    maps = {f"layer {i}, head {n}": base64.b64encode(grades[i, n].tobytes()).decode() for i, n in heads}
    return {"tokens": tokens, "heads": maps}


def draw_curves(runs: list[dict[str, Any]], path: str) -> None:
    """Draw the panels that have data, against steps, as a PNG."""
    panels = [(title, names[0]) for title, names in PANELS if any(_points(run, names[0]) for run in runs)]
    figure, grid = new_grid(len(panels), 2, (6, 3.4))
    for axes, (title, name) in zip(grid.flat, panels, strict=False):
        for i, run in enumerate(runs):
            for split, steps, values in _points(run, name):
                valid = {"marker": "o", "ms": 4, "lw": 2} if split == "valid" else {"lw": 1, "alpha": 0.7}
                axes.plot(steps, values, label=f"{run['name']}, {split}", **line_style(i), **valid)
            if name == "loss" and run["floor"] is not None:
                axes.axhline(run["floor"], color="#555555", ls=":", lw=1)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        _clip(axes, runs, name)
    grid.flat[0].legend(fontsize=8)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)


def draw_attention(tokens: list[str], weights_LNTS: np.ndarray, heads: Heads, path: str) -> None:
    """Draw heads over a text as a PNG: a row for each query, a column for each key."""
    size = max(2.6, 0.16 * len(tokens))
    figure, grid = new_grid(len(heads), 4, (size, size))
    for axes in grid.flat:
        axes.set_axis_off()
    labels = [token.replace("\n", "⏎").replace("$", r"\$") for token in tokens]
    for axes, (layer, head) in zip(grid.flat, heads, strict=False):
        axes.set_axis_on()
        axes.imshow(weights_LNTS[layer, head], cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"layer {layer}, head {head}", fontsize=9)
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=6)
        axes.set_yticks(range(len(labels)), labels, fontsize=6)
    figure.savefig(path, dpi=110)


def _points(run: dict[str, Any], name: str) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for split in ("train", "valid"):
        curve = run[split]
        pairs = [(step, value) for step, value in zip(curve.get("step", ()), curve.get(name, ()), strict=False)
                 if value is not None]  # fmt: skip
        if pairs:
            found.append((split, *map(list, zip(*pairs, strict=True))))
    return found


def _clip(axes: Any, runs: list[dict[str, Any]], name: str) -> None:
    """Cut off the first twentieth of a loss, which falls from a blind guess and would flatten all that follows."""
    points = [(step, value) for run in runs for _, steps, values in _points(run, name)
              for step, value in zip(steps, values, strict=True)]  # fmt: skip
    last = max(step for step, _ in points)
    settled = [value for step, value in points if step > 0.05 * last]
    if name in ("loss", "grad_norm") and settled:
        axes.set_ylim(top=max(settled) + 0.05 * (max(settled) - min(settled)) + 1e-9)


def line_style(i: int) -> dict[str, Any]:
    """Return the colour and dashes of the i-th run."""
    dash = DASHES[i % len(DASHES)]
    return {"color": COLORS[i % len(COLORS)], "ls": (0, tuple(map(int, dash.split()))) if dash else "-"}


def new_grid(count: int, columns: int, size: tuple[float, float]) -> tuple[Any, np.ndarray]:
    """Return a figure with a grid for `count` pictures of a size in inches."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
