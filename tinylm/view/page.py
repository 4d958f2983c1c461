"""The report as one HTML page that needs no network, and the picture of attention.

The page is `page.html` with the runs as JSON inside; its script draws.
"""

import base64
import dataclasses
import html
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tinylm.view.attention import Attention
from tinylm.view.history import History
from tinylm.view.parameters import ParameterTable
from tinylm.view.plot import COLORS, DASHES, PANELS, new_grid, plain

Heads = Sequence[tuple[int, int]]  # (layer, head)


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """The attention of some heads over a text.

    Attributes:
      tokens: of the text, as labels.
      heads: for each, by its name, its weights of T x T tokens: a byte each, in base64.
    """

    tokens: list[str]
    heads: dict[str, str]


@dataclasses.dataclass(frozen=True)
class RunOnPage:
    """What the page shows of a run; without its attention, where that is None."""

    history: History
    model: ParameterTable
    attention: AttentionMaps | None = None

    def as_json(self) -> dict[str, Any]:
        """Return what the page's script reads: the history's values and, next to them, the rest."""
        return {**vars(self.history), "model": self.model, "attention": self.attention}


def page(title: str, runs: Sequence[RunOnPage]) -> str:
    """Return the HTML of a report."""
    # A panel of the page may show several values of a run.
    panels = [(heading, [name]) for name, heading in PANELS.items()]
    data = {
        "runs": [run.as_json() for run in runs],
        "colors": COLORS,
        "dashes": DASHES,
        "panels": panels,
    }
    # Dataclasses are written as objects of their fields. Copying them with `asdict` would take a
    # call for each point of each curve.
    content = json.dumps(data, allow_nan=False, default=vars)
    # No text of a run may end the script that the data is in.
    inside = content.replace("<", "\\u003c")
    template = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("__TITLE__", html.escape(title)).replace("__DATA__", inside)


def attention_maps(attention: Attention, heads: Heads) -> AttentionMaps:
    """Return the attention of some heads for the page: 256 grades of weight."""
    grades_LNTS = np.round(attention.weights_LNTS * 255).astype(np.uint8)
    maps = {}
    for layer, head in heads:
        content = grades_LNTS[layer, head].tobytes()
        maps[f"layer {layer}, head {head}"] = base64.b64encode(content).decode()
    tokens = [visible(token) for token in attention.tokens]
    return AttentionMaps(tokens, maps)


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
