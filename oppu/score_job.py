"""The command of rule `score`: a setting's scores, counted again only where something they are made from changed.

Snakemake deletes scores before it asks for them again, and asks whenever a cohort was checked. So what was counted is
kept in `.scores/` beside them, with its key; while that holds, it is laid out again, and no table is imported.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from oppu.cells import read_predictions, whole_record
from oppu.files import file_digest, jsonl, new_folder, read_json, read_jsonl, read_users, sweep, write_bytes, write_json
from oppu.keys import scores_key
from oppu.records import InputError

log = logging.getLogger(__name__)


def run(out: Path, scored: Path, submission: Path, users: Path, queries: Path) -> None:
    """Score the setting in whose folder `out` lies. InputError names every missing or damaged cell."""
    setting, everyone = out.parent, read_users(users)
    predictions, problems = {}, []
    for user in everyone:
        try:
            predictions[user] = whole_record(setting / "users" / user)["artefacts"]["predictions"]
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    recipe = read_json(setting / "recipe.json")
    key = scores_key(recipe, file_digest(queries), predictions)
    outputs = {path.name: path for path in (scored, submission, out)}
    kept = _kept(setting / ".scores", key, set(outputs))
    sweep(setting / "*")
    if kept is None:
        _count(out, scored, submission, SimpleNamespace(**recipe["task"]), everyone, queries)
        kept = {name: path.read_bytes() for name, path in outputs.items()}
        with new_folder(setting / ".scores") as folder:
            for name, data in kept.items():
                write_bytes(folder / name, data)
            files = {name: file_digest(folder / name) for name in kept}
            write_json(folder / "key.json", {"key": key, "files": files})
        log.info("%s: %d users scored", setting, len(everyone))
        return
    for name, path in outputs.items():
        write_bytes(path, kept[name], mode=0o644 if path == out else 0o600)
    log.info("%s: the scores of %d users are fresh", setting, len(everyone))


def _count(out: Path, scored: Path, submission: Path, task: Any, users: Sequence[str], queries: Path) -> None:
    """`task` is the recipe's: name, kind and labels are all that is read, and oppu/tasks.py takes long to import."""
    from oppu import scores

    predictions = {user: read_predictions(out.parent / "users" / user) for user in users}
    result = scores.score(task, read_jsonl(queries), predictions)
    write_bytes(scored, jsonl(result.scored))
    write_json(submission, scores.submission(task, predictions))
    write_json(out, result.metrics, mode=0o644)


def _kept(folder: Path, key: str, names: set[str]) -> dict[str, bytes] | None:
    """What was counted before, if it has this key and is whole."""
    try:
        record: dict[str, Any] = read_json(folder / "key.json")
        whole = set(record["files"]) == names and record["key"] == key
        if not whole or any(file_digest(folder / name) != known for name, known in record["files"].items()):
            return None
        return {name: (folder / name).read_bytes() for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None
