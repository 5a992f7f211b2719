"""Scoring one setting: predictions against golds, refused whole unless there is exactly one for every query."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from oppu.metrics import COLUMN, Floats, measure, values, vectors
from oppu.records import InputError, User

if TYPE_CHECKING:
    from oppu.tasks import Task

Predictions = Mapping[str, Sequence[Mapping[str, Any]]]
"""User key -> the records of that user's predictions.jsonl: id, prediction, and cut_history / cut_query where known."""

KEYS = ("user", "id", "gold", "prediction")
"""The columns of a scored table that are no statistics."""


@dataclass(frozen=True)
class Scores:
    """What scoring a setting gives.

    metrics: LaMP's metric names and counts, the content of scores.json;
    scored: one row per query (user, id, gold, prediction, and what `metrics.measure` gives), sorted by user and then in
    the order of the queries, the content of scored.parquet.
    """

    metrics: dict[str, float | int]
    scored: pl.DataFrame


@dataclass(frozen=True)
class UserSums:
    """Per-user sums of query statistics: users sorted by key, sums [U, S]."""

    users: list[str]
    sums: Floats


def queries_of(users: Sequence[User]) -> pl.DataFrame:
    """The queries of users with their golds: columns user (key), id, gold."""
    rows = [(user.key, query.id, query.gold) for user in users for query in user.queries]
    return pl.DataFrame(rows, schema={"user": pl.String, "id": pl.String, "gold": pl.String}, orient="row")


def read_queries(path: Path) -> pl.DataFrame:
    """The test users' queries, from queries.parquet: user, id, input, gold; all text."""
    return pl.read_parquet(path)


def score(task: Task, queries: pl.DataFrame, predictions: Predictions) -> Scores:
    """Score a setting. InputError names every user and query whose prediction is missing, surplus, given twice or no
    text, and every query without a usable gold."""
    found = _matched(task, queries, predictions)
    problems, rows = [], []
    for user, query, gold in queries.select("user", "id", "gold").sort("user", maintain_order=True).iter_rows():
        try:
            if gold is None:
                raise ValueError("there is no gold, so it cannot be scored")
            text = found[user, query]["prediction"]
            rows.append({"user": user, "id": query, "gold": gold, "prediction": text} | measure(task, gold, text))
        except ValueError as error:
            problems.append(f"{task.name}: user {user}: query {query}: {error}")
    if problems:
        raise InputError(problems)
    scored = pl.DataFrame(rows, infer_schema_length=None)
    return Scores(summary(task, scored) | _cut(found.values()), scored)


def score_texts(task: Task, queries: pl.DataFrame, texts: Mapping[tuple[str, str], str]) -> Scores:
    """`score` for predictions keyed by (user key, query id), such as the reference lines."""
    predictions: dict[str, list[dict[str, str]]] = {}
    for (user, query), text in texts.items():
        predictions.setdefault(user, []).append({"id": query, "prediction": text})
    return score(task, queries, predictions)


def summary(task: Task, scored: pl.DataFrame) -> dict[str, float | int]:
    """LaMP's metrics of a scored table, with counts: users, queries, and predictions that were no label or rating."""
    names = {column: name for name, column in COLUMN.items()}
    pooled = values(task, vectors(task, _statistics(scored)).sum(0))
    counts = {"n_users": scored["user"].n_unique(), "n_queries": len(scored)}
    if task.kind == "classification":
        counts["unknown_labels"] = int((scored["predicted_label"] < 0).sum())
    if task.kind == "rating":
        counts["unreadable_ratings"] = int((~scored["readable"]).sum())
    return {names[column]: float(value) for column, value in pooled.items()} | counts


def user_sums(task: Task, scored: pl.DataFrame) -> UserSums:
    """Per-user sums of a scored table, on which metrics, intervals and differences are computed."""
    users, index = np.unique(scored["user"].to_numpy(), return_inverse=True)
    rows = vectors(task, _statistics(scored))
    sums = np.zeros((len(users), rows.shape[1]))
    np.add.at(sums, index, rows)
    return UserSums(users.tolist(), sums)


def submission(task: Task, predictions: Predictions) -> dict[str, Any]:
    """Predictions in LaMP's submission format, {"task", "golds": [{"id", "output"}]}, under our name of the task.

    LaMP knows a query by its id alone, so an id that stands twice is refused.
    """
    rows = [(user, p["id"], p["prediction"]) for user in sorted(predictions) for p in predictions[user]]
    twice = {query for query, count in Counter(query for _, query, _ in rows).items() if count > 1}
    if twice:
        raise InputError(
            [
                f"{task.name}: user {u}: query id {q} stands twice; LaMP's format cannot tell"
                for u, q, _ in rows
                if q in twice
            ]
        )
    return {"task": task.name, "golds": [{"id": query, "output": text} for _, query, text in rows]}


def _statistics(scored: pl.DataFrame) -> dict[str, Any]:
    return {name: scored[name].to_numpy() for name in scored.columns if name not in KEYS}


def _matched(task: Task, queries: pl.DataFrame, predictions: Predictions) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Predictions by (user, query id), exactly one per query."""
    wanted = list(queries.select("user", "id").iter_rows())
    given = [(user, record["id"]) for user, records in predictions.items() for record in records]
    known, predicted = set(wanted), set(given)
    problems = [(key, "asked twice; query ids must be unique within a user") for key in _twice(wanted)]
    problems += [(key, "no prediction; predict this user again") for key in wanted if key not in predicted]
    problems += [(key, "predicted twice; keep one prediction per query") for key in _twice(given)]
    problems += [(key, "predicted, but no such query is asked") for key in given if key not in known]
    records = {(user, record["id"]): record for user, found in predictions.items() for record in found}
    problems += [
        (key, f"the prediction must be text, found {type(record.get('prediction')).__name__}")
        for key, record in records.items()
        if not isinstance(record.get("prediction"), str)
    ]
    if not wanted:
        raise InputError([f"{task.name}: no queries to score"])
    if problems:
        raise InputError([f"{task.name}: user {user}: query {query}: {what}" for (user, query), what in problems])
    return records


def _twice(keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [key for key, count in Counter(keys).items() if count > 1]


def _cut(records: Any) -> dict[str, int]:
    """How many prompts the token budget cut, where predictions say so."""
    records = list(records)
    if not any("cut_history" in r or "cut_query" in r for r in records):
        return {}
    return {"cut_prompts": sum(bool(r.get("cut_history") or r.get("cut_query")) for r in records)}
