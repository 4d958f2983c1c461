"""Pictures of runs: curves against steps, as PNGs.

Colours are Okabe and Ito's (2008), which colour-blind readers tell apart; runs differ in their
dashes too, for print. Drawn without pyplot, whose backend belongs to the notebook that it is used
in.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from tinylm.core.errors import one_line
from tinylm.core.log import say, say_once
from tinylm.run.folder import RunFolder
from tinylm.view.history import History, gather

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("", "7 3", "2 3", "10 3 2 3", "5 2", "1 2", "12 4")
PANELS = {
    "loss": "Loss (nats per token)",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "tokens_per_sec": "Tokens per second",
    "mfu": "Model FLOPs utilization",
    "exact_match": "Exact match",
    "drift": "Drift of the workers up to the last sync",
    "outer_grad_norm": "Drift of their mean (the outer gradient)",
}


class Curve(NamedTuple):
    """A line in a panel."""

    steps: list[float]
    values: list[float]
    look: dict[str, Any]  # what matplotlib's `plot` takes


def figure_of_curves(runs: Sequence[History], names: Sequence[str] = tuple(PANELS)) -> Any:
    """Return a figure of the panels that have data.

    Args:
      runs: whose curves are drawn.
      names: of the panels.
    """
    panels: dict[str, list[Curve]] = {}
    for name in names:
        curves = []
        for i, run in enumerate(runs):
            curves += _curves(i, run, name)
        if curves:
            panels[name] = curves

    # Without any data there is one empty picture rather than none.
    figure, grid = new_grid(max(1, len(panels)), columns=2, size=(7, 4))
    for axes, (name, curves) in zip(grid, panels.items(), strict=False):
        for curve in curves:
            axes.plot(curve.steps, curve.values, **curve.look)
        if name == "loss":
            for floor in sorted({run.floor for run in runs if run.floor is not None}):
                label = f"floor of the corpus ({floor:.3f})"
                axes.axhline(floor, color="#555555", ls=":", label=label)
        if name in ("loss", "grad_norm"):
            _leave_first_steps_out(axes, curves)
        axes.set(title=PANELS[name], xlabel="step")
        axes.locator_params("x", integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
    add_legend_below(figure, grid[0])
    return figure


def _leave_first_steps_out(axes: Any, curves: Sequence[Curve]) -> None:
    """End the axis above what comes after the first twentieth, which would flatten the rest."""
    late = []
    for curve in curves:
        first = curve.steps[-1] / 20
        points = zip(curve.steps, curve.values, strict=True)
        late += [value for step, value in points if step > first]
    if late:
        margin = 0.05 * (max(late) - min(late)) or 0.05 * abs(max(late)) or 1e-9
        axes.set_ylim(top=max(late) + margin)


def draw_loss(folder: RunFolder) -> bool:
    """Draw loss.png into a run's folder; say so where that can't be, and return whether it could.

    Whatever fails in drawing (the library reads the user's own settings), no run ends for it.
    """
    try:
        save(figure_of_curves([gather(str(folder.path))], ["loss"]), folder.plot_file)
    except Exception as error:
        say(f"warning: {folder.plot_file} cannot be written: {one_line(error)}")
        return False
    return True


_LOOK_OF_SPLIT: dict[str, dict[str, Any]] = {
    "train": {"lw": 1, "alpha": 0.7},
    "valid": {"lw": 2, "marker": "o", "ms": 4},
}


def _curves(i: int, run: History, name: str) -> list[Curve]:
    """Return the training and the validation curve of the i-th run, without gaps."""
    found = []
    curves_of_split = {"train": run.train, "valid": run.valid}
    for split, look in _LOOK_OF_SPLIT.items():
        curve = curves_of_split[split]
        if name not in curve:
            continue
        steps = []
        values = []
        for step, value in zip(curve["step"], curve[name], strict=True):
            if value is not None:
                assert step is not None, "every line that is kept has its step"
                steps.append(step)
                values.append(value)
        if not values:
            continue
        label = plain(f"{run.name}, {split} (last {values[-1]:.3f})")
        style = {**line_style(i), **look, "label": label}
        if len(values) == 1:
            # A line needs two points to be seen.
            style["marker"] = "o"
        found.append(Curve(steps, values, style))
    return found


def plain(text: str) -> str:
    """Return a text for matplotlib, in which a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def line_style(i: int) -> dict[str, Any]:
    """Return the colour and dashes of the i-th run."""
    color = COLORS[i % len(COLORS)]
    dash = DASHES[i % len(DASHES)]
    if not dash:
        return {"color": color, "ls": "-"}
    lengths = tuple(int(length) for length in dash.split())
    return {"color": color, "ls": (0, lengths)}


def new_grid(count: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """Return a figure and its axes for `count` pictures of a size in inches."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    rows = math.ceil(count / columns)
    width, height = size
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    return figure, grid


def add_legend_below(figure: Any, axes: Any, title: str = "") -> None:
    """List the lines of some axes below the figure, which grows by the room that this takes.

    Inside of the axes, the names of a few runs would cover what they stand for.
    """
    lines = axes.get_lines()
    if not lines:
        return
    # Of the letters and the sample of a line in an entry, in inches.
    letter, sample = 0.068, 0.7
    width, height = figure.get_size_inches()
    most_letters = int((width - sample) / letter)
    labels = [textwrap.fill(line.get_label(), most_letters) for line in lines]
    longest = max(len(row) for label in labels for row in label.split("\n"))
    columns = max(1, min(len(labels), int(width / (sample + letter * longest))))
    rows_per_entry = max(label.count("\n") + 1 for label in labels)
    rows = rows_per_entry * math.ceil(len(labels) / columns) + bool(title)
    figure.set_size_inches(width, height + 0.2 + 0.18 * rows)
    # The lines are given by hand, since matplotlib leaves out those whose name begins with "_".
    figure.legend(
        lines, labels, loc="outside lower center", ncols=columns, fontsize=8, title=title or None
    )


def save(figure: Any, path: Any) -> None:
    """Write a figure as a PNG, to a disk or a bucket; without LaTeX where that fails."""
    try:
        data = _png(figure)
    except RuntimeError:
        from matplotlib import rc_context
        from matplotlib.text import Text

        texts = figure.findobj(Text)
        if not any(text.get_usetex() for text in texts):
            raise
        say_once("matplotlib's setting text.usetex is left out: LaTeX does not work here.")
        for text in texts:
            text.set_usetex(False)
        with rc_context({"text.usetex": False}):
            data = _png(figure)
    path.write_bytes(data)


def _png(figure: Any) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, dpi=110, format="png")
    return data.getvalue()
