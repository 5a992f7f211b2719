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
LINE: Any = {"color": "#8a94a0", "lw": 0.9, "ls": (0, (5, 3))}
WIDE, HIGH, LEGEND = (0.85, 4.55, 1.65), (0.55, 2.55, 0.4), 0.55
"""Inches: axis, panel and names of lines from the left; axis, panel and title from below; the legend on top. A layout
that is found by drawing all twice takes half a second."""
STYLE: Any = {
    "svg.hashsalt": "oppu",
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
        figure = Figure(figsize=(across * sum(WIDE), down * sum(HIGH) + LEGEND))
        panels = figure.subplots(down, across, squeeze=False, gridspec_kw=_places(down, across)).ravel()
        for task, axes in zip(found, panels, strict=False):
            metric = columns(task)[0]
            _panel(
                axes, task, full.filter(task=task.name, metric=metric), references.filter(task=task.name, metric=metric)
            )
        for axes in panels[len(found) :]:
            axes.remove()
        _legend(figure, panels[0])
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


def _places(down: int, across: int) -> dict[str, float]:
    """Where the panels are, for gridspec: margins as shares of the figure, gaps as shares of a panel."""
    wide, high = across * sum(WIDE), down * sum(HIGH) + LEGEND
    left, right, bottom, top = WIDE[0] / wide, 1 - WIDE[2] / wide, HIGH[0] / high, 1 - (HIGH[2] + LEGEND) / high
    gaps = {"wspace": (WIDE[0] + WIDE[2]) / WIDE[1], "hspace": (HIGH[0] + HIGH[2]) / HIGH[1]}
    return {"left": left, "right": right, "bottom": bottom, "top": top, **gaps}


def _legend(figure: Figure, panel: Axes) -> None:
    from matplotlib.lines import Line2D

    handles, labels = panel.get_legend_handles_labels()
    handles.append(Line2D([], [], **LINE))
    labels.append("without a model")
    title = "bars: 95 % interval, bootstrap over users"
    figure.legend(handles, labels, title=title, loc="upper center", ncols=len(handles), frameon=False)


def _panel(axes: Axes, task: Task, rows: pl.DataFrame, lines: pl.DataFrame) -> None:
    order = augmentation_order(rows)
    for shift, (kind, (colour, marker, label)) in zip((-0.13, 0.13), KINDS.items(), strict=True):
        own = {r["augmentation"]: r for r in rows.filter(peft=kind).iter_rows(named=True)}
        at = [i for i, a in enumerate(order) if a in own]
        value, low, high = ([own[order[i]][c] for i in at] for c in ("value", "ci_low", "ci_high"))
        error = [[v - lo for v, lo in zip(value, low, strict=True)], [h - v for v, h in zip(value, high, strict=True)]]
        places = [i + shift for i in at]
        axes.errorbar(places, value, error, fmt=marker, color=colour, label=label, capsize=3, ms=6, lw=1.4, zorder=3)
    axes.set_xticks(range(len(order)), [name.replace("-", "\n") for name in order])
    axes.set_xlim(-0.5, len(order) - 0.5)
    _limits(axes, rows, lines)
    metric = columns(task)[0]
    axes.set_ylabel(f"{metric} ({better(metric)} is better)")
    size = f"{rows['n_users'][0]} users, {rows['n_queries'][0]} queries"
    axes.set_title(f"{task.name}  {task.title.removeprefix('personalized ')} ({size})", fontsize=10, loc="left", y=1)
    _reference_lines(axes, lines)


def _limits(axes: Axes, rows: pl.DataFrame, lines: pl.DataFrame) -> None:
    shown: list[Any] = [*rows["ci_low"], *rows["ci_high"], *lines["value"]]
    margin = 0.06 * (max(shown) - min(shown) or 1)
    axes.set_ylim(min(shown) - margin, max(shown) + margin)


def _reference_lines(axes: Axes, lines: pl.DataFrame) -> None:
    """Dashed lines, each named at the right margin; names that would overlap are moved apart and led to their line."""
    low, high = axes.get_ylim()
    values, (left, right) = lines["value"].to_list(), axes.get_xlim()
    beside = right + 0.025 * (right - left)
    places = spread(values, 0.065 * (high - low), low + 0.02 * (high - low), high - 0.02 * (high - low))
    for name, value, place in zip(lines["reference"], values, places, strict=True):
        axes.axhline(value, zorder=1, **LINE)
        axes.plot((right, beside), (value, place), color="#8a94a0", lw=0.7, clip_on=False, zorder=1)
        axes.text(
            beside + 0.01 * (right - left), place, name.replace("-", " "), fontsize=7.5, color="#3f4852", va="center"
        )
