"""Making the profiles' records: one per user, keyed by content like a cell, each from that user's history alone.

Fresh records are kept, only stale ones are made; torch is imported only when a model must write something.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oppu import devices
from oppu.base import model_files
from oppu.files import file_digest, held, lock, read_base, read_json, read_user, sweep, write_if_changed, write_json
from oppu.keys import profile_key
from oppu.profiles import extractive, read_lines, sealed, whole
from oppu.records import InputError, User
from oppu.tasks import tasks

log = logging.getLogger(__name__)


def run(stamp: Path, recipe: Path, histories: Sequence[Path], own: Path, mended: str = "-") -> None:
    """Bring these test users' profiles up to date, then write the stamp; the command of rule `profiles`.

    `own` is the folder of texts that users wrote themselves, {user key}.txt; they go before generated ones. Raises
    InputError at the end when users failed; the others' profiles are kept, and there is no stamp.
    """
    values, folder = read_json(recipe), recipe.parent
    model, names = _model(values), [path.stem for path in histories]
    failed: dict[str, str] = {}
    with held(folder, names):
        sweep(stamp, *(_path(folder, name) for name in names))
        stale = []
        for path in histories:
            with noted(failed, path.stem):
                user = read_user(path)
                if not _settled(_path(folder, user.key), values, model, user, own_text(own, user.key)):
                    stale.append(user)
        log.info("%s: %d users, %d profiles to make (%s)", folder, len(names), len(stale), values["backend"])
        for batch in _made(values, model, stale, failed):
            for record in batch:
                write_json(_path(folder, record["user"]), record)
        _refuse(folder, failed, len(names))
        files = [f"../users/{name}.json" for name in sorted(names)]
        write_json(stamp, {"users": sorted(names), "files": files, "mended": mended})


def run_base(out: Path, recipe: Path, base_users: Path, mended: str = "-") -> None:
    """Bring the base users' profiles up to date, then write `out`; the command of rule `base_profiles`.

    They stand in base.jsonl beside it, one record a line, sorted by user. While they are made, each batch is appended
    and synced: what a killed run has finished is kept by the next. Raises InputError at the end when users failed.
    """
    values, path = read_json(recipe), out.parent / "base.jsonl"
    model = _model(values)
    failed: dict[str, str] = {}
    with lock(out.parent / ".base.lock", f"{path}"):
        sweep(out, path)
        users = {user.key: user for user in read_base(base_users)}
        keys = {key: profile_key(values, model, user, None) for key, user in users.items()}
        old = [record for record in read_lines(path) if whole(record)]
        known = {record["user"]: record for record in old if record["key"] == keys.get(record["user"])}
        stale = [user for key, user in users.items() if key not in known]
        log.info("%s: %d base users, %d profiles to make (%s)", path, len(users), len(stale), values["backend"])
        write_if_changed(path, _lines(known.values()))  # without what is stale, or was cut in the middle of a line
        with path.open("ab") as f:
            for batch in _made(values, model, stale, failed):
                f.write(_lines(batch))
                f.flush()
                os.fsync(f.fileno())
                known |= {record["user"]: record for record in batch}
        _refuse(out.parent, failed, len(users))
        write_if_changed(path, _lines(known[key] for key in sorted(known)))
        write_json(out, {"users": len(known), "sha256": file_digest(path), "files": [path.name], "mended": mended})


def own_text(own: Path, user: str) -> str | None:
    """The profile that a user wrote themselves, without outer space; None where there is none.

    Raises InputError where it is not UTF-8, or empty.
    """
    path = own / f"{user}.txt"
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError([f"{path}: byte {error.start} is not UTF-8; save it as UTF-8 text"]) from None
    if not text:
        raise InputError([f"{path}: is empty; write the profile, or delete the file for the generated one"])
    return text


@contextmanager
def noted(failed: dict[str, str], user: str) -> Iterator[None]:
    """A block whose failure is that user's alone: it is noted, and the others go on."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        failed[user] = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def _path(folder: Path, user: str) -> Path:
    return folder / "users" / f"{user}.json"


def _model(recipe: dict[str, Any]) -> dict[str, str] | None:
    """What identifies the model that writes profiles; None where none is asked."""
    where = recipe["runtime"]["model"]
    return model_files(**where) if recipe["backend"] == "llm" else None


def _settled(path: Path, recipe: dict[str, Any], model: dict[str, str] | None, user: User, own: str | None) -> bool:
    """Whether a user's record is as it should be, or can be made so without a backend.

    The record of an own text keeps the generated one inside it, which is taken out again when the text is gone.
    """
    key = profile_key(recipe, model, user, own)
    try:
        old = read_json(path)
    except (FileNotFoundError, ValueError):
        old = None
    if whole(old) and old["key"] == key:
        return True
    generated = old.get("generated") if whole(old) and old["source"] == "own" else old
    if own is not None:
        kept = {"generated": generated} if whole(generated) else {}
        write_json(path, sealed(user.key, recipe["task"]["name"], key, "own", own) | kept)
        return True
    if whole(generated) and generated["key"] == key:
        write_json(path, generated)
        return True
    return False


def _made(
    recipe: dict[str, Any], model: dict[str, str] | None, users: Sequence[User], failed: dict[str, str]
) -> Iterator[list[dict[str, Any]]]:
    """The records of these users by the recipe's backend, a batch as soon as it is done."""
    by_key = {user.key: user for user in users}
    for texts in _texts(recipe, users, failed):
        if empty := sum(not text and bool(by_key[key].history) for key, text in texts.items()):
            log.warning("%d profiles are empty although there is a history", empty)
        yield [
            sealed(
                user, recipe["task"]["name"], profile_key(recipe, model, by_key[user], None), recipe["backend"], text
            )
            for user, text in texts.items()
        ]


def _texts(recipe: dict[str, Any], users: Sequence[User], failed: dict[str, str]) -> Iterator[dict[str, str]]:
    """The users' profiles by key, in batches. An empty history has an empty profile, which needs no model."""
    task = tasks()[recipe["task"]["name"]]
    counted: dict[str, str] = {}
    asked = []
    for user in users:
        with noted(failed, user.key):
            if recipe["backend"] == "llm" and user.history:
                asked.append(user)
            else:
                counted[user.key] = extractive(task, user.history)
    yield counted
    if not asked:
        return
    devices.take()
    from oppu.llm_profiles import Writer  # torch and transformers: seconds, so only when a model must write

    writer, prompts = Writer(recipe), {}
    for user in asked:
        with noted(failed, user.key):
            prompts[user.key] = writer.prompt(user)
    yield from writer.answers(prompts)


def _lines(records: Any) -> bytes:
    return "".join(json.dumps(r, sort_keys=True, ensure_ascii=False) + "\n" for r in records).encode()


def _refuse(folder: Path, failed: dict[str, str], count: int) -> None:
    if failed:
        lines = [f"{folder}: user {user}: {why}" for user, why in sorted(failed.items())]
        raise InputError([*lines, f"{len(failed)} of {count} users failed; the others' profiles are kept"])
