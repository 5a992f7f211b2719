"""Reading LaMP's files: {folder}/{task}/{train,dev}_{questions,outputs}.json[.gz], time-based split.

Everything that a file holds is checked, all problems are raised at once, and what is mended on the way (numbers as
text, items without an id, lone surrogates) is counted and reported once per file.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from oppu.lamp_values import Items, earliest, identifier, kind, load
from oppu.records import InputError, Item
from oppu.tasks import Task

log = logging.getLogger(__name__)

Source = Literal["train", "dev"]
_USER_BASED = (
    "no 'user_id': these look like LaMP's user-based split; OPPU needs the time-based files"
    " (https://ciir.cs.umass.edu/downloads/LaMP/time/…)"
)


@dataclass(frozen=True)
class Question:
    """One record of LaMP: a user's query and what that user had written before it, oldest first.

    `gold` is None only where golds were not asked for.
    """

    id: str
    user_id: str
    source: Source
    input: str
    gold: str | None
    history: tuple[Item, ...]


def read(folder: Path, task: Task, need_golds: bool = True) -> list[Question]:
    """All questions of a task, train before dev, each in file order.

    Dates order a history, a missing month or day taken as the earliest, ties by list order; a history in which any
    item lacks a date keeps its list order. Lone surrogates in texts become U+FFFD; an item without an id gets one
    from its content. Raises InputError with every problem of every file.
    """
    return read_counted(folder, task, need_golds)[0]


def read_counted(folder: Path, task: Task, need_golds: bool = True) -> tuple[list[Question], dict[str, int]]:
    """`read`, and the counts of what was mended or is unusual; a distinct history item counts once."""
    questions: list[Question] = []
    problems: list[str] = []
    items, files = Items(task), dict[str, str]()
    for source in get_args(Source):
        reader = _Reader(task, source, items, files)
        questions += reader.read(folder / task.name, need_golds)
        problems += reader.problems
    if not questions and not problems:
        problems.append(f"{folder / task.name}: no question in {{train,dev}}_questions.json[.gz]; fetch LaMP's files")
    if problems:
        raise InputError(problems)
    return questions, dict(sorted(items.counts.items()))


class _Reader:
    """The two files of one source: their questions, and what is wrong with them."""

    def __init__(self, task: Task, source: Source, items: Items, files: dict[str, str]) -> None:
        self.task, self.source, self.items = task, source, items
        self.files = files
        """Of each question id of the task, the file it stands in."""
        self.problems: list[str] = []

    def read(self, folder: Path, need_golds: bool) -> list[Question]:
        """The questions of this source, none where it has no files."""
        before = Counter(self.items.counts)
        asked, outputs = (self._find(folder, f"{self.source}_{name}.json") for name in ("questions", "outputs"))
        if asked is None:
            if outputs is not None:
                self._problem(outputs, "", f"there is no {self.source}_questions.json[.gz] beside it; fetch it")
            return []
        if outputs is None and need_golds:
            self._problem(asked, "", f"there is no {self.source}_outputs.json[.gz] beside it; fetch it")
        golds = self._golds(outputs) if outputs else None
        questions, ids = self._questions(asked, golds)
        if outputs and golds is not None and ids:
            for id_ in sorted(ids - golds.keys() if need_golds else ()):
                self._problem(asked, _name(id_), f"has no gold in {outputs.name}; add it or drop the question")
            for id_ in sorted(golds.keys() - ids):
                self._problem(outputs, f"gold {id_[:40]}", f"no such question in {asked.name}; drop the gold")
        if new := sorted((self.items.counts - before).items()):
            log.warning("%s/%s: %s", self.task.name, asked.name, ", ".join(f"{name} {n}" for name, n in new))
        return questions

    def _find(self, folder: Path, name: str) -> Path | None:
        found = [path for path in (folder / name, folder / f"{name}.gz") if path.exists()]
        if len(found) == 2:
            self._problem(found[0], "", f"stands beside {found[1].name}; remove one of them")
        return found[0] if found else None

    def _problem(self, path: Path, record: str, found: str) -> None:
        self.problems.append(": ".join(part for part in (f"{self.task.name}/{path.name}", record, found) if part))

    def _list(self, path: Path, key: str | None = None) -> list[Any] | None:
        """The list that a file holds, plain or under `key`; None with the problem noted."""
        try:
            data = load(path)
        except InputError as error:
            self._problem(path, "", str(error))
            return None
        if key and isinstance(data, dict):
            self._check_task(path, data.get("task"))
            data = data.get(key)
        if isinstance(data, list):
            return data
        self._problem(path, "", f"holds {kind(data)} where a list {f'of {key} ' if key else ''}is needed")
        return None

    def _check_task(self, path: Path, name: Any) -> None:
        """Golds of another task are refused; LaMP_2 may stand for LaMP_2N and LaMP_2M."""
        wanted, found = (re.match(r"LaMP_[0-9]+", str(n)) for n in (self.task.name, name))
        if wanted and found and wanted[0] != found[0]:
            self._problem(path, "", f"holds golds of {found[0]}, not of {self.task.name}; fetch the right file")

    def _golds(self, path: Path) -> dict[str, str] | None:
        """Golds by question id; None when the file cannot be read."""
        if (data := self._list(path, "golds")) is None:
            return None
        golds: dict[str, str] = {}
        for number, raw in enumerate(data):
            id_ = identifier(raw.get("id")) if isinstance(raw, dict) else None
            if id_ is None:
                self._problem(path, f"gold number {number}", "is not an object with an 'id' (text) and an 'output'")
            elif id_ in golds:
                self._problem(path, f"gold {id_[:40]}", "this id stands twice; keep one")
            else:
                golds[id_] = self._gold(path, f"gold {id_[:40]}", raw.get("output"))
        return golds

    def _gold(self, path: Path, record: str, raw: Any) -> str:
        text = self.items.text(raw)
        if text is None:
            self._problem(path, record, f"'output' is {kind(raw)}, not text")
            return ""
        if self.task.labels is None:
            return text
        text = text.strip()
        if text not in self.task.labels:
            fix = f"add it to labels of {self.task.name} in tasks.yaml or drop the question"
            self._problem(path, record, f"unknown label {text[:40]!r}; {fix}")
        return text

    def _questions(self, path: Path, golds: dict[str, str] | None) -> tuple[list[Question], set[str]]:
        """The questions that are well, and the ids of all."""
        data = self._list(path) or []
        questions, ids, userless = [], set(), 0
        for number, raw in enumerate(data):
            if not isinstance(raw, dict):
                self._problem(path, f"question number {number}", f"is {kind(raw)}, not an object")
                continue
            userless += raw.get("user_id") is None
            id_ = self._question_id(path, number, raw.get("id"))
            question = self._question(path, _name(id_, number), raw)
            raw.clear()  # frees the file's copy of the history: what is kept is shared between questions
            if id_ is not None:
                ids.add(id_)
            if id_ is not None and question is not None:
                questions.append(Question(id_, source=self.source, gold=(golds or {}).get(id_), **question))
        if userless:
            self._problem(path, f"{userless} of {len(data)} questions", _USER_BASED)
        return questions, ids

    def _question_id(self, path: Path, number: int, raw: Any) -> str | None:
        id_ = identifier(raw)
        if id_ is None:
            self._problem(path, f"question number {number}", f"'id' is {kind(raw)} or empty; needed is text")
        elif id_ in self.files:
            self._problem(path, _name(id_), f"this id stands in {self.files[id_]} already; a task's ids must differ")
        else:
            self.files[id_] = path.name
        return id_

    def _question(self, path: Path, record: str, raw: dict[str, Any]) -> dict[str, Any] | None:
        """user_id, input and history of a question; None when one of them cannot be read."""
        user = identifier(raw.get("user_id"))
        if user is None and raw.get("user_id") is not None:
            self._problem(path, record, f"'user_id' is {kind(raw['user_id'])} or empty; needed is text")
        text = self.items.text(raw.get("input"))
        if text is None:
            self._problem(path, record, f"'input' is {kind(raw.get('input'))}, not text")
        else:
            try:
                if self.task.ambiguous(text):
                    self.items.counts["ambiguous_inputs"] += 1
            except ValueError as error:
                self._problem(path, record, f"{error}; is this a file of {self.task.name}?")
        history = self._history(path, record, raw.get("profile"))
        if user is None or text is None or history is None:
            return None
        return {"user_id": user, "input": text, "history": history}

    def _history(self, path: Path, record: str, raw: Any) -> tuple[Item, ...] | None:
        if not isinstance(raw, list):
            self._problem(path, record, f"'profile' is {kind(raw)}, not a list of items")
            return None
        made = [self.items.item(value) for value in raw]
        for n, item in enumerate(made):
            if isinstance(item, str):
                self._problem(path, record, f"history[{n}] {item}")
        items = [item for item in made if isinstance(item, Item)]
        dates = [item.date for item in items if item.date is not None]
        if len(dates) == len(items):
            return tuple(sorted(items, key=lambda item: earliest(item.date or "")))
        self.items.counts["histories_in_list_order"] += 1
        return tuple(items)


def _name(id_: str | None, number: int = 0) -> str:
    """A question in a message."""
    return f"question number {number}" if id_ is None else f"question {id_[:40]}"
