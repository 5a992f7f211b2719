"""Table 1 from scores.csv: in the shape of data/paper/table1.csv, and as a sheet that pages are written from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from oppu.metrics import better, columns
from oppu.tasks import tasks

SETTINGS = {
    "non_personalized_k0": ("k0", "none"),
    "random": ("random", "none"),
    "rag_k1": ("k1", "none"),
    "rag_k2": ("k2", "none"),
    "rag_k4": ("k4", "none"),
    "pag_k0": ("profile-k0", "none"),
    "pag_k1": ("profile-k1", "none"),
    "oppu_k0": ("k0", "lora"),
    "oppu_k1": ("k1", "lora"),
    "oppu_k2": ("k2", "lora"),
    "oppu_k4": ("k4", "lora"),
    "pag_oppu_k0": ("profile-k0", "lora"),
    "pag_oppu_k1": ("profile-k1", "lora"),
}
"""Column of Table 1 -> (augmentation, PEFT kind)."""

PAIRS = {
    with_oppu: without
    for with_oppu, (augmentation, peft) in SETTINGS.items()
    for without, setting in SETTINGS.items()
    if peft == "lora" and setting == (augmentation, "none")
}
"""Column with OPPU -> its counterpart: what section 5's gains are relative to."""


@dataclass(frozen=True)
class Cell:
    """One value of Table 1 and what stands beside it."""

    text: str
    star: bool
    """A significant improvement over the counterpart (p < .05)."""
    holm: bool
    """Also after Holm's correction."""
    place: int
    """1 for the best value of its row, 2 for the second best (ties share), else 0."""
    spread: str | None
    """Standard deviation over training seeds, where there are several."""
    paper: str | None
    """The paper's own cell."""


@dataclass(frozen=True)
class Line:
    """One row of Table 1; `cells` has the columns that were run."""

    task: str
    metric: str
    better: str
    cells: dict[str, Cell]


def table1(scores: pl.DataFrame) -> pl.DataFrame:
    """Table 1 of scores.csv: text cells such as `.803` or `.803*`, blank where a column was not run.

    A star is a significant *improvement* over the counterpart (p < .05), as in the paper.
    """
    full = scores.filter(pl.col("history") == "full")
    cells = {(r["task"], r["metric"], r["augmentation"], r["peft"]): r for r in full.iter_rows(named=True)}
    rows = []
    for task in (task for name, task in tasks().items() if name in set(full["task"])):
        for metric in columns(task):
            found = {name: cells.get((task.name, metric, *setting)) for name, setting in SETTINGS.items()}
            row: dict[str, str | None] = {name: _cell(cell) for name, cell in found.items()}
            rows.append({"task": task.name, "metric": metric, "better": better(metric), **row})
    return pl.DataFrame(rows, schema=dict.fromkeys(["task", "metric", "better", *SETTINGS], pl.String))


def improved(row: dict[str, Any]) -> bool:
    """Whether a row of scores.csv is a significant improvement over its counterpart."""
    return bool(row["significant"]) and (row["diff"] < 0) == (better(row["metric"]) == "lower")


def number(value: float) -> str:
    """Three decimals without the leading zero, as the paper writes: .803, 1.250, -.040."""
    text = f"{value:.3f}"
    text = text.removeprefix("-") if float(text) == 0 else text
    return text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def gains(table: pl.DataFrame) -> dict[tuple[str, str], float]:
    """Mean relative improvement of OPPU in percent per (task, metric), over the pairs that were run (section 5)."""
    found = {}
    for row in table.iter_rows(named=True):
        sign = -1 if row["better"] == "lower" else 1
        pairs = [(value_of(row[a]), value_of(row[b])) for a, b in PAIRS.items()]
        ratios = [sign * (new - old) / old for new, old in pairs if new is not None and old]
        if ratios:
            found[row["task"], row["metric"]] = 100 * sum(ratios) / len(ratios)
    return found


def value_of(cell: str | None) -> float | None:
    """The number in a cell of Table 1; None where it is blank."""
    return float(cell.rstrip("*")) if cell else None


def sheet(
    table: pl.DataFrame,
    scores: pl.DataFrame | None = None,
    seeds: pl.DataFrame | None = None,
    paper: pl.DataFrame | None = None,
) -> list[Line]:
    """The rows of `table1` with places; scores.csv, seeds.csv and the paper's Table 1 add what stands beside."""
    sure = {k for k, row in _by_column(scores).items() if row["significant_holm"]}
    spread = {k: number(row["sd"]) for k, row in _by_column(seeds).items() if row["sd"] is not None}
    theirs = {(r["task"], r["metric"]): r for r in paper.iter_rows(named=True)} if paper is not None else {}
    lines = []
    for row in table.iter_rows(named=True):
        key, best = (row["task"], row["metric"]), _ranked(row)[:2]
        cells = {
            name: Cell(
                text=row[name].rstrip("*"),
                star=row[name].endswith("*"),
                holm=row[name].endswith("*") and (*key, name) in sure,
                place=next((n for n, value in enumerate(best, 1) if value == value_of(row[name])), 0),
                spread=spread.get((*key, name)),
                paper=theirs.get(key, {}).get(name),
            )
            for name in SETTINGS
            if row[name]
        }
        lines.append(Line(*key, row["better"], cells))
    return lines


def columns_of(lines: list[Line]) -> list[str]:
    """The columns in which any row has a value."""
    return [name for name in SETTINGS if any(name in line.cells for line in lines)]


def _ranked(row: dict[str, Any]) -> list[float]:
    """The values of a row as shown, each once, the best first."""
    found = {value for name in SETTINGS if (value := value_of(row[name])) is not None}
    return sorted(found, reverse=row["better"] == "higher")


def _by_column(table: pl.DataFrame | None) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Rows about the full history of scores.csv or seeds.csv by (task, metric, column of Table 1)."""
    if table is None:
        return {}
    names = {setting: name for name, setting in SETTINGS.items()}
    return {
        (row["task"], row["metric"], names[row["augmentation"], row["peft"]]): row
        for row in table.filter(history="full").iter_rows(named=True)
        if (row["augmentation"], row["peft"]) in names
    }


def _cell(row: dict[str, Any] | None) -> str | None:
    return None if row is None else number(row["value"]) + ("*" if improved(row) else "")
