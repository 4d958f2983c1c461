"""A plan as text: memory, traffic, time, and what to change where it doesn't fit."""

from typing import Any

_ADVICE = {
    "params": "split parameters over more devices (mesh.fsdp=true, or a larger mesh.model)",
    "optimizer": "split the optimizer's state over more devices (mesh.fsdp=true, or a larger mesh.data)",
    "gradients": "split gradients over more devices (mesh.fsdp=true, or a larger mesh.model)",
    "activations": "recompute more (model.remat=full), take smaller micro-batches (train.accumulation_steps), "
    "a smaller data.batch_size, or a larger mesh.model",
    "batch": "take a smaller data.batch_size",
}


def describe(plan: dict[str, Any]) -> str:
    """Return a plan as lines to print."""
    memory, total = plan["per_device_bytes"], plan["per_device_bytes"]["total"]
    lines = [f"{plan['device']}, mesh {' x '.join(f'{name} {size}' for name, size in plan['mesh'].items())}", ""]
    lines += [f"{'memory of a device':<28}{'bytes':>14}"]
    lines += [f"  {kind:<26}{_bytes(count):>14}" for kind, count in memory.items() if count]
    lines += [f"  {'the chip has':<26}{_bytes(plan['chip_bytes']):>14}", "  " + _verdict(plan, memory, total), ""]
    if plan["collectives"]:
        lines += [f"{'traffic a step':<28}{'axis':<14}{'sent':>14}{'needed':>14}"]
        lines += [
            f"  {row['kind']:<26}{row['axis']:<14}{_bytes(row['bytes_per_step']):>14}{_bytes(row['minimum_bytes']):>14}"
            for row in plan["collectives"]
        ]
        lines += [f"  bytes that a device sends, from the {plan['traffic_from']}", ""]
    lines += [f"{'time of a step, at least':<28}{_secs(plan['step_secs_estimate']):>14}  bound by {plan['bound_by']}"]
    lines += [f"  {name:<26}{_secs(secs):>14}" for name, secs in plan["secs"].items() if secs]
    lines += [
        f"  {'FLOPs of a step':<26}{plan['flops_per_step']:>14.3g}  MFU at most {plan['mfu_bound']:.0%}",
        f"{'time for the tokens':<28}{_secs(plan['train_secs_estimate']):>14}  {plan['tokens']:,} tokens",
    ]
    return "\n".join(lines)


def describe_search(rows: list[dict[str, Any]], shown: int = 12) -> str:
    """Return the best rows of a search as a table, and the flags that take the first one that fits."""
    lines = [f"{'data x model':<14}{'fsdp':<6}{'remat':<7}{'batch':>8}{'memory':>12}{'compiled':>12}{'tokens/s':>13}"
             f"{'compiled':>13}  bound by"]  # fmt: skip
    for row in rows[:shown]:
        rates = [
            f"{1 / secs:,.0f}" if secs else "-" for secs in (row["secs_per_token"], row["compiled_secs_per_token"])
        ]
        compiled = _bytes(row["compiled_bytes"]) if row["compiled_bytes"] else "-"
        shape = f"{row['mesh']['data']} x {row['mesh']['model']}"
        lines.append(f"{shape:<14}{'yes' if row['fsdp'] else 'no':<6}{row['remat']:<7}{row['batch_size']:>8}"
                     f"{_bytes(row['bytes']):>12}{compiled:>12}{rates[0]:>13}{rates[1]:>13}  {row['bound_by']}"
                     f"{'' if row.get('fits', True) else ', does not fit'}")  # fmt: skip
    lines += [f"{len(rows) - shown} more"] * (len(rows) > shown)
    best = next((row for row in rows if row.get("fits")), rows[0])
    flags = {"mesh.data": best["mesh"]["data"], "mesh.model": best["mesh"]["model"], "mesh.fsdp": best["fsdp"],
             "model.remat": best["remat"], "data.batch_size": best["batch_size"]}  # fmt: skip
    return "\n".join([*lines, "take " + " ".join(f"--config.{key}={value}" for key, value in flags.items())])


def _verdict(plan: dict[str, Any], memory: dict[str, int], total: int) -> str:
    """Return whether it fits; if not, what takes most and what to change."""
    if plan["fits"]:
        return f"fits: {total / plan['chip_bytes']:.0%} of the chip's memory"
    largest = sorted((kind for kind in memory if kind in _ADVICE), key=lambda kind: -memory[kind])[:2]
    shown = "; ".join(f"{kind} {_bytes(memory[kind])}: {_ADVICE[kind]}" for kind in largest)
    return f"does not fit: {_bytes(total - plan['chip_bytes'])} too much. {shown}."


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
