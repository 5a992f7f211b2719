"""From cells to tables: what the rule `tables` runs."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oppu import provenance, tables
from oppu.boards import Bootstrap, Setting
from oppu.files import read_jsonl, read_user, read_users, sweep, write_bytes
from oppu.plots import table1_figure, write_figure
from oppu.setting import seeded
from oppu.tasks import task as task_record
from oppu.terminal import WIDTH, terminal_table


def tables_of(
    folder: Path, tasks: Sequence[str], settings: Sequence[str], how: Bootstrap, paper: Path | None = None
) -> None:
    """Write tables/, figures/ and each task's plot.csv of a results folder from its scored settings and references.

    `paper` is the paper's Table 1, to stand beside ours.
    """
    record, text = folder / "tables/provenance.json", folder / "tables/results.txt"
    paths = [folder / "tables" / f"{name}.csv" for name in ("scores", "references", "versus", "seeds")]
    table1 = [folder / "tables" / f"table1.{end}" for end in ("csv", "md", "html")]
    figure, plots = folder / "figures/table1.svg", {task: folder / task / "plot.csv" for task in tasks}
    sweep(*paths, *table1, text, record, figure, *plots.values())  # not all of tables/: table5 may be at work there
    scored = []
    for task, setting in itertools.product(tasks, settings):
        name, peft, history = setting.split("/")
        augmentation, repeat = seeded(name)
        table = read_jsonl(folder / task / setting / "scored.jsonl")
        scored.append(Setting(task_record(task), augmentation, peft, history, table, repeat))
    lines = {task: _references(folder / task / "references.jsonl") for task in tasks}
    mixed = {task: tables.mixed_users(task_record(task), _test_users(folder / task)) for task in tasks}
    theirs = tables.read_csv(paper) if paper else None
    made = provenance.made_from(folder, tasks, settings, how)
    line = provenance.line_of(made, record)
    tables.write_tables(folder / "tables", scored, lines, mixed, how, theirs, line)
    shown = terminal_table(*paths) + "\n" + textwrap.fill(line, WIDTH) + "\n"
    write_bytes(text, shown.encode(), mode=0o644)
    scores = tables.read_csv(paths[0])
    for task, plot in plots.items():  # for `dvc plots`: what another task changes (p_holm) is not in it
        tables.write_csv(plot, scores.filter(task=task)[:, : scores.columns.index("ci_high") + 1])
    write_figure(figure, table1_figure(scores, tables.read_csv(paths[1])))
    provenance.write(record, made, [*paths, text, *table1], folder)


def _test_users(folder: Path) -> list:
    keys = read_users(folder / "split" / "users.json")
    return [read_user(folder / "split" / "histories" / f"{key}.json") for key in keys]


def _references(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(path):
        found.setdefault(row["reference"], []).append(row)
    return found
