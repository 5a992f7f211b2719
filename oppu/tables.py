"""Result tables: scores.csv, references.csv, versus.csv and seeds.csv (the numbers behind Tables 1 to 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from oppu.boards import Board, Bootstrap, References, Setting, boards
from oppu.files import write_bytes
from oppu.records import User
from oppu.setting import CONTROLS, OWN
from oppu.significance import ALPHA, TESTS, Difference, Estimate, holm
from oppu.tasks import Task

SCORES = {
    **dict.fromkeys(["task", "augmentation", "peft", "history", "metric"], pl.String),
    **dict.fromkeys(["value", "ci_low", "ci_high", "user_mean", "diff", "diff_low", "diff_high"], pl.Float64),
    **dict.fromkeys(["n_users", "n_queries"], pl.Int64),
    "p_value": pl.Float64,
    "significant": pl.Boolean,
    "p_holm": pl.Float64,
    "significant_holm": pl.Boolean,
    "test": pl.String,
}
REFERENCES = {
    **dict.fromkeys(["task", "reference", "metric"], pl.String),
    **dict.fromkeys(["value", "ci_low", "ci_high"], pl.Float64),
}
VERSUS = {
    **dict.fromkeys(["task", "users", "augmentation", "peft", "metric", "against"], pl.String),
    **dict.fromkeys(["value", "other", "diff", "diff_low", "diff_high"], pl.Float64),
    **dict.fromkeys(["n_users", "n_queries"], pl.Int64),
    "p_value": pl.Float64,
    "significant": pl.Boolean,
    "test": pl.String,
}
SEEDS = {
    **dict.fromkeys(["task", "augmentation", "peft", "history", "metric"], pl.String),
    "n_seeds": pl.Int64,
    **dict.fromkeys(["mean", "sd", "min", "max", "diff_mean", "diff_sd"], pl.Float64),
}
SCHEMAS: dict[str, Any] = {
    "scores.csv": SCORES,
    "references.csv": REFERENCES,
    "versus.csv": VERSUS,
    "seeds.csv": SEEDS,
}


def scores_table(boards: Iterable[Board], test: str = "bootstrap") -> pl.DataFrame:
    """scores.csv: one row per setting and metric.

    `diff` is the value minus that of the counterpart without a personal adapter (so below 0 is better for mae and
    rmse); blank for the counterpart itself and where there is none. `user_mean` is the mean of the users' own values.
    `p_holm` corrects `p_value` for all comparisons of users' own adapters (lora, ia3, prompt) against none in the whole
    table, over tasks, metrics, augmentations and histories; controls are outside that family and have none. `test`
    names what p is of.
    """
    rows: list[dict[str, Any]] = []
    for board in boards:
        for (augmentation, peft, history), own in board.settings.items():
            other = board.counterpart(augmentation, history) if peft != "none" else None
            found = board.differences(own, other) if other else {}
            means = board.user_means(own)
            setting = {"task": board.task.name, "augmentation": augmentation, "peft": peft, "history": history}
            for metric, estimate in board.estimates(own).items():
                numbers = _estimate(estimate) | _difference(found.get(metric), test) | _sizes(board)
                rows.append(setting | {"metric": metric, "user_mean": means[metric]} | numbers)
    family = [row for row in rows if row["peft"] in OWN and "p_value" in row]
    for row, p in zip(family, holm([row["p_value"] for row in family]), strict=True):
        row |= {"p_holm": p, "significant_holm": p < ALPHA}
    return pl.DataFrame(rows, schema=SCORES)


def references_table(boards: Iterable[Board]) -> pl.DataFrame:
    """references.csv: what answers without any model reach on the same queries."""
    rows = [
        {"task": board.task.name, "reference": name, "metric": metric} | _estimate(estimate)
        for board in boards
        for name, own in board.references.items()
        for metric, estimate in board.estimates(own).items()
    ]
    return pl.DataFrame(rows, schema=REFERENCES)


def versus_table(boards: Iterable[Board], mixed: Mapping[str, set[str]], how: Bootstrap) -> pl.DataFrame:
    """versus.csv: every adapter on the full history against its counterpart (`none`) and every reference, and the
    user's own (lora) against the controls and the other kinds of the same augmentation.

    lora minus swapped is what is personal in the gain; swapped minus none is mere practice at the task. For all users,
    and for the mixed ones (task name -> user keys, see `mixed_users`) of tasks that have any.
    """
    rows: list[dict[str, Any]] = []
    for board in boards:
        rows += _versus(board, "all", how.test)
        if chosen := mixed.get(board.task.name, set()) & set(board.users):
            rows += _versus(board.only(chosen, how), "mixed", how.test)
    return pl.DataFrame(rows, schema=VERSUS)


def seeds_table(repeats: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """seeds.csv: what base and adapter trained with other seeds reach, from one scores.csv per training seed.

    mean, sd (of a sample: n - 1), min and max of `value`; mean and sd of `diff`, whose counterpart has the same seed.
    The users are the same, so this spread comes beside the interval over users, not in its place. Empty for one seed.
    """
    if len(repeats) < 2:
        return pl.DataFrame(schema=SEEDS)
    value, diff = pl.col("value"), pl.col("diff")
    return (
        pl.concat(repeats)
        .group_by("task", "augmentation", "peft", "history", "metric", maintain_order=True)
        .agg(
            pl.len().cast(pl.Int64).alias("n_seeds"),
            value.mean().alias("mean"),
            value.std().alias("sd"),
            value.min().alias("min"),
            value.max().alias("max"),
            diff.mean().alias("diff_mean"),
            diff.std().alias("diff_sd"),
        )
    )


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
    how: Bootstrap,
    paper: pl.DataFrame | None = None,
    made: str = "",
) -> None:
    """Write scores.csv, references.csv, versus.csv, seeds.csv and table1.{csv,md,html} into a folder.

    `paper` is the paper's Table 1; its values stand beside ours in markdown and HTML. `made` stands below those.
    """
    from oppu.table1 import sheet, table1
    from oppu.table1_page import html, markdown

    found = boards([s for s in settings if s.repeat == 0], references, how)
    scores = scores_table(found, how.test)
    further = [
        scores_table(boards([s for s in settings if s.repeat == number], {}, how), how.test)
        for number in sorted({s.repeat for s in settings} - {0})
    ]
    seeds = seeds_table([scores, *further])
    write_csv(folder / "scores.csv", scores)
    write_csv(folder / "references.csv", references_table(found))
    write_csv(folder / "versus.csv", versus_table(found, mixed, how))
    write_csv(folder / "seeds.csv", seeds)
    write_csv(folder / "table1.csv", table := table1(scores))
    lines = sheet(table, scores, seeds, paper)
    for name, text in (("table1.md", markdown(lines, how.test, made)), ("table1.html", html(lines, how.test, made))):
        write_bytes(folder / name, text.encode(), mode=0o644)


def write_csv(path: Path, table: pl.DataFrame) -> None:
    """Write a table, numbers to six decimals, so that equal results are equal bytes."""
    rounded = table.with_columns(pl.selectors.float().round(6) + 0.0)  # + 0.0: no -0.0
    write_bytes(path, rounded.write_csv().encode(), mode=0o644)


def read_csv(path: Path) -> pl.DataFrame:
    """Read scores.csv, references.csv, versus.csv or seeds.csv back with its types; other tables as text."""
    schema = SCHEMAS.get(path.name)
    return pl.read_csv(path, schema=schema) if schema else pl.read_csv(path, infer_schema=False)


def augmentation_order(table: pl.DataFrame) -> list[str]:
    """The augmentations of a table, as Table 1 orders them: by k, `random` behind those, profiles last."""
    return sorted(set(table["augmentation"]), key=lambda a: (a.startswith("profile"), a == "random", len(a), a))


def _versus(board: Board, users: str, test: str) -> list[dict[str, Any]]:
    rows = []
    for (augmentation, peft, history), own in board.settings.items():
        if peft == "none" or history != "full":
            continue
        same = {"none": board.counterpart(augmentation, history)}
        if peft == "lora":
            same |= {
                kind: board.settings.get((augmentation, kind, history)) for kind in (*CONTROLS, *OWN) if kind != peft
            }
        others = {name: sums for name, sums in same.items() if sums} | board.references
        values = board.estimates(own)
        setting = {"task": board.task.name, "users": users, "augmentation": augmentation, "peft": peft}
        for against, other in others.items():
            for metric, d in board.differences(own, other).items():
                value = values[metric].value
                pair = {"metric": metric, "against": against, "value": value, "other": value - d.value}
                rows.append(setting | pair | _difference(d, test) | _sizes(board))
    return rows


def _sizes(board: Board) -> dict[str, int]:
    return {"n_users": len(board.users), "n_queries": int(next(iter(board.settings.values())).sums[:, 0].sum())}


def _estimate(found: Estimate) -> dict[str, float]:
    return {"value": found.value, "ci_low": found.low, "ci_high": found.high}


def _difference(found: Difference | None, test: str) -> dict[str, Any]:
    if found is None:
        return {}
    return {
        "diff": found.value,
        "diff_low": found.low,
        "diff_high": found.high,
        "p_value": found.p_value,
        "significant": found.significant,
        "test": TESTS[test],
    }
