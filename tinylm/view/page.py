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

from tinylm.view.attention import Attention
from tinylm.view.plot import COLORS, DASHES, PANELS, new_grid, plain

Heads = Sequence[tuple[int, int]]  # (layer, head)


def page(title: str, runs: list[dict[str, Any]]) -> str:
    """Return the HTML of a report."""
    # A panel of the page may show several values of a run.
    panels = [(heading, [name]) for name, heading in PANELS.items()]
    data = {"runs": runs, "colors": COLORS, "dashes": DASHES, "panels": panels}
    # No text of a run may end the script that the data is in.
    inside = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    template = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("__TITLE__", html.escape(title)).replace("__DATA__", inside)


def attention_part(attention: Attention, heads: Heads) -> dict[str, Any]:
    """Return the attention of some heads for the page: 256 grades of weight."""
    grades_LNTS = np.round(attention.weights_LNTS * 255).astype(np.uint8)
    maps = {}
    for layer, head in heads:
        content = grades_LNTS[layer, head].tobytes()
        maps[f"layer {layer}, head {head}"] = base64.b64encode(content).decode()
    tokens = [visible(token) for token in attention.tokens]
    return {"tokens": tokens, "heads": maps}


def figure_of_attention(attention: Attention, heads: Heads) -> Any:
    """Return a figure of heads over a text: a row for each query, a column for each key."""
    labels = [plain(visible(token)) for token in attention.tokens]
    ticks = range(len(labels))
    # A line of small text for each token.
    side_inches = max(2.6, 0.16 * len(labels))
    figure, grid = new_grid(len(heads), columns=4, size=(side_inches, side_inches))
    for axes, (layer, head) in zip(grid, heads, strict=True):
        weights_TS = attention.weights_LNTS[layer, head]
        axes.imshow(weights_TS, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"layer {layer}, head {head}", fontsize=9)
        axes.set_xticks(ticks, labels, rotation=90, fontsize=6)
        axes.set_yticks(ticks, labels, fontsize=6)
    figure.supylabel("query: the token that looks", fontsize=9)
    figure.supxlabel("key: the token looked at\n(white: weight 0, dark blue: 1)", fontsize=9)
    return figure


def visible(token: str) -> str:
    """Return a token as a label, in which ends of lines and spaces alone can be seen."""
    if token.isspace():
        token = token.replace(" ", "␣")
    return token.replace("\n", "⏎")
