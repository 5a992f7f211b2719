"""Scoring one setting: predictions against golds, refused whole unless there is exactly one for every query."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from oppu.metrics import COLUMN, measure, totals, values
from oppu.records import InputError

if TYPE_CHECKING:
    from oppu.tasks import Task

Queries = Sequence[Mapping[str, Any]]
"""Records of queries.jsonl: user (key), id, gold, which is None where it is not known; and more."""

Predictions = Mapping[str, Sequence[Mapping[str, Any]]]
"""User key -> the records of that user's predictions.jsonl: id, prediction, and cut_history / cut_query where known."""


@dataclass(frozen=True)
class Scores:
    """What scoring a setting gives.

    metrics: LaMP's metric names and counts, the content of scores.json;
    scored: one row per query (user, id, gold, prediction, and what `metrics.measure` gives), sorted by user and then in
    the order of the queries, the content of scored.jsonl.
    """

    metrics: dict[str, float | int]
    scored: list[dict[str, Any]]


def score(task: Task, queries: Queries, predictions: Predictions) -> Scores:
    """Score a setting. InputError names every user and query whose prediction is missing, surplus, given twice or no
    text, and every query without a usable gold."""
    found = _matched(task, queries, predictions)
    problems, rows = [], []
    for asked in sorted(queries, key=itemgetter("user")):
        user, query, gold = asked["user"], asked["id"], asked["gold"]
        try:
            if gold is None:
                raise ValueError("there is no gold, so it cannot be scored")
            text = found[user, query]["prediction"]
            rows.append({"user": user, "id": query, "gold": gold, "prediction": text} | measure(task, gold, text))
        except ValueError as error:
            problems.append(f"{task.name}: user {user}: query {query}: {error}")
    if problems:
        raise InputError(problems)
    return Scores(summary(task, rows) | _cut(found.values()), rows)


def score_texts(task: Task, queries: Queries, texts: Mapping[tuple[str, str], str]) -> Scores:
    """`score` for predictions keyed by (user key, query id), such as the reference lines."""
    predictions: dict[str, list[dict[str, str]]] = {}
    for (user, query), text in texts.items():
        predictions.setdefault(user, []).append({"id": query, "prediction": text})
    return score(task, queries, predictions)


def summary(task: Task, scored: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    """LaMP's metrics of scored rows, with counts: users, queries, and predictions that were no label or rating."""
    names = {column: name for name, column in COLUMN.items()}
    pooled = values(task, totals(task, scored))
    counts = {"n_users": len({row["user"] for row in scored}), "n_queries": len(scored)}
    if task.kind == "classification":
        counts["unknown_labels"] = sum(row["predicted_label"] < 0 for row in scored)
    if task.kind == "rating":
        counts["unreadable_ratings"] = sum(not row["readable"] for row in scored)
    return {names[column]: value for column, value in pooled.items()} | counts


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


def _matched(task: Task, queries: Queries, predictions: Predictions) -> dict[tuple[str, str], Mapping[str, Any]]:
    """Predictions by (user, query id), exactly one per query."""
    wanted = [(query["user"], query["id"]) for query in queries]
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
