"""Small files in LaMP's format, made for tests."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from oppu.tasks import fields_of, render
from oppu.tasks import task as task_named


def item(task: str, n: int, user: str = "", **values: Any) -> dict[str, Any]:
    """The n-th raw item of a user: every field filled, dated by month, labels in turn."""
    record = task_named(task)
    fields: dict[str, Any] = {name: f"{name} {n} of {user}" for name in record.history}
    if record.y and record.labels:
        fields[record.y] = record.labels[n % len(record.labels)]
    return {"id": f"{user}-{n}", "date": f"{2000 + n // 12}-{n % 12 + 1:02d}", **fields, **values}


def question(task: str, id_: Any, user: Any, history: list[dict[str, Any]], text: str = "", **values: Any) -> dict:
    """A raw question; `text` fills every field of the input."""
    template = task_named(task).input
    asked = render(template, dict.fromkeys(fields_of(template), text or f"query {id_}"))
    return {"id": id_, "user_id": user, "input": asked, "profile": history, **values}


def golds_of(task: str, questions: list[dict]) -> list[dict]:
    labels = task_named(task).labels
    return [{"id": q["id"], "output": labels[0] if labels else f"gold of {q['id']}"} for q in questions]


def write_raw(
    folder: Path,
    task: str,
    questions: Any,
    golds: Any = None,
    source: str = "dev",
    gz: bool = False,
    bare: bool = False,
) -> Path:
    """Write raw questions and golds (made up when None, or wrapped unless `bare`); returns the questions file."""
    golds = golds_of(task, questions) if golds is None else golds
    outputs = golds if bare or not isinstance(golds, list) else {"task": task, "golds": golds}
    paths = []
    for name, data in (("questions", questions), ("outputs", outputs)):
        path = folder / task / f"{source}_{name}.json{'.gz' if gz else ''}"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(data).encode()
        path.write_bytes(gzip.compress(content, mtime=0) if gz else content)
        paths.append(path)
    return paths[0]


def write_task(
    folder: Path, task: str, users: dict[str, int | list[dict]], source: str = "dev", queries: int = 1, **options: Any
) -> Path:
    """Write users with made-up histories of so many items (or the raw items given), each with so many questions."""
    questions = []
    for user, history in users.items():
        items = history if isinstance(history, list) else [item(task, n, user) for n in range(history)]
        questions += [question(task, f"{user}-q{n}", user, items) for n in range(queries)]
    return write_raw(folder, task, questions, source=source, **options)
