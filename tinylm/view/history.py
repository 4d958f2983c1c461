"""What can be shown of a run: curves, samples, time, settings, gathered from the files of its
folder alone.
"""

import collections
import dataclasses
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
# What samples.txt has above the texts of a step. The group is the step.
_SAMPLE = re.compile(r"^--- step (\d{1,18}) ---\n", re.MULTILINE)

# Values by name, all over the same steps; None where a step lacks one.
Curves = dict[str, list[float | None]]


@dataclasses.dataclass(frozen=True)
class HostFigure:
    """What hosts needed of one kind.

    Attributes:
      name: the figure of core/vitals.py. Each log line has the largest value of all hosts.
      usual: the median of these.
      most: their maximum.
      on: of a job of several processes, the host that had the largest most often.
      share: its part of the lines.
    """

    name: str
    usual: float
    most: float
    on: str | None = None
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the model wrote at a step, one text a prompt."""

    step: int
    texts: list[str]


@dataclasses.dataclass(frozen=True)
class History:
    """A run as its files tell it.

    Attributes:
      name: of its folder.
      path: of its folder.
      tokens_per_step: of all devices.
      floor: the entropy of the data, in nats per token, where that is known.
      train: the curves of training.
      valid: the curves of validation.
      time: where its seconds went, by kind, over all processes.
      hosts: what they needed besides computing.
      prompts: of its samples.
      samples: in the order of their steps.
      settings: by dotted key, with the versions that it ran on.
    """

    name: str
    path: str
    tokens_per_step: int
    floor: float | None
    train: Curves
    valid: Curves
    time: dict[str, float]
    hosts: list[HostFigure]
    prompts: list[str]
    samples: list[Sample]
    settings: dict[str, Any]


def _readable(name: str) -> str:
    """Return a name of a file as UTF-8 has it: under another locale Python holds its bytes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def gather(workdir: str) -> History:
    """Return the history of a run; raise UserError if the folder holds none."""
    folder = RunFolder(workdir)
    record = folder.read_config()
    config = record["config"]
    prompts = config["sample"]["prompts"]
    tokens_per_step = from_dict(DataConfig, config["data"]).tokens_per_step
    lines = folder.metrics()
    times = [line["unix_secs"] for line in lines if "unix_secs" in line]
    start = min(times, default=0.0)
    floors = [line["floor"] for line in lines if "floor" in line]
    return History(
        name=_readable(folder.path.name),
        path=_readable(str(folder.path)),
        tokens_per_step=tokens_per_step,
        floor=floors[-1] if floors else None,
        train=curves(lines, "train", start),
        valid=curves(lines, "valid", start),
        time=seconds_by_kind(lines),
        hosts=hosts(lines),
        prompts=prompts,
        samples=samples(folder, max(1, len(prompts))),
        settings=_flat({**config, "versions": record["versions"]}),
    )


def curves(lines: list[dict[str, Any]], split: str, start: float) -> Curves:
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
    """Return six digits of a number, which no picture shows more of, and whole numbers (steps) as
    they are; None for anything that isn't a number.
    """
    if isinstance(value, int):
        return value
    if not isinstance(value, float):
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


def hosts(lines: list[dict[str, Any]]) -> list[HostFigure]:
    """Return what hosts needed besides computing, as lines of metrics.jsonl tell it."""
    found = []
    for name in Vitals._fields:
        values = [line[name] for line in lines if name in line]
        if not values:
            continue
        figure = HostFigure(name, usual=float(np.median(values)), most=max(values))
        names = collections.Counter(line[name + ON] for line in lines if name + ON in line)
        if names:
            [(on, count)] = names.most_common(1)
            figure = dataclasses.replace(figure, on=on, share=count / names.total())
        found.append(figure)
    return found


def samples(folder: RunFolder, num_prompts: int) -> list[Sample]:
    """Return samples in the order of their steps; of a step written twice, the last texts."""
    # A crash may have torn a character.
    content = folder.read_log(folder.samples_file)
    text = content.decode(errors="replace")

    # A pattern with one group splits a text into: what comes before, step, text, step, text, ...
    _, *parts = _SAMPLE.split(text)
    steps = parts[::2]
    samples_of_steps = parts[1::2]

    # A step has a text for each prompt. After a crash it has those of both runs, one by one.
    texts_of: dict[int, list[str]] = collections.defaultdict(list)
    for step, sample in zip(steps, samples_of_steps, strict=True):
        sample = sample.strip("\n")
        texts_of[int(step)].append(sample)

    found = []
    for step in sorted(texts_of):
        last_texts = texts_of[step][-num_prompts:]
        found.append(Sample(step, last_texts))
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
