"""How many cells of a configuration are fresh, stale, failed or missing: what a run with it would find, in seconds.

By keys, computed as `oppu cells` does, and by whether files are there. Bytes of adapters and of model weights that are
no newer than the base are not read (`oppu verify` reads them), and nothing is written.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from oppu import keys
from oppu import recipe as recipes
from oppu.base import MODEL_FILES, model_files, models_of
from oppu.cells import borrowed, gone, lesson_in, source_of, start_of
from oppu.config import Config
from oppu.failures import of_setting
from oppu.files import digest, file_digest, read_base, read_json, read_users
from oppu.profile_records import own_text
from oppu.profiles import base_profiles_of, extractive, whole
from oppu.records import InputError, User
from oppu.setting import CONTROLS, OWN, parse_augmentation
from oppu.tasks import tasks

STATES = ("fresh", "stale", "failed", "missing")
"""fresh: as it should be; failed: not fresh, and the last job that made it failed; missing: there is no cell.json."""


@dataclass
class Count:
    """The cells of one setting of a task, by state. `cells` is None where the users are not known yet."""

    task: str
    setting: str
    cells: int | None
    states: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    note: str = ""


def status(config: Config) -> list[Count]:
    """Every setting of every task of a configuration."""
    last = sorted(config.settings, key=lambda setting: setting[1] == "swapped")  # after the cells it borrows from
    found: dict[tuple[str, tuple[str, str, str]], Count] = {}
    for name in config.tasks:
        task = _Task(config, name)
        found |= {(name, setting): task.count(*setting) for setting in last}
    return [found[name, setting] for name in config.tasks for setting in config.settings]


def as_json(counts: Iterable[Count]) -> dict[str, Any]:
    """The same as plain values, with the totals."""
    counts = list(counts)
    total = sum((count.states for count in counts), Counter[str]())
    rows = []
    for count in counts:
        numbers = {state: count.states[state] for state in STATES}
        row = {"task": count.task, "setting": count.setting, "cells": count.cells, **numbers}
        rows.append(row | {"note": count.note, "failures": count.failures})
    return {"settings": rows, "total": {state: total[state] for state in STATES}}


def text_of(counts: Iterable[Count]) -> str:
    """A line per setting, the totals, and the reasons of the first failures."""
    counts = list(counts)
    values = as_json(counts)
    wide = max(len(f"{count.task} {count.setting}") for count in counts)
    lines = [f"{'':{wide}}" + "".join(f"{state:>9}" for state in STATES)]
    for count in counts:
        numbers = "".join(f"{count.states[state] or '-':>9}" for state in STATES)
        lines.append(f"{f'{count.task} {count.setting}':{wide}}{numbers}" + (f"  {count.note}" if count.note else ""))
    lines.append(f"{'all':{wide}}" + "".join(f"{values['total'][state] or '-':>9}" for state in STATES))
    why = [f"{c.task}/{c.setting} {user}: {text}" for c in counts for user, text in c.failures.items()]
    return "\n".join(lines + why[:10] + ([f"... and {len(why) - 10} more that failed"] if len(why) > 10 else []))


class _Task:
    """What the settings of a task have in common."""

    def __init__(self, config: Config, name: str) -> None:
        self.config, self.name = config, name
        self.folder = Path(config.results) / name
        self.people: dict[str, keys.Person] = {}
        self.data: dict[str, dict[str, Any]] = {}
        self.note = ""
        self.adapters: dict[tuple[str, str, str], set[str]] = {}
        """By setting, the users whose own adapter is fresh."""
        self._pooled: dict[Path, str] = {}
        try:
            for key in read_users(self.folder / "split/users.json"):
                self.data[key] = read_json(self.folder / "split/histories" / f"{key}.json")
                self.people[key] = keys.Person.of(self.data[key])
        except (OSError, ValueError):
            self.people, self.note = {}, "no split yet"
        self.base = cache(self._base)

    def count(self, augmentation: str, peft: str, history: str) -> Count:
        """The states of a setting's cells."""
        folder = self.folder / augmentation / peft / history
        setting = "/".join((augmentation, peft, history))
        if self.note:
            wanted = self.config.split.test_users
            number = wanted if isinstance(wanted, int) else None
            return Count(self.name, setting, number, Counter(missing=number or 0), note=self.note)
        manifest, note = self.base(augmentation)
        recipe = recipes.cell_recipe(self.config, self.name, augmentation, peft, history)
        cells = _Cells(self, folder, recipe, manifest)
        found = Count(self.name, setting, len(self.people), note=note)
        failed = of_setting(folder)
        own = self.adapters.setdefault((augmentation, peft, history), set())
        for user in self.people:
            record = _record(f"{folder}/users/{user}/cell.json")
            wrong = cells.wrong(user, record)
            if "adapter" not in wrong:
                own.add(user)
            if not wrong:
                state = "fresh"
            elif user in failed:
                state, found.failures[user] = "failed", failed[user]
            else:
                state = "stale" if record else "missing"
            found.states[state] += 1
        return found

    def _base(self, augmentation: str) -> tuple[dict[str, Any] | None, str]:
        """The manifest of the base of an augmentation where it is fresh; else None and what is wrong."""
        folder = self.folder / augmentation / "base"
        manifest = _record(str(folder / "base.json"))
        recipe = recipes.base_recipe(self.config, self.name, augmentation)
        if not manifest:
            return None, "base missing"
        try:
            texts = self.base_profiles if parse_augmentation(recipe["augmentation"]).profile else None
            model = _models(folder, recipe, manifest)
            fresh = manifest["key"] == keys.base_key(recipe, model, self.base_users, texts)
        except (OSError, ValueError, KeyError):
            fresh = False
        return (manifest, "") if fresh and not gone(folder, {"": manifest}) else (None, "base stale")

    @cached_property
    def base_users(self) -> str:
        return file_digest(self.folder / "split/base.jsonl")

    @cached_property
    def base_profiles(self) -> dict[str, str] | None:
        folder = self.folder / "profiles"
        if not self.profile_recipe or not (folder / "base.json").is_file():
            raise InputError([f"{folder}: stale"])
        return base_profiles_of({"augmentation": "profile-k0", "task": {"name": self.name}}, folder)

    @cached_property
    def profile_recipe(self) -> dict[str, Any]:
        """What the profiles there were made by; empty where the configuration now says something else."""
        wanted = recipes.profile_recipe(self.config, self.name)
        known = _record(str(self.folder / "profiles/recipe.json"))
        return wanted if _settled(wanted) == _settled(known) else {}

    @cached_property
    def profiles(self) -> dict[str, str]:
        """The test users' profiles as a run would leave them; without those that a model would have to write anew."""
        recipe = recipes.profile_recipe(self.config, self.name)
        llm = recipe["backend"] == "llm"
        found = {}
        with suppress(InputError):  # no such model: then no profile is fresh
            model = model_files(**recipe["runtime"]["model"]) if llm else None
            for user in self.people:
                with suppress(InputError):
                    own = own_text(Path(self.config.profiles.own) / self.name, user)
                    record = _record(f"{self.folder}/profiles/users/{user}.json")
                    named = whole(record) and (record["user"], record["task"]) == (user, self.name)
                    if named and record["key"] == keys.profile_key(recipe, model, self.user(user), own):
                        found[user] = record["text"]
                    elif own is not None or not llm:
                        found[user] = (
                            own if own is not None else extractive(tasks()[self.name], self.user(user).history)
                        )
        return found

    @cached_property
    def pool(self) -> str:
        """The digest of the base users' items, for `random`."""
        return digest([item.fields for user in read_base(self.folder / "split/base.jsonl") for item in user.history])

    def pooled(self, setting: Path, manifest: dict[str, Any] | None) -> str:
        """The digest of a setting's adapter for all users; InputError where it is not fresh."""
        if setting not in self._pooled:
            augmentation, peft, history = setting.parts[-3:]
            recipe = recipes.cell_recipe(self.config, self.name, augmentation, peft, history)
            makes = keys.Keys(recipe, manifest or {})
            profiles = self.profiles if parse_augmentation(recipe["augmentation"]).profile else {}
            each = [makes.adapter(self.people[user], profiles.get(user), None) for user in sorted(self.people)]
            entry = _record(str(setting / "cell.json")).get("artefacts", {}).get("adapter", {})
            self._pooled[setting] = borrowed(setting, gone) if entry.get("key") == digest(each) else ""
        if not self._pooled[setting]:
            raise InputError([f"{setting} is stale"])
        return self._pooled[setting]

    def user(self, key: str) -> User:
        """A test user as a record."""
        return User.from_json(self.data[key])


class _Cells:
    """The keys that the cells of one setting should have."""

    def __init__(self, task: _Task, folder: Path, recipe: dict[str, Any], manifest: dict[str, Any] | None) -> None:
        self.task, self.folder, self.recipe, self.manifest = task, folder, recipe, manifest
        self.keys = keys.Keys(recipe, manifest) if manifest else None
        self.profile = parse_augmentation(recipe["augmentation"]).profile
        self.pool = task.pool if recipe["random"] == "base" else None
        self.warm = "start" in recipe

    def wrong(self, user: str, record: dict[str, Any]) -> list[str]:
        """The artefacts of a cell that would be made; also where what they are made from would be made first."""
        own = self.recipe["peft"] in OWN
        names = ["adapter", "predictions"] if own else ["predictions"]
        try:
            wanted = self._wanted(user, record)
        except (OSError, ValueError, KeyError):
            return names
        known = record.get("artefacts", {})
        folder, wrong = f"{self.folder}/users/{user}", []
        for name in names:
            entry = known.get(name)
            if entry is None or entry["key"] != wanted[name] or gone(folder, {name: entry}):
                wrong.append(name)
        return wrong

    def _wanted(self, user: str, record: dict[str, Any]) -> dict[str, str]:
        if self.keys is None:
            raise InputError(["no base"])
        person = self.task.people[user]
        profile = self.task.profiles[user] if self.profile else None
        wanted: dict[str, str] = {}
        adapter = None
        if self.recipe["peft"] in CONTROLS:
            adapter = self._lent(user)
        elif self.recipe["peft"] in OWN and not self.warm:
            adapter = wanted["adapter"] = self.keys.adapter(person, profile, self.pool)
        elif self.recipe["peft"] in OWN:
            adapter = wanted["adapter"] = self._lesson(user, record, profile)
        return wanted | {"predictions": self.keys.predictions(person, profile, self.pool, adapter)}

    def _lesson(self, user: str, record: dict[str, Any], profile: str | None) -> str:
        def key_of(one: User) -> str:
            assert self.keys is not None
            return self.keys.adapter(keys.Person.of(one.as_json(golds=False)), profile, self.pool)

        start = start_of(self.folder, self.recipe)
        lent = self.task.pooled(start, self.manifest) if start else None
        folder = self.folder / "users" / user
        return lesson_in(folder, record, self.recipe, self.task.user(user), key_of, lent, gone).key

    def _lent(self, user: str) -> str:
        source = source_of(self.folder, self.recipe["peft"], user, list(self.task.people))
        if self.recipe["peft"] == "pooled":
            return self.task.pooled(source, self.manifest)
        augmentation, history = self.folder.parent.parent.name, self.folder.name
        if source.name not in self.task.adapters[augmentation, "lora", history]:
            raise InputError([f"{source} is stale"])
        return borrowed(source, gone)


def _models(folder: Path, recipe: dict[str, Any], manifest: dict[str, Any]) -> dict[str, str]:
    """What identifies the model (`models_of`): as the base recorded it, unless a file is newer or it lies elsewhere."""
    where = recipe["runtime"]
    known = _record(f"{folder}/recipe.json").get("runtime", {})
    if any(known.get(name) != where[name] for name in ("model", "encoder")):
        return models_of(recipe)
    made = (folder / "base.json").stat().st_mtime_ns
    folders = [Path(path) for path in (where["model"]["path"], where["encoder"]) if path]
    files = (file for path in folders for pattern in (*MODEL_FILES, "*.bin") for file in path.glob(pattern))
    return models_of(recipe) if any(file.stat().st_mtime_ns > made for file in files) else manifest["model"]


def _settled(recipe: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in recipe.items() if name != "runtime"}


def _record(path: str) -> dict[str, Any]:
    """A file of JSON; empty where there is none or it cannot be read."""
    try:
        with open(path, "rb") as f:  # noqa: PTH123 (thousands of files: a Path costs as much as the reading)
            record = json.load(f)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
