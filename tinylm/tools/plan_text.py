"""A plan as text: memory, traffic, time, and what to change where it doesn't fit."""

from collections.abc import Sequence

from tinylm.core.text import bytes_text, columns, mesh_text, secs_text
from tinylm.tools.plan import Plan
from tinylm.tools.search import SearchRow

# Widths of columns: what, axis, figures (negative: aligned to the right).
_MEMORY = (28, -14)
_TRAFFIC = (28, 14, -14, -14, -10)
_TIME = (28, -14, 0)
_SEARCH = (20, 6, 7, -8, -13, -13, -13, -13, 0)

_ADVICE = {
    "params": "split parameters over more devices (mesh.fsdp=true, or a larger mesh.model)",
    "optimizer": (
        "split the optimizer's state over more devices (mesh.fsdp=true, or a larger mesh.data)"
    ),
    "gradients": "split gradients over more devices (mesh.fsdp=true, or a larger mesh.model)",
    "activations": (
        "recompute more (model.remat=full), take smaller micro-batches "
        "(train.accumulation_steps), a smaller data.batch_size, or a larger mesh.model"
    ),
    "batch": "take a smaller data.batch_size",
}


def describe(plan: Plan) -> str:
    """Return a plan as lines to print."""
    head = [f"{plan.device}, mesh {mesh_text(plan.mesh)}"]
    if plan.workers:
        head.append(
            f"workers {plan.workers}, with a sync every {plan.sync_every_steps} steps, of which a "
            "step has its part here"
        )
    parts = [head, _memory_lines(plan)]
    if plan.collectives:
        parts.append(_traffic_lines(plan))
    parts.append(_time_lines(plan))
    return "\n\n".join("\n".join(lines) for lines in parts)


def _memory_lines(plan: Plan) -> list[str]:
    rows = [("memory of a device", "bytes")]
    for kind, count in plan.per_device_bytes.items():
        # What the workers have counts as the state of the optimizer.
        name = "optimizer and workers" if plan.workers and kind == "optimizer" else kind
        if count:
            rows.append((f"  {name}", bytes_text(count)))
    rows.append(("  the chip has", bytes_text(plan.chip_bytes)))
    lines = [columns(row, _MEMORY) for row in rows]
    lines.append(f"  {_verdict(plan)}")
    return lines


def _verdict(plan: Plan) -> str:
    """Return whether the plan fits; if not, what takes most and what to change."""
    memory = plan.per_device_bytes
    total_bytes = memory["total"]
    if plan.fits:
        part = total_bytes / plan.chip_bytes
        return f"fits: {part:.0%} of the chip's memory"

    # The two kinds that take most. Those that no setting makes smaller are passed over, such as
    # the program; so is the total.
    kinds = [kind for kind in memory if kind in _ADVICE]
    kinds.sort(key=lambda kind: -memory[kind])
    advice = []
    for kind in kinds[:2]:
        size = bytes_text(memory[kind])
        advice.append(f"{kind} {size}: {_ADVICE[kind]}")
    missing = bytes_text(total_bytes - plan.chip_bytes)
    return f"does not fit: {missing} too much. {'; '.join(advice)}."


def _traffic_lines(plan: Plan) -> list[str]:
    rows = [("traffic a step", "axis", "sent", "needed", "hidden")]
    for one in plan.collectives:
        sent = bytes_text(one.bytes_per_step)
        needed = bytes_text(one.minimum_bytes)
        rows.append((f"  {one.kind}", one.axis, sent, needed, _share(one.hidden_share)))
    lines = [columns(row, _TRAFFIC) for row in rows]
    lines.append(f"  bytes that a device sends, from the {plan.traffic_from}")
    sends_rows = any(one.kind == "all-to-all" and one.minimum_bytes for one in plan.collectives)
    if plan.device == "cpu" and sends_rows:
        lines.append(
            "  to experts and back: the rows that an all-to-all sends; CPUs gather all for it"
        )
    if plan.hidden_share is not None:
        lines.append(f"  products hide {plan.hidden_share:.0%} of the time that this takes")
    return lines


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def _time_lines(plan: Plan) -> list[str]:
    # Each row has a note behind its figure, or none.
    step_secs = secs_text(plan.step_secs_estimate)
    note = f"  bound by {plan.bound_by}"
    rows = [("time of a step, at least", step_secs, note)]

    for name, secs in plan.secs.items():
        if secs:
            rows.append((f"  {name}", secs_text(secs), ""))

    flops = f"{plan.flops_per_step:.3g}"
    note = f"  MFU at most {plan.mfu_bound:.0%}"
    rows.append(("  FLOPs of a step", flops, note))

    train_secs = secs_text(plan.train_secs_estimate)
    note = f"  {plan.tokens:,} tokens"
    rows.append(("time for the tokens", train_secs, note))
    return [columns(row, _TIME) for row in rows]


def describe_search(rows: Sequence[SearchRow], shown: int = 12) -> str:
    """Return the best rows of a search as a table, and the flags of the first one that fits."""
    heads = ("mesh", "fsdp", "remat", "batch", "memory", "compiled", "tokens/s", "compiled", "")
    lines = [columns(heads, _SEARCH)]
    for row in rows[:shown]:
        cells = _cells(row)
        lines.append(columns(cells, _SEARCH))
    num_left_out = len(rows) - shown
    if num_left_out > 0:
        lines.append(f"{num_left_out} more")
    axes = " x ".join(rows[0].mesh)
    lines.append(f"mesh: {axes}; the last column is what bounds a step")

    # Of rows that weren't compiled nobody knows whether they fit. Where none is known to, the
    # first one is the best guess.
    fitting = [row for row in rows if row.fits]
    best = fitting[0] if fitting else rows[0]
    lines.append(f"take {_flags(best)}")
    return "\n".join(lines)


def _flags(row: SearchRow) -> str:
    """Return the flags that choose a row of a search."""
    settings: dict[str, int | str] = {}
    for name, size in row.mesh.items():
        settings[f"mesh.{name}"] = size
    settings["mesh.fsdp"] = row.fsdp
    if row.expert_parallel:
        settings["model.expert_parallel"] = True
    settings["model.remat"] = row.remat
    settings["data.batch_size"] = row.batch_size
    return " ".join(f"--config.{key}={value}" for key, value in settings.items())


def _cells(row: SearchRow) -> tuple[str, ...]:
    """Return a row of a search as the cells of a table's line."""
    compiled = "-"
    if row.compiled_bytes:
        compiled = bytes_text(row.compiled_bytes)
    bound_by = f"  {row.bound_by}"
    if row.expert_parallel:
        bound_by += ", tokens sent to experts"
    if row.fits is False:
        bound_by += ", does not fit"
    return (
        " x ".join(str(size) for size in row.mesh.values()),
        "yes" if row.fsdp else "no",
        row.remat,
        str(row.batch_size),
        bytes_text(row.bytes),
        compiled,
        _rate(row.secs_per_token),
        _rate(row.compiled_secs_per_token),
        bound_by,
    )


def _rate(secs_per_token: float | None) -> str:
    return f"{1 / secs_per_token:,.0f}" if secs_per_token else "-"
