"""What can be shown of a run: curves, samples, time, settings, gathered from the files of its
folder alone.
"""

import collections
import math
import re
from typing import Any

import numpy as np

from tinylm.core.settings import from_dict
from tinylm.core.vitals import ON, Vitals
from tinylm.data.config import DataConfig
from tinylm.run.folder import RunFolder

# Of a curve; a longer one is thinned evenly, and keeps its ends.
MOST_POINTS = 1500
_NO_CURVES = ("split", "unix_secs")
_SAMPLE = re.compile(r"^--- step (\d{1,18}) ---\n", re.MULTILINE)


def _readable(name: str) -> str:
    """Return a name of a file as UTF-8 has it: under another locale Python holds its bytes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def gather(workdir: str) -> dict[str, Any]:
    """Return a run as plain values, ready for JSON; raise UserError where there is none."""
    folder = RunFolder(workdir)
    record = folder.read_config()
    config = record["config"]
    prompts = config["sample"]["prompts"]
    tokens_per_step = from_dict(DataConfig, config["data"]).tokens_per_step
    lines = folder.metrics()
    times = [line["unix_secs"] for line in lines if "unix_secs" in line]
    start = min(times, default=0.0)
    floors = [line["floor"] for line in lines if "floor" in line]
    return {
        "name": _readable(folder.path.name),
        "path": _readable(str(folder.path)),
        "tokens_per_step": tokens_per_step,
        "floor": floors[-1] if floors else None,
        "train": curves(lines, "train", start),
        "valid": curves(lines, "valid", start),
        "time": seconds_by_kind(lines),
        "hosts": hosts(lines),
        "prompts": prompts,
        "samples": samples(folder, max(1, len(prompts))),
        "settings": _flat({**config, "versions": record["versions"]}),
    }


def curves(lines: list[dict[str, Any]], split: str, start: float) -> dict[str, list[float | None]]:
    """Return {name: values} over the steps of a split; what a line lacks is None.

    Args:
      lines: of metrics.jsonl.
      split: train or valid.
      start: `secs` of a point counts from this time, in seconds of Unix time.
    """
    of_split = [line for line in lines if line.get("split") == split]
    num_points = min(len(of_split), MOST_POINTS)
    kept = np.linspace(0, len(of_split) - 1, num_points).astype(int)
    points = []
    for i in kept.tolist():
        line = of_split[i]
        secs = line.get("unix_secs", start) - start
        points.append({**line, "secs": secs})

    # A dict keeps the order in which the lines name their values; a set would not.
    names: dict[str, None] = {}
    for point in points:
        names |= dict.fromkeys(point)
    found = {}
    for name in names:
        if name not in _NO_CURVES:
            found[name] = [_rounded(point.get(name)) for point in points]
    return found


def _rounded(value: Any) -> float | None:
    """Return six digits of a number, which no picture shows more of; None for anything that isn't
    one.
    """
    if not isinstance(value, int | float):
        return None
    return float(f"{value:.6g}")


def seconds_by_kind(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return where the time of a run went, over all its processes.

    Each process wrote its account several times; the last one counts.
    """
    account_of = {}
    for line in lines:
        if line.get("split") == "time":
            account_of[line.get("process")] = line
    secs: dict[str, float] = collections.defaultdict(float)
    for account in account_of.values():
        for name, value in account.items():
            if name.endswith("_secs") and name not in ("total_secs", "unix_secs"):
                kind = name.removesuffix("_secs")
                secs[kind] += value
    return dict(secs)


def hosts(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what hosts needed besides computing, one entry for each figure of core/vitals.py.

    Each log line has the largest value of all hosts. An entry has the median of these (`usual`),
    their maximum (`most`) and, of a job of several processes, the host that had the largest most
    often (`on`), with its part of the lines (`share`).
    """
    found = []
    for name in Vitals._fields:
        values = [line[name] for line in lines if name in line]
        if not values:
            continue
        entry = {"name": name, "usual": float(np.median(values)), "most": max(values)}
        names = collections.Counter(line[name + ON] for line in lines if name + ON in line)
        if names:
            [(entry["on"], count)] = names.most_common(1)
            entry["share"] = count / names.total()
        found.append(entry)
    return found


def samples(folder: RunFolder, num_prompts: int) -> list[dict[str, Any]]:
    """Return [{step, texts}] in order; of a step written twice, the last texts."""
    if not folder.samples_file.exists():
        return []
    text = folder.samples_file.read_bytes().decode(errors="replace")
    # Split by a pattern with one group, the parts are: what comes before, step, text, step, ...
    parts = _SAMPLE.split(text)[1:]
    texts_of: dict[int, list[str]] = collections.defaultdict(list)
    for step, sample in zip(parts[::2], parts[1::2], strict=True):
        texts_of[int(step)].append(sample.strip("\n"))
    found = []
    for step in sorted(texts_of):
        last_texts = texts_of[step][-num_prompts:]
        found.append({"step": step, "texts": last_texts})
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        if isinstance(value, dict):
            flat |= _flat(value, f"{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            # JSON can't hold it as a number.
            flat[key] = str(value)
        else:
            flat[key] = value
    return flat
