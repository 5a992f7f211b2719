"""Taking people out: their records in LaMP's files, and every file below the results that is named after them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from oppu.config import Config
from oppu.download import SOURCES
from oppu.files import read_json, write_bytes, write_json
from oppu.garbage import delete, of_other_settings
from oppu.lamp import Source
from oppu.lamp_values import identifier, load
from oppu.records import InputError
from oppu.split import user_key


@dataclass
class Forgotten:
    """What was taken out, and what a person must still see to."""

    questions: dict[str, int] = field(default_factory=dict)
    """Of each of LaMP's files that was rewritten, how many questions went."""
    paths: list[Path] = field(default_factory=list)
    """Folders and files that were deleted."""
    moved: dict[str, int] = field(default_factory=dict)
    """Per task whose `split.test_users` is a number: how many of them went, so that as many others would move up."""
    left: list[Path] = field(default_factory=list)
    """Settings and bases that the config does not name: nothing makes them anew, and they may know these people."""


def forget(config: Config, users: Collection[str]) -> Forgotten:
    """Take test or base users out of the data and the results that a config names.

    What was made from many people (bases, tables, submission.json) the workflow makes anew, since the data changed.
    Raises InputError, before anything is changed, for a key that is none and for users of whom there is nothing.
    """
    if bad := [user for user in users if not re.fullmatch(r"u-[0-9a-f]{12}", user)]:
        raise InputError([f"{user}: is no user key (u- and 12 hex digits); `oppu users` lists them" for user in bad])
    found, results, own = Forgotten(), Path(config.results), Path(config.profiles.own)
    raw = {task: _raw(Path(config.folder(task)) / task, users) for task in config.tasks}
    named = {user: _named(user, [results, own]) for user in users}
    known = {key for changes in raw.values() for change in changes for key in change.gone}
    if strangers := sorted(user for user in users if not named[user] and user not in known):
        raise InputError([f"{user}: has no record in the config's data and nothing in {results}" for user in strangers])
    found.left = of_other_settings(results, config)
    for task, changes in raw.items():
        tested = sum((results / task / "split" / "histories" / f"{user}.json").exists() for user in users)
        if tested and config.split.test_users != "dev":
            found.moved[task] = tested
        for change in changes:
            change.write()
            found.questions[str(change.questions)] = sum(change.gone.values())
    # A training that was cut off keeps adapters by key, not by name; whoever else is in there trains anew.
    found.paths = sorted({path for paths in named.values() for path in paths} | set(results.rglob("*.checkpoint")))
    for folder in (results, own):
        delete(folder, [path for path in found.paths if path.is_relative_to(folder)])
    return found


def _named(user: str, folders: list[Path]) -> list[Path]:
    """Everything named after a user, but for what lies within a folder that is."""
    paths = sorted(path for folder in folders for path in folder.rglob(f"*{user}*"))
    return [path for path in paths if not any(user in part for part in path.parts[:-1])]


@dataclass
class _Change:
    """A file of questions and that of its golds, without some users."""

    questions: Path
    kept: list[Any]
    outputs: Path | None
    golds: Any
    gone: dict[str, int]

    def write(self) -> None:
        """Golds first: after a crash between the two, the questions still say which golds had to go."""
        if self.outputs is not None:
            _write(self.outputs, self.golds)
        _write(self.questions, self.kept)
        sources = self.questions.with_name(SOURCES)
        if sources.exists():
            changed = {self.questions.name, self.outputs and self.outputs.name}
            records = {name: record for name, record in read_json(sources).items() if name not in changed}
            write_json(sources, records, mode=0o644)


def _raw(folder: Path, users: Collection[str]) -> list[_Change]:
    changes = []
    for part in get_args(Source):
        questions, outputs = (_file(folder, f"{part}_{name}.json") for name in ("questions", "outputs"))
        if questions is None:
            continue
        gone: dict[str, int] = {}
        kept, ids = [], set()
        for record in _load(questions):
            user = identifier(record.get("user_id")) if isinstance(record, dict) else None
            key = user_key(user) if user else None
            if key in users:
                gone[str(key)] = gone.get(str(key), 0) + 1
                ids.add(identifier(record.get("id")))
            else:
                kept.append(record)
        if gone:
            changes.append(_Change(questions, kept, outputs, _golds(outputs, ids), gone))
    return changes


def _golds(path: Path | None, ids: Collection[str | None]) -> Any:
    """A file's golds without those of some questions, in the file's own shape."""
    if path is None:
        return None
    data = _load(path)
    golds = data["golds"] if isinstance(data, dict) else data
    kept = [gold for gold in golds if identifier(gold.get("id")) not in ids]
    return data | {"golds": kept} if isinstance(data, dict) else kept


def _file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.exists()), None)


def _load(path: Path) -> Any:
    try:
        return load(path)
    except InputError as error:
        raise InputError([f"{path}: {error}"]) from None


def _write(path: Path, value: Any) -> None:
    data = json.dumps(value).encode()
    write_bytes(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data, path.stat().st_mode & 0o777)
