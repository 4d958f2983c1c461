"""A plan as text: memory, traffic, time, and what to change where it doesn't fit."""

from typing import Any

_ADVICE = {
    "params": "split parameters over more devices (mesh.fsdp=true, or a larger mesh.model)",
    "optimizer": "split the optimizer's state over more devices (mesh.fsdp=true, or a larger "
    "mesh.data)",
    "gradients": "split gradients over more devices (mesh.fsdp=true, or a larger mesh.model)",
    "activations": "recompute more (model.remat=full), take smaller micro-batches "
    "(train.accumulation_steps), a smaller data.batch_size, or a larger mesh.model",
    "batch": "take a smaller data.batch_size",
}


def describe(plan: dict[str, Any]) -> str:
    """Return a plan as lines to print."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    parts = [[f"{plan['device']}, mesh {mesh}"], _memory_lines(plan)]
    if plan["collectives"]:
        parts.append(_traffic_lines(plan))
    parts.append(_time_lines(plan))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _memory_lines(plan: dict[str, Any]) -> list[str]:
    lines = [f"{'memory of a device':<28}{'bytes':>14}"]
    for kind, count in plan["per_device_bytes"].items():
        if count:
            lines.append(f"  {kind:<26}{_bytes(count):>14}")
    lines.append(f"  {'the chip has':<26}{_bytes(plan['chip_bytes']):>14}")
    lines.append(f"  {_verdict(plan)}")
    return lines


def _verdict(plan: dict[str, Any]) -> str:
    """Return whether the plan fits; if not, what takes most and what to change."""
    memory = plan["per_device_bytes"]
    if plan["fits"]:
        return f"fits: {memory['total'] / plan['chip_bytes']:.0%} of the chip's memory"
    too_much = _bytes(memory["total"] - plan["chip_bytes"])
    largest = sorted((kind for kind in memory if kind in _ADVICE), key=lambda kind: -memory[kind])
    advice = [f"{kind} {_bytes(memory[kind])}: {_ADVICE[kind]}" for kind in largest[:2]]
    return f"does not fit: {too_much} too much. {'; '.join(advice)}."


def _traffic_lines(plan: dict[str, Any]) -> list[str]:
    lines = [f"{'traffic a step':<28}{'axis':<14}{'sent':>14}{'needed':>14}"]
    for row in plan["collectives"]:
        sent = _bytes(row["bytes_per_step"])
        needed = _bytes(row["minimum_bytes"])
        lines.append(f"  {row['kind']:<26}{row['axis']:<14}{sent:>14}{needed:>14}")
    lines.append(f"  bytes that a device sends, from the {plan['traffic_from']}")
    return lines


def _time_lines(plan: dict[str, Any]) -> list[str]:
    step_secs = _secs(plan["step_secs_estimate"])
    lines = [f"{'time of a step, at least':<28}{step_secs:>14}  bound by {plan['bound_by']}"]
    for name, secs in plan["secs"].items():
        if secs:
            lines.append(f"  {name:<26}{_secs(secs):>14}")
    flops = f"{plan['flops_per_step']:.3g}"
    lines.append(f"  {'FLOPs of a step':<26}{flops:>14}  MFU at most {plan['mfu_bound']:.0%}")
    train_secs = _secs(plan["train_secs_estimate"])
    lines.append(f"{'time for the tokens':<28}{train_secs:>14}  {plan['tokens']:,} tokens")
    return lines


def describe_search(rows: list[dict[str, Any]], shown: int = 12) -> str:
    """Return the best rows of a search as a table, and the flags of the first one that fits."""
    heads = ("memory", "compiled", "tokens/s", "compiled")
    lines = [
        f"{'mesh':<20}{'fsdp':<6}{'remat':<7}{'batch':>8}" + "".join(f"{h:>13}" for h in heads)
    ]
    for row in rows[:shown]:
        compiled = _bytes(row["compiled_bytes"]) if row["compiled_bytes"] else "-"
        figures = (
            _bytes(row["bytes"]),
            compiled,
            _rate(row["secs_per_token"]),
            _rate(row["compiled_secs_per_token"]),
        )
        mesh = " x ".join(map(str, row["mesh"].values()))
        fsdp = "yes" if row["fsdp"] else "no"
        line = f"{mesh:<20}{fsdp:<6}{row['remat']:<7}{row['batch_size']:>8}"
        line += "".join(f"{figure:>13}" for figure in figures)
        line += f"  {row['bound_by']}"
        if not row.get("fits", True):
            line += ", does not fit"
        lines.append(line)
    if len(rows) > shown:
        lines.append(f"{len(rows) - shown} more")
    lines.append(f"mesh: {' x '.join(rows[0]['mesh'])}; the last column is what bounds a step")

    best = next((row for row in rows if row.get("fits")), rows[0])
    settings = {f"mesh.{name}": size for name, size in best["mesh"].items()}
    settings |= {
        "mesh.fsdp": best["fsdp"],
        "model.remat": best["remat"],
        "data.batch_size": best["batch_size"],
    }
    flags = " ".join(f"--config.{key}={value}" for key, value in settings.items())
    return "\n".join([*lines, f"take {flags}"])


def _rate(secs_per_token: float | None) -> str:
    return f"{1 / secs_per_token:,.0f}" if secs_per_token else "-"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _secs(secs: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("s", 1), ("ms", 1e-3)):
        if secs >= size:
            return f"{secs / size:.2f} {unit}"
    return f"{secs * 1e6:.2f} us"
