"""What nothing needs any more: what is left of users who are no longer tested, and settings that a config lacks.

Only listed, and deleted on request. Links are never followed, and nothing outside the results folder is touched.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from oppu.files import held, read_users
from oppu.records import InputError

if TYPE_CHECKING:
    from oppu.config import Config

OF_A_USER = re.compile(r"(?P<key>u-[0-9a-f]{12})(\.json|\.tsv|\.log|\.stamp\.log|\.checkpoint)?")
"""Names of what belongs to one user: a cell, a profile, a cohort of one, its logs. Any other name is left alone."""


def tested(results: Path) -> dict[str, set[str]]:
    """The keys of each task's test users; a task that was never split is left out."""
    found = {path.parent.parent.name: set(read_users(path)) for path in sorted(results.glob("*/split/users.json"))}
    if empty := [task for task, users in found.items() if not users]:
        raise InputError([f"{results / task}/split/users.json: names no test user; run again" for task in empty])
    return found


def of_removed_users(results: Path) -> list[Path]:
    """Files and folders of users who are no longer in their task's users.json."""
    found = []
    for task, users in tested(results).items():
        for top in (results / task, results / "logs" / task, results / "benchmarks" / task):
            found += [path for key, path in _of_users(top) if key not in users]
    return sorted(found)


def _of_users(top: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, files in os.walk(top):  # os.walk follows no links
        for name in folders + files:
            if match := OF_A_USER.fullmatch(name):
                yield match["key"], Path(folder) / name
        folders[:] = [name for name in folders if not OF_A_USER.fullmatch(name)]


def of_other_settings(results: Path, config: Config) -> list[Path]:
    """Folders of settings and bases that a config does not name, in tasks that were split.

    Raises InputError where the config's results lie in another folder.
    """
    if Path(config.results).resolve() != results.resolve():
        raise InputError([f"{results}: the config's results are in {config.results}; give that folder, or none"])
    wanted = {f"{task}/{'/'.join(setting)}" for task in config.tasks for setting in config.settings}
    wanted |= {f"{task}/{augmentation}/base" for task in config.tasks for augmentation, *_ in config.settings}
    wanted |= {
        f"{task}/{augmentation}/pooled/{history}"
        for task in config.tasks
        for augmentation, _, history in config.settings
        if config.lora(task).start == "pooled"
    }
    recipes = [
        path for task in tested(results) for form in ("*/*/*", "*/base") for path in _recipes(results / task, form)
    ]
    return sorted(path.parent for path in recipes if path.parent.relative_to(results).as_posix() not in wanted)


def _recipes(task: Path, form: str) -> Iterator[Path]:
    """Recipes below a task that are reached by no link."""
    for path in task.glob(f"{form}/recipe.json"):
        if path.parent.resolve() == task.resolve() / path.parent.relative_to(task):
            yield path


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; a link counts itself."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum((Path(folder) / name).lstat().st_size for folder, _, files in os.walk(path) for name in files)


def delete(results: Path, paths: Sequence[Path]) -> None:
    """Delete these files and folders, each once no run holds its user; of a link, the link alone."""
    root = results.resolve()
    if outside := [path for path in paths if not path.parent.resolve().is_relative_to(root)]:
        raise InputError([f"{path}: lies outside of {results}; nothing was deleted" for path in outside])
    for path in paths:
        match = OF_A_USER.fullmatch(path.name)
        users = path.parent.name == "users" and match is not None
        with held(path.parent.parent, [match["key"]]) if users and match else nullcontext():
            if path.is_symlink() or not path.is_dir():
                path.unlink(missing_ok=True)
            else:
                shutil.rmtree(path)
