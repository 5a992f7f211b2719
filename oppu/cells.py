"""Cells: one user in one setting. Keyed by content, trained in cohorts (DESIGN, section 2).

A cell's folder holds `adapter/` (a plain PEFT folder), `predictions.jsonl` and `cell.json`, which is written last and
records the key of each artefact and the sha256 of its files. An artefact is fresh if its key matches and its files are
whole. Only stale artefacts are made, all stale users of a cohort together; torch is imported only then.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from oppu import keys
from oppu.files import digest, file_digest, folder_digests, read_base, read_json, read_jsonl, write_json
from oppu.profiles import profile_of
from oppu.records import InputError, Item, User
from oppu.setting import OWN
from oppu.warm import KeyOf, Lesson, anew, lesson_of


@dataclass
class Cell:
    """One user's cell on the way to being fresh."""

    folder: Path
    user: User
    profile: str | None
    keys: dict[str, str]
    record: dict[str, Any]
    source: Path
    """The folder whose adapter/ answers the queries: the cell's own, but for the controls pooled and swapped."""
    lesson: Lesson | None
    """What its adapter learns, where it has one of its own."""
    counts: Counter[str] = field(default_factory=Counter)

    def fresh(self, artefact: str) -> bool:
        """Whether an artefact has the key it should have, and its files are whole."""
        known = self.record.get("artefacts", {}).get(artefact)
        return bool(known) and known["key"] == self.keys[artefact] and not damage(self.folder, {artefact: known})

    @property
    def stale(self) -> list[str]:
        """Artefacts that must be made."""
        return [artefact for artefact in self.keys if not self.fresh(artefact)]

    def note(self, artefact: str) -> None:
        """Record an artefact that was just written. cell.json is written last, so a crash before it leaves it stale."""
        path = self.folder / ("adapter" if artefact == "adapter" else "predictions.jsonl")
        files = {f"adapter/{n}": d for n, d in folder_digests(path).items()} if path.is_dir() else None
        entry = {"key": self.keys[artefact], "files": files or {path.name: file_digest(path)}}
        artefacts = {a: e for a, e in self.record.get("artefacts", {}).items() if a in self.keys} | {artefact: entry}
        self.record = {
            **{name: self.record[name] for name in ("task", "augmentation", "peft", "history", "base")},
            "user": self.user.key,
            "history_items": len(self.user.history),
            "counts": dict(sorted((+self.counts).items())),
            "artefacts": artefacts,
        }
        if self.lesson is not None:
            self.record["trained_on"] = self.lesson.links
        write_json(self.folder / "cell.json", self.record)


def damage(folder: Path, artefacts: dict[str, Any]) -> list[str]:
    """The files of a cell that are missing or not what was written, by path below its folder."""
    files = [(name, known) for entry in artefacts.values() for name, known in entry["files"].items()]
    return [name for name, known in files if not (folder / name).is_file() or file_digest(folder / name) != known]


def gone(folder: Path | str, artefacts: dict[str, Any]) -> list[str]:
    """The files of a cell that are missing, by path below its folder; their bytes are not read."""
    names = (name for entry in artefacts.values() for name in entry["files"])
    return [name for name in names if not os.path.isfile(f"{folder}/{name}")]  # noqa: PTH113 (a Path takes three times as long)


Damaged = Callable[[Path, dict[str, Any]], list[str]]
"""`damage`, or `gone` where bytes are not to be read."""


def read_record(folder: Path) -> dict[str, Any]:
    """A cell's record; empty where there is none or it cannot be read (then everything in the cell is stale)."""
    try:
        record = read_json(folder / "cell.json")
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) and "artefacts" in record else {}


def pool_of(base_users: Path, recipe: dict[str, Any]) -> list[Item] | None:
    """Items of base-training users for the augmentation `random`: the one stated place where users meet (App. D)."""
    if recipe["random"] != "base":
        return None
    return [item for user in read_base(base_users) for item in user.history]


def source_of(setting: Path, peft: str, user: str, users: Sequence[str]) -> Path:
    """The folder whose adapter/ answers a user's queries in a setting; `users` are all test users of the task.

    A kind of its own: the user's cell. `pooled`: the setting. `swapped`: the lora cell of the next user in the order of
    the keys, which are hashes: each user lends one adapter and borrows one.
    """
    if peft == "pooled":
        return setting
    if peft != "swapped":
        return setting / "users" / user
    order = sorted(users)
    if user not in order or len(order) < 2:
        raise InputError([f"{setting}: swapped needs {user} and another test user; there are {len(order)}"])
    other = order[(order.index(user) + 1) % len(order)]
    return setting.parent.parent / "lora" / setting.name / "users" / other


def start_of(setting: Path, recipe: dict[str, Any]) -> Path | None:
    """The folder whose adapter/ a setting's adapters begin at: the pooled setting's; None: they begin at none."""
    pooled = recipe.get("start", {}).get("from") == "pooled"
    return setting.parent.parent / "pooled" / setting.name if pooled else None


def borrowed(source: Path, damaged: Damaged = damage) -> str:
    """The digest of an adapter that another cell or the whole setting made; InputError where it is not whole."""
    entry = read_record(source).get("artefacts", {}).get("adapter")
    if entry is None or (bad := damaged(source, {"adapter": entry})):
        found = f"{', '.join(bad)} missing or changed" if entry else "no adapter here"
        raise InputError([f"{source}: {found}; `snakemake --cores all -R cells pooled` mends it"])
    return digest(entry)


def open_cell(
    folder: Path,
    user: User,
    recipe: dict[str, Any],
    manifest: dict[str, Any],
    pool: str | None,
    source: Path,
    lent: str | None,
    profiles: Path | None = None,
) -> Cell:
    """A user's cell with the keys its artefacts should have.

    `source` is `source_of` the user, `lent` the digest of the adapter that the cell takes from elsewhere: to answer
    with, or to begin at (`start_of`). `profiles` is the task's folder of profiles.
    """
    profile = profile_of(recipe, user, profiles)
    wanted: dict[str, str] = {}
    record = read_record(folder)
    adapter, lesson = lent, None
    if recipe["peft"] in OWN:
        key_of = partial(_adapter_key, recipe, manifest, profile, pool)
        lesson = lesson_in(folder, record, recipe, user, key_of, lent)
        adapter = wanted["adapter"] = lesson.key
    wanted["predictions"] = keys.predictions_key(recipe, manifest, user, profile, pool, adapter)
    record |= {name: recipe[name] for name in ("augmentation", "peft", "history")}
    record |= {"task": recipe["task"]["name"], "base": keys.base_digest(manifest)}
    return Cell(folder, user, profile, wanted, record, source, lesson)


def _adapter_key(
    recipe: dict[str, Any], manifest: dict[str, Any], profile: str | None, pool: str | None, user: User
) -> str:
    return keys.adapter_key(recipe, manifest, user, profile, pool)


def lesson_in(
    folder: Path,
    record: dict[str, Any],
    recipe: dict[str, Any],
    user: User,
    key_of: KeyOf,
    lent: str | None,
    damaged: Damaged = damage,
) -> Lesson:
    """What the adapter in a cell's folder has learned or has to learn (oppu/warm.py); `record` is the cell's."""
    entry = record.get("artefacts", {}).get("adapter")
    if recipe.get("start", {}).get("from") != "previous" or entry is None or damaged(folder, {"adapter": entry}):
        return anew(recipe, user, key_of, lent)
    chain = record.get("trained_on") or [{"start": "initial", "items": record["history_items"], "replayed": 0}]
    return lesson_of(recipe, user, key_of, chain, entry["key"])


def whole_record(folder: Path) -> dict[str, Any]:
    """A whole cell's record; InputError where the cell is missing or damaged."""
    record = read_record(folder)
    if "predictions" not in record.get("artefacts", {}):
        raise InputError([f"{folder}: no whole cell here; `snakemake --cores all` makes it"])
    if bad := damage(folder, record["artefacts"]):
        raise InputError([f"{folder}: {', '.join(bad)} missing or changed; `snakemake --cores all -R cells` mends it"])
    return record


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The predictions of a cell that `whole_record` found whole."""
    return read_jsonl(folder / "predictions.jsonl")


def verify(results: Path) -> tuple[int, list[str]]:
    """Check every cell below a results folder; how many there are, and each damaged one with its files."""
    folders = sorted(path for path in results.glob("*/*/*/*/users/u-*") if path.is_dir())
    bad = []
    for folder in folders:
        artefacts = read_record(folder).get("artefacts")
        found = damage(folder, artefacts) if artefacts else ["cell.json"]
        bad += [f"{folder}: {', '.join(found)}"] if found else []
    return len(folders), bad
