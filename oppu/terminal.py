"""scores.csv, references.csv, versus.csv and seeds.csv as plain text for the terminal, at most 100 columns wide."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from oppu.metrics import better, columns
from oppu.setting import CONTROLS, OWN
from oppu.significance import TESTS
from oppu.table1 import number
from oppu.tables import augmentation_order, read_csv
from oppu.tasks import Task, tasks

FIRST, WIDE, WIDTH = 12, 28, 100

NOTE = (
    "[ ]: 95 % interval, bootstrap over users; it covers who is in the sample, not the training seed. A difference is"
    " paired over users and marked where p < .05 ({test}): * better, 'worse' worse. Unmarked means that these users do"
    " not settle it, not that there is no difference; of comparisons without any difference one in twenty is marked by"
    " chance (scores.csv has p corrected by Holm beside). 'lora minus' takes the reference that is strongest on these"
    " very queries. Mixed users: their commonest label is at most 80 % of their history; for the others a constant"
    " answer is hard to beat."
)
CONTROLS_NOTE = (
    " Controls: swapped is another user's adapter, pooled one adapter trained on all test users' histories. swapped -"
    " none is mere practice at the task, lora - swapped is what is personal."
)
KINDS_NOTE = (
    " Other kinds of the user's own adapter: ia3 scales keys, values and feedforward activations, prompt puts learned"
    " tokens before the prompt."
)
SEEDS_NOTE = (
    " ±: standard deviation over training seeds of base and adapter, on the same users; the rows before are the first"
    " seed's."
)


def terminal_table(scores: Path, references: Path, versus: Path, seeds: Path) -> str:
    """What the four files say about the full history, per task and metric; every line at most 100 characters.

    References are compared on the first metric only; versus.csv has both.
    """
    full, lines, against, spread = (read_csv(path) for path in (scores, references, versus, seeds))
    full, spread = full.filter(history="full"), spread.filter(history="full")
    blocks = []
    for task in (task for name, task in tasks().items() if name in set(full["task"])):
        for metric in columns(task):
            rows = [table.filter(task=task.name, metric=metric) for table in (full, lines, against, spread)]
            blocks.append("\n".join(_block(task, metric, *rows)))
    test = next(iter(full["test"].drop_nulls()), TESTS["bootstrap"])
    note = NOTE.format(test=test)
    note += CONTROLS_NOTE if full["peft"].is_in(CONTROLS).any() else ""
    note += KINDS_NOTE if full["peft"].is_in(OWN[1:]).any() else ""
    note += SEEDS_NOTE if len(spread) else ""
    blocks.append(textwrap.fill(note, WIDTH))
    return "\n\n".join(blocks) + "\n"


def strongest(lines: pl.DataFrame, metric: str) -> list[str]:
    """The reference to be beaten: the best one on this metric, whichever it is; none where there are no references."""
    found = lines.filter(metric=metric).sort("value", descending=better(metric) == "higher", maintain_order=True)
    return found["reference"].head(1).to_list()


def _block(
    task: Task, metric: str, full: pl.DataFrame, lines: pl.DataFrame, versus: pl.DataFrame, spread: pl.DataFrame
) -> list[str]:
    size = f"{full['n_users'][0]} users, {full['n_queries'][0]} queries"
    text = [f"{task.name} {task.title}: {metric} ({better(metric)} is better); {size}"]
    text += _grid(full, ["none", "lora"])
    text += _spread(spread, ["none", "lora"])
    for kind in (name for name in (*OWN[1:], *CONTROLS) if name in set(full["peft"])):
        text += _beside(kind, full, versus.filter(users="all", peft="lora", against=kind))
    if len(lines):
        named = ", ".join(f"{r['reference']} {number(r['value'])}" for r in lines.iter_rows(named=True))
        wrapped = textwrap.TextWrapper(WIDTH, "  ", "    ", break_on_hyphens=False)
        text += wrapped.wrap(f"without a model: {named}")
    if metric == columns(task)[0]:
        text += _versus(metric, lines, versus.filter(peft="lora"))
    return text


def _grid(full: pl.DataFrame, kinds: list[str]) -> list[str]:
    """A row per augmentation: the value of each kind of adapter, then the paired difference."""
    rows = {(r["augmentation"], r["peft"]): r for r in full.iter_rows(named=True)}
    text = [_line("prompt", *kinds, "lora - none")]
    for augmentation in augmentation_order(full):
        cells = [_cell(rows.get((augmentation, kind)), number, "value", "ci_low", "ci_high") for kind in kinds]
        text.append(_line(augmentation, *cells, _difference(rows.get((augmentation, "lora")))))
    return text


def _spread(seeds: pl.DataFrame, kinds: list[str]) -> list[str]:
    """The same over training seeds: mean ± standard deviation; nothing where there is one seed."""
    if not len(seeds):
        return []
    rows = {(r["augmentation"], r["peft"]): r for r in seeds.iter_rows(named=True)}
    text = [_line(f"{seeds['n_seeds'][0]} seeds", *kinds, "lora - none")]
    for augmentation in augmentation_order(seeds):
        cells = [_mean(rows.get((augmentation, kind)), number, "mean", "sd") for kind in kinds]
        text.append(
            _line(augmentation, *cells, _mean(rows.get((augmentation, "lora")), _signed, "diff_mean", "diff_sd"))
        )
    return text


def _beside(kind: str, full: pl.DataFrame, versus: pl.DataFrame) -> list[str]:
    """What a control or another kind of adapter reaches, what it gains over none, and what lora gains over it."""
    rows = {r["augmentation"]: r for r in full.filter(peft=kind).iter_rows(named=True)}
    own = {r["augmentation"]: r for r in versus.iter_rows(named=True)}
    text = [_line("control" if kind in CONTROLS else "kind", kind, f"{kind} - none", f"lora - {kind}")]
    for augmentation in (name for name in augmentation_order(full) if name in rows):
        value = _cell(rows[augmentation], number, "value", "ci_low", "ci_high")
        text.append(_line(augmentation, value, _difference(rows[augmentation]), _difference(own.get(augmentation))))
    return text


def _versus(metric: str, lines: pl.DataFrame, versus: pl.DataFrame) -> list[str]:
    """Personal adapters against the strongest references, for all users and for the mixed ones."""
    known = {"user-majority"} & set(lines["reference"])
    picked = list(dict.fromkeys([*known, *strongest(lines, metric)]))
    text = []
    for users, against in (("all", picked), ("mixed", ["none", *picked])):
        rows = {(r["augmentation"], r["against"]): r for r in versus.filter(users=users).iter_rows(named=True)}
        heads = [name for name in against if any(name == key[1] for key in rows)]
        if not heads:
            continue
        some = next(iter(rows.values()))
        who = "all users" if users == "all" else f"{some['n_users']} mixed users, {some['n_queries']} queries"
        text.append(f"  {who}: " + "; ".join(_levels(metric, rows, heads)))
        text.append(_line("lora minus", *heads))
        for augmentation in augmentation_order(versus):
            text.append(_line(augmentation, *[_difference(rows.get((augmentation, name))) for name in heads]))
    return text


def _levels(metric: str, rows: dict[tuple[str, str], dict[str, Any]], heads: list[str]) -> list[str]:
    """What is compared: the adapter's own value at the first augmentation, and each reference's."""
    first = next(iter(rows))[0]
    shown = [f"lora {first} {number(rows[first, heads[0]]['value'])}"] if (first, heads[0]) in rows else []
    names = {name: f"none {first}" if name == "none" else name for name in heads}
    return shown + [f"{names[n]} {number(rows[first, n]['other'])}" for n in heads if (first, n) in rows]


def _line(first: str, *cells: str) -> str:
    return f"  {first:<{FIRST}}" + "".join(f"{cell:<{WIDE}}" for cell in cells).rstrip()


def _signed(value: float) -> str:
    text = number(value)
    return text if text.startswith("-") else f"+{text}"


def _cell(row: dict[str, Any] | None, write: Callable[[float], str], value: str, low: str, high: str) -> str:
    if row is None or row[value] is None:
        return "-"
    return f"{write(row[value])} [{write(row[low])}, {write(row[high])}]"


def _mean(row: dict[str, Any] | None, write: Callable[[float], str], mean: str, sd: str) -> str:
    return "-" if row is None or row[mean] is None else f"{write(row[mean])} ± {number(row[sd])}"


def _difference(row: dict[str, Any] | None) -> str:
    """A paired difference, marked where it is significant."""
    text = _cell(row, _signed, "diff", "diff_low", "diff_high")
    if row is None or not row["significant"]:
        return text
    return text + (" *" if (row["diff"] < 0) == (better(row["metric"]) == "lower") else " worse")
