"""Figures as SVG whose bytes depend on the numbers only."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from oppu.files import write_bytes
from oppu.metrics import better, columns
from oppu.tables import augmentation_order
from oppu.tasks import Task, tasks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = {"none": ("#5b6770", "s", "base model alone"), "lora": ("#c2410c", "o", "personal LoRA (OPPU)")}
STYLE: Any = {
    "svg.hashsalt": "oppu",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def table1_figure(scores: pl.DataFrame, references: pl.DataFrame) -> Figure:
    """Each task's first metric per augmentation, with and without a personal adapter, 95 % intervals over users, and
    what answers without any model reach as dashed lines (Table 1, full history)."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    full = scores.filter((pl.col("history") == "full") & pl.col("peft").is_in(list(KINDS)))
    found = [task for name, task in tasks().items() if name in set(full["task"])]
    across = min(len(found), 2)
    down = -(-len(found) // across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4 * across, 3.3 * down + 0.7), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).ravel()
        for task, axes in zip(found, panels, strict=False):
            metric = columns(task)[0]
            _panel(
                axes, task, full.filter(task=task.name, metric=metric), references.filter(task=task.name, metric=metric)
            )
        for axes in panels[len(found) :]:
            axes.remove()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), frameon=False)
    return figure


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as SVG; equal figures are equal bytes."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    write_bytes(path, buffer.getvalue(), mode=0o644)


def spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels as near as may be to the wanted ones, in their order, `gap` apart and within [low, high]."""
    places: list[float] = []
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    for index in order:
        places.append(max(wanted[index], places[-1] + gap if places else low))
    for i in reversed(range(len(places))):
        ceiling = high if i == len(places) - 1 else places[i + 1] - gap
        places[i] = min(places[i], ceiling)
    return [places[order.index(i)] for i in range(len(wanted))]


def _panel(axes: Axes, task: Task, rows: pl.DataFrame, lines: pl.DataFrame) -> None:
    order = augmentation_order(rows)
    for shift, (kind, (colour, marker, label)) in zip((-0.13, 0.13), KINDS.items(), strict=True):
        own = {r["augmentation"]: r for r in rows.filter(peft=kind).iter_rows(named=True)}
        at = [i for i, a in enumerate(order) if a in own]
        value, low, high = ([own[order[i]][c] for i in at] for c in ("value", "ci_low", "ci_high"))
        error = [[v - lo for v, lo in zip(value, low, strict=True)], [h - v for v, h in zip(value, high, strict=True)]]
        places = [i + shift for i in at]
        axes.errorbar(places, value, error, fmt=marker, color=colour, label=label, capsize=3, ms=6, lw=1.4, zorder=3)
    axes.set_xticks(range(len(order)), order)
    axes.set_xlim(-0.5, len(order) - 0.5)
    _limits(axes, rows, lines)
    metric = columns(task)[0]
    axes.set_ylabel(f"{metric} ({better(metric)} is better)")
    size = f"{rows['n_users'][0]} users, {rows['n_queries'][0]} queries"
    axes.set_title(f"{task.name}  {task.title.removeprefix('personalized ')} ({size})", fontsize=10, loc="left")
    _reference_lines(axes, lines)


def _limits(axes: Axes, rows: pl.DataFrame, lines: pl.DataFrame) -> None:
    shown: list[Any] = [*rows["ci_low"], *rows["ci_high"], *lines["value"]]
    margin = 0.06 * (max(shown) - min(shown) or 1)
    axes.set_ylim(min(shown) - margin, max(shown) + margin)


def _reference_lines(axes: Axes, lines: pl.DataFrame) -> None:
    """Dashed lines, each named at the right margin; names that would overlap are moved apart and led to their line."""
    low, high = axes.get_ylim()
    values, right = lines["value"].to_list(), axes.get_xlim()[1]
    places = spread(values, 0.065 * (high - low), low + 0.02 * (high - low), high - 0.02 * (high - low))
    for name, value, place in zip(lines["reference"], values, places, strict=True):
        axes.axhline(value, color="#8a94a0", lw=0.9, ls=(0, (5, 3)), zorder=1)
        axes.annotate(
            name.replace("-", " "),
            (right, value),
            (right + 0.18, place),
            fontsize=7.5,
            color="#3f4852",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": "#8a94a0",
                "lw": 0.7,
                "shrinkA": 0,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )
