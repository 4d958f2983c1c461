"""The report of runs: one HTML page, and PNGs next to it.

Everything comes from the files of the runs' folders. Attention alone opens a run: it restores the
parameters of a checkpoint.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from tinylm.core.errors import StorageError, UserError, one_line
from tinylm.core.files import make_folder
from tinylm.core.log import say
from tinylm.core.storage import failures
from tinylm.run.folder import RunFolder
from tinylm.run.open_run import open_run
from tinylm.view import page
from tinylm.view.attention import attention_of
from tinylm.view.history import History, gather
from tinylm.view.parameters import describe_run
from tinylm.view.plot import figure_of_curves, save


class AttentionRequest(NamedTuple):
    """Which attention a report shows.

    Attributes:
      text: over which it is drawn.
      heads: as LAYER.HEAD; none: all of the first and the last layer.
      step: the checkpoint: best, latest or a number.
    """

    text: str
    heads: Sequence[str]
    step: str


def write_report(
    workdirs: Sequence[str], out: str, attention: AttentionRequest | None
) -> list[epath.Path]:
    """Write the report of some runs.

    Args:
      workdirs: folders of runs, or of sweeps, which stand for the runs below them.
      out: the page; "": report.html in the first folder. Pictures get names that begin with its.
      attention: what to show of it; None: nothing.

    Returns:
      What was written: the page, then the pictures.

    Raises:
      UserError: where there is no run, or a single run can't show such attention.
      StorageError: where the report can't be written.
    """
    folders = [folder for workdir in workdirs for folder in runs_in(workdir)]
    runs = distinctly_named([gather(folder) for folder in folders])
    place = epath.Path(out or RunFolder(workdirs[0]).path / "report.html")
    written = [place]
    try:
        make_folder(place.parent)
        if any(run.train or run.valid for run in runs):
            curves = place.with_suffix(".png")
            written.append(curves)
            save(figure_of_curves(runs), curves)
        shown = []
        for folder, run in zip(folders, runs, strict=True):
            on_page = page.RunOnPage(run, describe_run(folder))
            shown.append(on_page)
            if attention is None:
                continue
            name = run.name.replace("/", "_")
            picture = place.with_name(f"{place.stem}_attention_{name}.png")
            try:
                maps = _show_attention(folder, attention, picture)
            except UserError as error:
                # Of several runs, one may know other characters, or have other heads.
                if len(runs) == 1:
                    raise
                say(f"warning: no attention of {run.name}: {error}")
            else:
                shown[-1] = dataclasses.replace(on_page, attention=maps)
                written.append(picture)
        # The page lists its runs below the title, which would be long with many.
        names = [run.name for run in runs]
        title = ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"
        content = page.page(title, shown)
        # Under a locale that is not UTF-8, names of files hold their bytes in escapes, which become
        # those bytes again.
        place.write_bytes(content.encode("utf-8", "surrogateescape"))
    except failures() as error:
        raise StorageError(f"--out={place} cannot be written: {one_line(error)}.") from error
    return written


def runs_in(workdir: str) -> list[str]:
    """Return the folder of a run or, where that of a sweep is given, those of its runs."""
    folder = RunFolder(workdir)
    if folder.exists() or not folder.path.is_dir():
        return [workdir]
    below = sorted(str(path) for path in folder.path.iterdir() if (path / "config.json").exists())
    return below or [workdir]


def distinctly_named(runs: Sequence[History]) -> list[History]:
    """Return runs that are named by their paths where the names of two folders are alike."""
    names = {run.name for run in runs}
    if len(names) == len(runs):
        return list(runs)
    return [dataclasses.replace(run, name=run.path) for run in runs]


def _show_attention(
    workdir: str, request: AttentionRequest, picture: epath.Path
) -> page.AttentionMaps:
    """Draw the attention of a run, and return what the page shows of it."""
    run = open_run(workdir, request.step)
    attention = attention_of(run, request.text)
    num_layers, num_heads, _, _ = attention.weights_LNTS.shape
    heads = chosen_heads(request.heads, num_layers, num_heads)
    save(page.figure_of_attention(attention, heads), picture)
    return page.attention_maps(attention, heads)


def chosen_heads(names: Sequence[str], num_layers: int, num_heads: int) -> list[tuple[int, int]]:
    """Return (layer, head) pairs from names like "0.3".

    Without names they are all heads of the first and the last layer.
    """
    if not names:
        layers = sorted({0, num_layers - 1})
        return [(layer, head) for layer in layers for head in range(num_heads)]
    known = {}
    for layer in range(num_layers):
        for head in range(num_heads):
            known[f"{layer}.{head}"] = (layer, head)
    for name in names:
        if name not in known:
            raise UserError(
                f"--attention_heads={name} must be LAYER.HEAD, up to "
                f"{num_layers - 1}.{num_heads - 1}."
            )
    return [known[name] for name in names]
