"""Result tables: scores.csv, references.csv and versus.csv (the numbers behind Tables 1 to 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from oppu.files import write_bytes
from oppu.metrics import user_values
from oppu.records import InputError, User
from oppu.scores import UserSums, score_texts, user_sums
from oppu.significance import Difference, Estimate, differences, draws, estimates
from oppu.tasks import Task

SCORES = {
    **dict.fromkeys(["task", "augmentation", "peft", "history", "metric"], pl.String),
    **dict.fromkeys(["value", "ci_low", "ci_high", "user_mean", "diff", "diff_low", "diff_high"], pl.Float64),
    **dict.fromkeys(["n_users", "n_queries"], pl.Int64),
    "p_value": pl.Float64,
    "significant": pl.Boolean,
}
REFERENCES = {
    **dict.fromkeys(["task", "reference", "metric"], pl.String),
    **dict.fromkeys(["value", "ci_low", "ci_high"], pl.Float64),
}
VERSUS = {
    **dict.fromkeys(["task", "users", "augmentation", "peft", "metric", "against"], pl.String),
    **dict.fromkeys(["value", "other", "diff", "diff_low", "diff_high"], pl.Float64),
    **dict.fromkeys(["n_users", "n_queries"], pl.Int64),
}

References = Mapping[str, Mapping[str, Mapping[tuple[str, str], str]]]
"""Task name -> reference name -> (user key, query id) -> answer."""


@dataclass(frozen=True)
class Setting:
    """One scored setting of a task; `scored` is what `scores.score` gives (scored.parquet)."""

    task: Task
    augmentation: str
    peft: str
    history: str
    scored: pl.DataFrame

    def __str__(self) -> str:
        return f"{self.task.name}/{self.augmentation}/{self.peft}/{self.history}"


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn: config.bootstrap and config.seed."""

    resamples: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Board:
    """All settings and references of one task as per-user sums over the same users and queries."""

    task: Task
    users: list[str]
    queries: pl.DataFrame
    settings: dict[tuple[str, str, str], UserSums]
    references: dict[str, UserSums]
    weights: Any

    def counterpart(self, augmentation: str, history: str) -> UserSums | None:
        """The same setting without a personal adapter. Without retrieval the prompt holds no history, so k0 has one
        counterpart for every history variant."""
        same = self.settings.get((augmentation, "none", history))
        return same or (self.settings.get(("k0", "none", "full")) if augmentation == "k0" else None)

    def only(self, chosen: set[str], bootstrap: Bootstrap) -> Board:
        """The board of some of its users."""
        keep = np.array([user in chosen for user in self.users])

        def cut(whole: UserSums) -> UserSums:
            return UserSums([user for user in whole.users if user in chosen], whole.sums[keep])

        return Board(
            self.task,
            [user for user in self.users if user in chosen],
            self.queries.filter(pl.col("user").is_in(sorted(chosen))),
            {key: cut(sums) for key, sums in self.settings.items()},
            {name: cut(sums) for name, sums in self.references.items()},
            draws(self.task, int(keep.sum()), bootstrap.resamples, bootstrap.seed),
        )


def boards(settings: Sequence[Setting], references: References, bootstrap: Bootstrap) -> list[Board]:
    """One board per task, in the order of the settings. InputError where settings of a task differ in their queries."""
    by_task: dict[str, list[Setting]] = {}
    for setting in settings:
        by_task.setdefault(setting.task.name, []).append(setting)
    problems = [problem for group in by_task.values() for problem in _unpaired(group)]
    if problems:
        raise InputError(problems)
    return [_board(group, references.get(name, {}), bootstrap) for name, group in by_task.items()]


def scores_table(boards: Iterable[Board]) -> pl.DataFrame:
    """scores.csv: one row per setting and metric.

    `diff` is the value minus that of the counterpart without a personal adapter (so below 0 is better for mae and
    rmse); blank for the counterpart itself and where there is none. `user_mean` is the mean of the users' own values.
    """
    rows = []
    for board in boards:
        for (augmentation, peft, history), own in board.settings.items():
            other = board.counterpart(augmentation, history) if peft != "none" else None
            found = differences(board.task, own.sums, other.sums, board.weights) if other else {}
            means = {name: float(v.mean()) for name, v in user_values(board.task, own.sums).items()}
            setting = {"task": board.task.name, "augmentation": augmentation, "peft": peft, "history": history}
            for metric, estimate in estimates(board.task, own.sums, board.weights).items():
                numbers = _estimate(estimate) | _difference(found.get(metric)) | _sizes(board)
                rows.append(setting | {"metric": metric, "user_mean": means[metric]} | numbers)
    return pl.DataFrame(rows, schema=SCORES)


def references_table(boards: Iterable[Board]) -> pl.DataFrame:
    """references.csv: what answers without any model reach on the same queries."""
    rows = [
        {"task": board.task.name, "reference": name, "metric": metric} | _estimate(estimate)
        for board in boards
        for name, own in board.references.items()
        for metric, estimate in estimates(board.task, own.sums, board.weights).items()
    ]
    return pl.DataFrame(rows, schema=REFERENCES)


def versus_table(boards: Iterable[Board], mixed: Mapping[str, set[str]], bootstrap: Bootstrap) -> pl.DataFrame:
    """versus.csv: every personal setting on the full history against its counterpart (`none`) and every reference.

    For all users, and for the mixed ones (task name -> user keys, see `mixed_users`) of tasks that have any.
    """
    rows: list[dict[str, Any]] = []
    for board in boards:
        rows += _versus(board, "all")
        if chosen := mixed.get(board.task.name, set()) & set(board.users):
            rows += _versus(board.only(chosen, bootstrap), "mixed")
    return pl.DataFrame(rows, schema=VERSUS)


def mixed_users(task: Task, users: Sequence[User], share: float = 0.8) -> set[str]:
    """Keys of the users whose commonest label is at most `share` of their history.

    On the others a constant answer is nearly unbeatable. Empty for tasks whose history has no labels.
    """
    if task.labels is None or task.y is None:
        return set()
    counts = {user.key: Counter(item.fields[task.y].strip() for item in user.history) for user in users}
    return {key for key, labels in counts.items() if labels and max(labels.values()) <= share * labels.total()}


def write_tables(
    folder: Path,
    settings: Sequence[Setting],
    references: References,
    mixed: Mapping[str, set[str]],
    bootstrap: Bootstrap,
) -> None:
    """Write scores.csv, references.csv, versus.csv, table1.csv and table1.md into a folder."""
    from oppu.table1 import markdown, table1

    found = boards(settings, references, bootstrap)
    scores = scores_table(found)
    write_csv(folder / "scores.csv", scores)
    write_csv(folder / "references.csv", references_table(found))
    write_csv(folder / "versus.csv", versus_table(found, mixed, bootstrap))
    table = table1(scores)
    write_csv(folder / "table1.csv", table)
    write_bytes(folder / "table1.md", markdown(table).encode(), mode=0o644)


def write_csv(path: Path, table: pl.DataFrame) -> None:
    """Write a table, numbers to six decimals, so that equal results are equal bytes."""
    rounded = table.with_columns(pl.selectors.float().round(6) + 0.0)  # + 0.0: no -0.0
    write_bytes(path, rounded.write_csv().encode(), mode=0o644)


def read_csv(path: Path) -> pl.DataFrame:
    """Read scores.csv, references.csv or versus.csv back with its types; other tables as text."""
    schema: Any = {"scores.csv": SCORES, "references.csv": REFERENCES, "versus.csv": VERSUS}.get(path.name)
    return pl.read_csv(path, schema=schema) if schema else pl.read_csv(path, infer_schema=False)


def augmentation_order(table: pl.DataFrame) -> list[str]:
    """The augmentations of a table, as Table 1 orders them: by k, `random` behind those, profiles last."""
    return sorted(set(table["augmentation"]), key=lambda a: (a.startswith("profile"), a == "random", len(a), a))


def _board(group: list[Setting], references: Mapping[str, Mapping[tuple[str, str], str]], how: Bootstrap) -> Board:
    task, queries = group[0].task, group[0].scored.select("user", "id", "gold")
    settings = {(s.augmentation, s.peft, s.history): user_sums(task, s.scored) for s in group}
    lines = {name: user_sums(task, score_texts(task, queries, texts).scored) for name, texts in references.items()}
    users = next(iter(settings.values())).users
    return Board(task, users, queries, settings, lines, draws(task, len(users), how.resamples, how.seed))


def _unpaired(group: list[Setting]) -> list[str]:
    def queries(setting: Setting) -> set[tuple[str, ...]]:
        return set(setting.scored.select("user", "id", "gold").iter_rows())

    first, seen, problems = queries(group[0]), set(), []
    for setting in group:
        if str(setting) in seen:
            problems.append(f"{setting}: given twice")
        seen.add(str(setting))
        if odd := first ^ queries(setting):
            user, query, _ = min(odd)
            problems.append(
                f"{setting}: {len(odd)} queries differ from those of {group[0]}, first user {user}, query {query};"
                " score both on the same users.json"
            )
    return problems


def _versus(board: Board, users: str) -> list[dict[str, Any]]:
    rows = []
    for (augmentation, peft, history), own in board.settings.items():
        if peft == "none" or history != "full":
            continue
        counterpart = board.counterpart(augmentation, history)
        others = ({"none": counterpart} if counterpart else {}) | board.references
        values = estimates(board.task, own.sums, board.weights)
        setting = {"task": board.task.name, "users": users, "augmentation": augmentation, "peft": peft}
        for against, other in others.items():
            for metric, d in differences(board.task, own.sums, other.sums, board.weights).items():
                value = values[metric].value
                pair = {"metric": metric, "against": against, "value": value, "other": value - d.value}
                gap = {"diff": d.value, "diff_low": d.low, "diff_high": d.high}
                rows.append(setting | pair | gap | _sizes(board))
    return rows


def _sizes(board: Board) -> dict[str, int]:
    return {"n_users": len(board.users), "n_queries": len(board.queries)}


def _estimate(found: Estimate) -> dict[str, float]:
    return {"value": found.value, "ci_low": found.low, "ci_high": found.high}


def _difference(found: Difference | None) -> dict[str, Any]:
    if found is None:
        return {}
    numbers = asdict(found)
    return {
        "diff": numbers["value"],
        "diff_low": numbers["low"],
        "diff_high": numbers["high"],
        "p_value": found.p_value,
        "significant": found.significant,
    }
