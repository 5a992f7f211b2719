"""Table 1 in the shape of data/paper/table1.csv, from scores.csv, and as markdown."""

from __future__ import annotations

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


def markdown(table: pl.DataFrame) -> str:
    """Table 1 in markdown: per row the best value bold, the second best underlined, as shown (ties share)."""
    shown = [name for name in SETTINGS if any(table[name])]
    lines = [
        "| task | metric | " + " | ".join(name.replace("_", " ") for name in shown) + " |",
        "|---|---|" + "---:|" * len(shown),
    ]
    for row in table.iter_rows(named=True):
        arrow = "↓" if row["better"] == "lower" else "↑"
        ranked = sorted(
            {v for name in shown if (v := value_of(row[name])) is not None}, reverse=row["better"] == "higher"
        )
        cells = [_marked(row[name], ranked[:2]) for name in shown]
        lines.append(f"| {row['task']} | {row['metric']} {arrow} | " + " | ".join(cells) + " |")
    note = (
        "Per row the best value is bold, the second best underlined. `*`: significantly better than the same column"
        " without OPPU (paired bootstrap over users, p < .05). Blank: not run."
    )
    return "\n".join([*lines, "", note, ""])


def _cell(row: dict[str, Any] | None) -> str | None:
    return None if row is None else number(row["value"]) + ("*" if improved(row) else "")


def _marked(cell: str | None, best: list[float]) -> str:
    value = value_of(cell)
    if cell is None or value not in best:
        return (cell or "").replace("*", r"\*")
    text = cell.replace("*", r"\*")
    return f"**{text}**" if value == best[0] else f"<u>{text}</u>"
