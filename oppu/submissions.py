"""Scoring any predictions file against any outputs file, as LaMP does: what `oppu score` runs."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from oppu import scores
from oppu.lamp_values import Items, identifier, kind, load, read_text
from oppu.records import InputError
from oppu.tasks import Task

ANSWERS = ("output", "prediction", "gold")


def score_files(predictions: Path, outputs: Path, task: Task) -> dict[str, float | int]:
    """LaMP's metrics of predictions, with counts.

    Either file may be gzipped, and is LaMP's `{"task", "golds": [{"id", "output"}]}`, a bare list of such records, or
    JSON lines of them, `prediction` standing for `output` too; golds may also be a split's queries.jsonl. Raises
    InputError with every id that is missing, surplus or given twice, and every gold that is none of the task.
    """
    problems: list[str] = []
    given, golds = (_answers(path, task, problems) for path in (predictions, outputs))
    problems += [f"{predictions}: id {i}: no prediction, but {outputs} has its gold" for i in golds if i not in given]
    problems += [f"{predictions}: id {i}: no such gold in {outputs}; drop it" for i in given if i not in golds]
    if problems:
        raise InputError(problems)
    everyone = [{"user": "all", "id": id_, "gold": gold} for id_, gold in golds.items()]
    try:
        found = scores.score_texts(task, everyone, {("all", id_): text for id_, text in given.items()})
    except InputError as error:
        raise InputError([f"{outputs}: {p}".replace("user all: query", "id") for p in error.problems]) from None
    return {name: value for name, value in found.metrics.items() if name != "n_users"}


def _answers(path: Path, task: Task, problems: list[str]) -> dict[str, str]:
    """Texts by id; what is wrong with the file is added to the problems."""
    records, items = _records(path, task), Items(task)
    found: dict[str, str] = {}
    for number, record in enumerate(records):
        id_ = identifier(record.get("id")) if isinstance(record, dict) else None
        if id_ is None:
            problems.append(f"{path}: record {number}: is not an object with an 'id' and an 'output' or 'prediction'")
            continue
        values = [record[name] for name in ANSWERS if name in record]
        text = items.text(values[0]) if len(values) == 1 else None
        if len(values) != 1:
            problems.append(f"{path}: id {id_}: needs either 'output' or 'prediction', found {len(values)} of them")
        elif text is None:
            problems.append(f"{path}: id {id_}: the answer is {kind(values[0])}; needed is text")
        found[id_] = text or ""
    ids = (identifier(record.get("id")) for record in records if isinstance(record, dict))
    problems += [f"{path}: id {i}: stands {n} times; keep one" for i, n in Counter(ids).items() if i and n > 1]
    return found


def _records(path: Path, task: Task) -> list[Any]:
    """The list that a file holds. InputError names a file that cannot be read, is no list, or is of another task."""
    try:
        data = _lines(path) if ".jsonl" in path.suffixes else load(path)
    except InputError as error:
        raise InputError([f"{path}: {problem}" for problem in error.problems]) from None
    if isinstance(data, dict):
        wanted, found = (re.match(r"LaMP_[0-9]+", str(name)) for name in (task.name, data.get("task")))
        if wanted and found and wanted[0] != found[0]:
            raise InputError([f"{path}: is of {data['task']}, not of {task.name}; give --task {data['task']}"])
        data = data.get("golds")
    if not isinstance(data, list) or not data:
        raise InputError([f"{path}: needs a list of records, alone or as 'golds'; found {kind(data)} or an empty one"])
    return data


def _lines(path: Path) -> list[Any]:
    found = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise InputError([f"line {number}: is not JSON: {error.msg}"]) from None
    return found
