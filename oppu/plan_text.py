"""A plan as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from textwrap import fill

from oppu.plan import Plan, Step

HEAD = ("jobs", "examples", "tokens", "packed", "FLOPs", "hours", "disk")


def text_of(plan: Plan) -> str:
    """The steps of each task (bases together, predictions together), the totals, and what was assumed."""
    lines = [_line("", HEAD)]
    for task, steps in groupby(plan.steps, lambda step: step.task):
        lines += ["", task, *(_line(f"  {name}", _cells(group)) for name, group in _grouped(list(steps)))]
    lines += ["", _line("all", _cells(plan.steps)), ""]
    names = {
        "personal_adapter_bytes": "personal adapters on disk",
        "base_adapter_bytes": "base adapters on disk",
        "weight_bytes": "the model's weights",
        "memory_bytes": f"memory of the GPU ({plan.gpu.name} has {plan.gpu.memory:g} GB)",
        "host_memory_bytes": "memory of the host, while the base is loaded",
    }
    lines += [f"{_amount(plan.totals[key], 'B'):>8}  {name}" for key, name in names.items()]
    lines += [f"{_hours(plan.totals['hours']):>8}  hours on one {plan.gpu.name}", ""]
    lines += [fill(note, 106, initial_indent="- ", subsequent_indent="  ") for note in plan.notes]
    return "\n".join(lines) + "\n"


def _grouped(steps: list[Step]) -> list[tuple[str, list[Step]]]:
    """A row for each personal training; profiles, bases and predictions in a row each."""
    groups: dict[str, list[Step]] = {}
    for step in steps:
        name = f"personal {step.setting.removesuffix('/full')}" if step.step == "personal" else step.step
        groups.setdefault(name, []).append(step)
    last = [name for name in groups if name == "prediction"]
    names = [name for name in groups if name not in last] + last
    return [(f"{n} ({len(groups[n])} settings)" if len(groups[n]) > 1 else n, groups[n]) for n in names]


def _cells(steps: Sequence[Step]) -> tuple[str, ...]:
    counts = [sum(getattr(step, name) for step in steps) for name in ("jobs", "examples", "tokens", "packed")]
    sums = [_sum(steps, name) for name in ("flops", "hours", "disk")]
    return (*map(_amount, counts), _amount(sums[0]), _hours(sums[1]), _amount(sums[2], "B"))


def _sum(steps: Sequence[Step], name: str) -> float | None:
    values = [getattr(step, name) for step in steps]
    return None if None in values else sum(values)


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:30.30}" + "".join(f"{cell:>10}" for cell in cells)


def _hours(value: float | None) -> str:
    if value is None:
        return "unknown"
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _amount(value: float | None, unit: str = "") -> str:
    """A number with three digits and a prefix: 1280 is 1.28k."""
    if value is None:
        return "unknown"
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if abs(value) < 999.5:
            return f"{value:.0f}{unit}" if not prefix else f"{value:.3g}{prefix}{unit}"
        value /= 1000
    return f"{value:.3g}Z{unit}"
