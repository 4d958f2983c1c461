"""What can be shown of a run: curves, samples, time, settings, gathered from the files of its
folder alone.
"""

import collections
import math
import re
from typing import Any

import numpy as np

from tinylm.core.settings import from_dict
from tinylm.data.config import DataConfig
from tinylm.run.folder import RunFolder

MOST_POINTS = 1500  # of a curve; a longer one is thinned evenly, its ends kept
_SAMPLE = re.compile(r"^--- step (\d{1,18}) ---\n", re.MULTILINE)


def _readable(name: str) -> str:
    """Return a name of a file as its bytes read in UTF-8: under another locale Python holds them as
    escapes.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def gather(workdir: str) -> dict[str, Any]:
    """Return a run as plain values, ready for JSON; raise UserError where there is none."""
    folder = RunFolder(workdir)
    record, lines = folder.read_config(), folder.metrics()
    config, start = (
        record["config"],
        min((line["unix_secs"] for line in lines if "unix_secs" in line), default=0.0),
    )
    return {
        "name": _readable(folder.path.name),
        "path": _readable(str(folder.path)),
        "tokens_per_step": from_dict(DataConfig, config["data"]).tokens_per_step,
        "floor": next((line["floor"] for line in reversed(lines) if "floor" in line), None),
        "train": curves(lines, "train", start),
        "valid": curves(lines, "valid", start),
        "time": seconds_by_kind(lines),
        "prompts": config["sample"]["prompts"],
        "samples": samples(folder, max(1, len(config["sample"]["prompts"]))),
        "settings": _flat({**config, "versions": record["versions"]}),
    }


def curves(lines: list[dict[str, Any]], split: str, start: float) -> dict[str, list[float | None]]:
    """Return {name: values} over the steps of a split, `secs` counted from `start`; what a line
    lacks is None.
    """
    lines = [line for line in lines if line.get("split") == split]
    kept = np.linspace(0, len(lines) - 1, min(len(lines), MOST_POINTS)).astype(int).tolist()
    lines = [{**lines[i], "secs": lines[i].get("unix_secs", start) - start} for i in kept]
    names = dict.fromkeys(
        name for line in lines for name in line if name not in ("split", "unix_secs")
    )
    return {name: [_rounded(line.get(name)) for line in lines] for name in names}


def _rounded(value: Any) -> float | None:
    return float(f"{value:.6g}") if isinstance(value, int | float) else None


def seconds_by_kind(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return where the time of a run went, over all its processes: the last account of each
    counts.
    """
    last = {line.get("process"): line for line in lines if line.get("split") == "time"}
    kinds = dict.fromkeys(name for line in last.values() for name in line if name.endswith("_secs"))
    return {
        name.removesuffix("_secs"): sum(line.get(name, 0.0) for line in last.values())
        for name in kinds
        if name not in ("total_secs", "unix_secs")
    }


def samples(folder: RunFolder, prompts: int) -> list[dict[str, Any]]:
    """Return [{step, texts}] in order; of a step written twice, the last texts."""
    text = (
        folder.samples_file.read_bytes().decode(errors="replace")
        if folder.samples_file.exists()
        else ""
    )
    parts, found = _SAMPLE.split(text)[1:], collections.defaultdict(list)
    for step, sample in zip(parts[::2], parts[1::2], strict=True):
        found[int(step)].append(sample.strip("\n"))
    return [{"step": step, "texts": found[step][-prompts:]} for step in sorted(found)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key; what is not finite, which JSON can't hold, becomes
    text.
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        value = str(value) if isinstance(value, float) and not math.isfinite(value) else value
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat
