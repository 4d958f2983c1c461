"""The report as one HTML page that needs no network, and the picture of attention.

The page is `page.html` with the runs as JSON inside; its script draws.
"""

import base64
import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinylm.view.plot import COLORS, DASHES, PANELS, new_grid, save

Heads = Sequence[tuple[int, int]]  # (layer, head)


def page(title: str, runs: list[dict[str, Any]]) -> str:
    """Return the HTML of a report."""
    panels = [(title, [name]) for name, title in PANELS.items()]
    data = {"runs": runs, "colors": COLORS, "dashes": DASHES, "panels": panels}
    # No text of a run may end the script that the data is in.
    inside = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    template = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("__TITLE__", html.escape(title)).replace("__DATA__", inside)


def attention_part(tokens: list[str], weights_LNTS: np.ndarray, heads: Heads) -> dict[str, Any]:
    """Return the attention of some heads for the page: 256 grades of weight."""
    grades_LNTS = np.round(weights_LNTS * 255).astype(np.uint8)
    maps = {}
    for layer, head in heads:
        content = grades_LNTS[layer, head].tobytes()
        maps[f"layer {layer}, head {head}"] = base64.b64encode(content).decode()
    return {"tokens": tokens, "heads": maps}


def draw_attention(tokens: list[str], weights_LNTS: np.ndarray, heads: Heads, path: Any) -> None:
    """Draw heads over a text as a PNG: a row for each query, a column for each key."""
    # Inches: a line of small text for each token.
    side = max(2.6, 0.16 * len(tokens))
    figure, grid = new_grid(len(heads), columns=4, size=(side, side))
    # A dollar sign would begin a formula.
    labels = [token.replace("\n", "⏎").replace("$", r"\$") for token in tokens]
    ticks = range(len(labels))
    for axes, (layer, head) in zip(grid, heads, strict=True):
        axes.imshow(weights_LNTS[layer, head], cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"layer {layer}, head {head}", fontsize=9)
        axes.set_xticks(ticks, labels, rotation=90, fontsize=6)
        axes.set_yticks(ticks, labels, fontsize=6)
    save(figure, path)
