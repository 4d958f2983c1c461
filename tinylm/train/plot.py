"""loss.png: training and validation loss against steps, with the corpus's floor where it is known."""

from tinylm.run.folder import RunFolder


def draw_losses(folder: RunFolder, floor: float | None, title: str) -> None:
    """Draw the losses in metrics.jsonl into the run's folder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    lines = [line for line in folder.metrics() if line.get("loss") is not None]
    for split, color, width in (("train", "#7fb0d8", 1.0), ("valid", "#c8501e", 2.0)):
        points = [(line["step"], line["loss"]) for line in lines if line.get("split") == split]
        if points:
            label = f"{split} (last {points[-1][1]:.3f})"
            axes.plot(*zip(*points, strict=True), color=color, lw=width, label=label, marker="o" * (split == "valid"))
    if floor is not None:
        axes.axhline(floor, color="#555555", ls="--", lw=1, label=f"floor of the corpus ({floor:.3f})")
    settled = [line["loss"] for line in lines if line["step"] > 0.05 * lines[-1]["step"]]
    if settled:  # the first steps fall from the loss of a blind guess, and would flatten all that follows
        axes.set_ylim(top=min(settled) + 1.2 * (max(settled) - min(settled)) + 0.05)
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with folder.plot_file.open("wb") as file:
        figure.savefig(file, dpi=130, format="png")
