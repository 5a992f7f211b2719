"""Cells: one user in one setting. Keyed by content, trained in cohorts (DESIGN, section 2).

A cell's folder holds `adapter/` (a plain PEFT folder), `predictions.jsonl` and `cell.json`, which is written last and
records the key of each artefact and the sha256 of its files. An artefact is fresh if its key matches and its files are
whole. Only stale artefacts are made, all stale users of a cohort together; torch is imported only then.
"""

from __future__ import annotations

import fcntl
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from oppu import recipe as keys
from oppu.config import CONTROLS, OWN
from oppu.files import (
    digest,
    file_digest,
    folder_digests,
    new_folder,
    read_base,
    read_json,
    read_user,
    read_users,
    write_bytes,
    write_json,
)
from oppu.profiles import profile_of
from oppu.records import InputError, Item, User

log = logging.getLogger(__name__)


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
        write_json(self.folder / "cell.json", self.record)


def damage(folder: Path, artefacts: dict[str, Any]) -> list[str]:
    """The files of a cell that are missing or not what was written, by path below its folder."""
    files = [(name, known) for entry in artefacts.values() for name, known in entry["files"].items()]
    return [name for name, known in files if not (folder / name).is_file() or file_digest(folder / name) != known]


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


def borrowed(source: Path) -> str:
    """The digest of an adapter that another cell or the whole setting made; InputError where it is not whole."""
    entry = read_record(source).get("artefacts", {}).get("adapter")
    if entry is None or (bad := damage(source, {"adapter": entry})):
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

    `source` is `source_of` the user, `lent` the digest of its adapter where the cell does not train it, `profiles` the
    task's folder of profiles.
    """
    profile = profile_of(recipe, user, profiles)
    wanted: dict[str, str] = {}
    adapter = lent
    if recipe["peft"] in OWN:
        adapter = wanted["adapter"] = keys.adapter_key(recipe, manifest, user, profile, pool)
    wanted["predictions"] = keys.predictions_key(recipe, manifest, user, profile, pool, adapter)
    record = read_record(folder) | {name: recipe[name] for name in ("augmentation", "peft", "history")}
    record |= {"task": recipe["task"]["name"], "base": keys.base_digest(manifest)}
    return Cell(folder, user, profile, wanted, record, source)


@contextmanager
def held(folder: Path, users: Sequence[str]) -> Iterator[None]:
    """Hold the cells of these users against other runs, waiting for whoever has them.

    Snakemake's lock does not cover folders it does not know. Byte ranges of one file, taken in order, so that two
    runs cannot wait for each other; they go with the process, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as f:
        for place in sorted(int(user[2:], 16) for user in users):
            try:
                fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except OSError:
                log.warning("another run holds cells of %s; waiting for it", folder)
                fcntl.lockf(f, fcntl.LOCK_EX, 1, place)
        yield


def run(
    stamp: Path,
    recipe: Path,
    base: Path,
    histories: Sequence[Path],
    base_users: Path,
    mended: str = "-",
    profiles: Path | None = None,
    users: Path | None = None,
) -> None:
    """Bring the cells of these users up to date, then write the stamp; the command of rule `cells`.

    `profiles` is the task's folder of profiles, read where the augmentation carries one; `users` is users.json, which
    `swapped` needs to know all test users. Raises InputError at the end when users failed; the others' cells are kept,
    and there is no stamp.
    """
    values, manifest = read_json(recipe), read_json(base)
    setting = recipe.parent
    names = [path.stem for path in histories]
    everyone = read_users(users) if users else names
    lend = cache(borrowed)  # pooled: one adapter for all
    failed: dict[str, str] = {}
    with held(setting, names):
        pool = pool_of(base_users, values)
        pool_key = digest([item.fields for item in pool]) if pool else None
        cells = []
        for path in histories:
            try:
                source = source_of(setting, values["peft"], path.stem, everyone)
                lent = lend(source) if values["peft"] in CONTROLS else None
                folder = setting / "users" / path.stem
                cells.append(open_cell(folder, read_user(path), values, manifest, pool_key, source, lent, profiles))
            except (OSError, ValueError, KeyError, TypeError) as error:
                failed[path.stem] = f"{path}: {error or type(error).__name__}"
        stale = [cell for cell in cells if cell.stale]
        trained = sum("adapter" in cell.stale for cell in stale)
        log.info("%s: %d users, %d to train, %d to predict", setting, len(names), trained, len(stale))
        if stale:
            failed |= _make(stale, values, manifest, base.parent, pool)
        for cell in cells:
            if cell.user.key not in failed and (left := cell.stale):
                failed[cell.user.key] = f"not made: {', '.join(left)}"
        if failed:
            lines = [f"{setting}: user {user}: {why}" for user, why in sorted(failed.items())]
            raise InputError([*lines, f"{len(failed)} of {len(names)} users failed; the others are kept"])
        files = {
            f"../users/{c.user.key}/{name}"
            for c in cells
            for e in c.record["artefacts"].values()
            for name in e["files"]
        }
        files |= {f"../users/{c.user.key}/cell.json" for c in cells}
        write_json(stamp, {"users": sorted(names), "files": sorted(files), "mended": mended})


def _make(
    stale: list[Cell], values: dict[str, Any], manifest: dict[str, Any], base: Path, pool: list[Item] | None
) -> dict[str, str]:
    """Train and predict the stale cells in one process; returns why each failed user failed."""
    from oppu.cohort import Cohort  # torch and transformers: seconds, so only when something is stale

    cohort = Cohort(values, manifest, base, pool, [(cell.user, cell.profile, cell.counts) for cell in stale])
    failed: dict[str, str] = {}
    todo = [cell for cell in stale if "adapter" in cell.keys and not cell.fresh("adapter")]
    if values["peft"] != "none":
        for source, user in {cell.source: cell.user.key for cell in stale if cell not in todo}.items():
            cohort.load(user, source / "adapter")
    by_key = {cell.user.key: cell for cell in todo}

    def finished(key: str) -> None:
        with new_folder(by_key[key].folder / "adapter") as folder:
            cohort.save(key, folder)
        by_key[key].note("adapter")

    if todo:
        failed |= cohort.train(list(by_key), finished)
    waiting = [cell for cell in stale if cell.user.key not in failed and not cell.fresh("predictions")]
    predictions, more = cohort.predict([cell.user.key for cell in waiting])
    failed |= more
    for cell in (cell for cell in waiting if cell.user.key not in failed):
        lines = [json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in predictions[cell.user.key]]
        write_bytes(cell.folder / "predictions.jsonl", "".join(lines).encode())
        cell.note("predictions")
    return failed


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """A whole cell's predictions; InputError where the cell is missing or damaged."""
    record = read_record(folder)
    if "predictions" not in record.get("artefacts", {}):
        raise InputError([f"{folder}: no whole cell here; `snakemake --cores all` makes it"])
    if bad := damage(folder, record["artefacts"]):
        raise InputError([f"{folder}: {', '.join(bad)} missing or changed; `snakemake --cores all -R cells` mends it"])
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def verify(results: Path) -> tuple[int, list[str]]:
    """Check every cell below a results folder; how many there are, and each damaged one with its files."""
    folders = sorted(path for path in results.glob("*/*/*/*/users/u-*") if path.is_dir())
    bad = []
    for folder in folders:
        artefacts = read_record(folder).get("artefacts")
        found = damage(folder, artefacts) if artefacts else ["cell.json"]
        bad += [f"{folder}: {', '.join(found)}"] if found else []
    return len(folders), bad
