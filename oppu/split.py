"""Who is tested and who trains the base model (section 4), and the files that say so.

`split` is pure; `write` keeps the bytes of every file whose content did not change, so that one user's change reaches
that user's cohort only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from oppu import lamp
from oppu.config import Split
from oppu.files import jsonl, sweep, write_if_changed
from oppu.lamp import Question
from oppu.records import InputError, Item, Query, User
from oppu.tasks import Task, fields_of, render
from oppu.tasks import task as task_named

log = logging.getLogger(__name__)

HELDOUT_USERS = 20
"""How many base users are under test when hyperparameters are chosen (`split.heldout_queries`)."""
_KEY = re.compile(r"u-[0-9a-f]{12}")


@dataclass(frozen=True)
class SplitResult:
    """Test users and base users, each by key, and the counts of what was dropped or is unusual."""

    test: list[User]
    base: list[User]
    counts: dict[str, int]


def user_key(user_id: str) -> str:
    """The safe name of a user in paths and files: `u-` and 12 hex digits of the id's sha256."""
    return "u-" + hashlib.sha256(user_id.encode("utf-8")).hexdigest()[:12]


def split(questions: list[Question], task: Task, settings: Split) -> SplitResult:
    """Share the users out.

    Test users are those with the N longest histories (ties by id), or those of the dev files, each with all their
    questions; everyone else trains the base. Excluded users leave after the ranking: nobody moves up into their place,
    so nobody else's result changes. With `heldout_queries`, see `_hold_out`. Raises InputError.
    """
    counts: Counter[str] = Counter()
    ranked, dev = _ranked(questions, task, counts)
    test = (
        [user for user in ranked if user.id in dev] if settings.test_users == "dev" else ranked[: settings.test_users]
    )
    _check_size(len(ranked), len(test), settings)
    excluded, chosen = set(settings.exclude), {user.key for user in test}
    counts["excluded_users"] = sum(user.key in excluded for user in ranked)
    counts["unknown_excluded_keys"] = len(excluded - {user.key for user in ranked})
    test = [user for user in test if user.key not in excluded]
    base = [user for user in ranked if user.key not in chosen | excluded]
    if settings.heldout_queries:
        test, base = _hold_out(base, task, settings.heldout_queries, counts)
    if not test:
        raise InputError([f"{task.name}: no test user is left; lower split.heldout_queries or split.exclude"])
    counts["empty_histories"] = sum(not user.history for user in test)
    by_key = sorted(test, key=lambda user: user.key), sorted(base, key=lambda user: user.key)
    return SplitResult(*by_key, {name: n for name, n in sorted(counts.items()) if n})


def _check_size(users: int, test: int, settings: Split) -> None:
    if settings.test_users == "dev" and not test:
        raise InputError(["split.test_users is 'dev', but no user has a question in the dev files; give a number"])
    if settings.test_users != "dev" and users < settings.test_users:
        raise InputError(
            [f"split.test_users is {settings.test_users}, but only {users} users have questions; lower it to {users}"]
        )


def _ranked(questions: list[Question], task: Task, counts: Counter[str]) -> tuple[list[User], set[str]]:
    """All users, the longest history first, and the ids of those of the dev files."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.user_id, []).append(question)
    counts["users_in_train_and_dev"] = sum(len({q.source for q in own}) > 1 for own in groups.values())
    users = [_user(id_, own, task, counts) for id_, own in groups.items()]
    _check_keys(users)
    users.sort(key=lambda user: (-len(user.history), user.id))
    return users, {q.user_id for q in questions if q.source == "dev"}


def _check_keys(users: list[User]) -> None:
    seen: dict[str, str] = {}
    for user in users:
        if user.key in seen:
            raise InputError([f"users {seen[user.key]!r} and {user.id!r} share the key {user.key}; rename one of them"])
        seen[user.key] = user.id


def _user(id_: str, questions: list[Question], task: Task, counts: Counter[str]) -> User:
    """A user with the history that stands before every one of their questions, less those questions' own items."""
    queries = tuple(Query(q.id, q.input, q.gold) for q in questions)
    history, later = common_history([q.history for q in questions])
    counts["later_items"] += later
    return _without_own(User(user_key(id_), id_, history, queries), task, counts)


def common_history(histories: list[tuple[Item, ...]]) -> tuple[tuple[Item, ...], int]:
    """The items that stand in every one of a user's histories, in the order of the shortest, and how many do not.

    Items are compared by date and fields, as a multiset; by id they are not, since LaMP may number an item anew for
    each question.
    """
    shortest = min(histories, key=len)
    if all(history == shortest for history in histories):
        return shortest, 0
    counted = [Counter(map(_content, history)) for history in histories]
    common, union = counted[0].copy(), counted[0].copy()
    for each in counted[1:]:
        common &= each
        union |= each
    later, kept = union.total() - common.total(), []
    for item in shortest:
        if common[_content(item)] > 0:
            common[_content(item)] -= 1
            kept.append(item)
    return tuple(kept), later


def _content(item: Item) -> tuple[str | None, ...]:
    return (item.date, *item.fields.values())


def _without_own(user: User, task: Task, counts: Counter[str]) -> User:
    """The user without the history items that are one of their own queries, by text with white space folded.

    An item is a query if the fields that it shares with the query's input are equal. An item of a plain task that is
    written out as the answer (LaMP_7: the tweet behind the paraphrase) is one too.
    """
    source = task.x or {name: name for name in fields_of(task.input) if name in task.history}
    own = {tuple(_folded(task.read(q.input)[name]) for name in source) for q in user.queries}
    if not task.pair and task.labels is None and len(source) == 1:
        own |= {(_folded(q.gold),) for q in user.queries if q.gold is not None}
    history = tuple(i for i in user.history if tuple(_folded(i.fields[name]) for name in source.values()) not in own)
    counts["items_of_own_queries"] += len(user.history) - len(history)
    return replace(user, history=history)


def _folded(text: str) -> str:
    return " ".join(text.split())


def _hold_out(base: list[User], task: Task, last: int, counts: Counter[str]) -> tuple[list[User], list[User]]:
    """Users under test made from base users, to choose hyperparameters without touching a test user.

    Of the base users (longest history first), the first HELDOUT_USERS that have at least twice `last` items: their
    own questions are dropped, their last items become the queries. The others stay base users.
    """
    if task.y is None:
        raise InputError(
            [f"split.heldout_queries: {task.name} has plain histories, whose items give no query; set it to 0"]
        )
    chosen = [user for user in base if len(user.history) >= 2 * last][:HELDOUT_USERS]
    keys = {user.key for user in chosen}
    test = [_without_own(_asked(user, task, last, counts), task, counts) for user in chosen]
    return [user for user in test if user.queries], [user for user in base if user.key not in keys]


def _asked(user: User, task: Task, last: int, counts: Counter[str]) -> User:
    """The user with the last items as queries; an item whose answer is no label of the task is no query."""
    queries = []
    for n, item in enumerate(user.history[-last:]):
        gold = item.fields[task.y or ""]
        if task.labels is not None and gold not in task.labels:
            counts["heldout_items_with_unknown_label"] += 1
            continue
        queries.append(Query(f"{user.key}-{n}", render(task.input, task.item_fields(item)), gold))
    return replace(user, history=user.history[:-last], queries=tuple(queries))


def write(result: SplitResult, task: Task, out: Path, mended: str = "-") -> None:
    """Write `users.json` (`out`) last, and beside it histories/{key}.json, base.jsonl and queries.jsonl.

    All content is made before the first byte is written. Files that would not change keep their mtime; histories of
    users who are no longer tested are removed. `mended` is kept in users.json for the workflow; each history's sha256
    is, too, so that users.json changes whenever a history does.
    """
    rows = queries_of(result.test)
    keys = [user.key for user in result.test]
    if bad := [key for key in keys if not _KEY.fullmatch(key)]:
        raise ValueError(f"not a user key: {bad[0]!r}")
    histories = {f"{user.key}.json": _json(user.as_json(golds=False)) for user in result.test}
    base, queries = jsonl(user.as_json(golds=True) for user in result.base), jsonl(rows)
    summary = {"task": task.name, "users": sorted(keys), "base_users": len(result.base), "queries": len(rows)}
    folder = out.parent / "histories"
    sweep(out.parent / "*", folder / "*")
    for name, data in histories.items():
        write_if_changed(folder / name, data)
    for stale in folder.glob("u-*.json"):
        if stale.name not in histories:
            stale.unlink()
    write_if_changed(out.parent / "base.jsonl", base)
    write_if_changed(out.parent / "queries.jsonl", queries)
    files: dict[str, str | None] = {"base.jsonl": None, "queries.jsonl": None}
    files |= {f"histories/{name}": hashlib.sha256(data).hexdigest() for name, data in sorted(histories.items())}
    write_if_changed(out, _json(summary | {"counts": result.counts, "files": files, "mended": mended}))


def queries_of(users: Sequence[User]) -> list[dict[str, str | None]]:
    """The queries of users as queries.jsonl has them: user (key), id, input, gold."""
    return [{"user": user.key, "id": q.id, "input": q.input, "gold": q.gold} for user in users for q in user.queries]


def _json(value: object) -> bytes:
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def run(data: Path, task: str, settings: Split, out: Path, mended: str = "-") -> None:
    """Read LaMP's files of a task, split them, write the files of the split, and log the counts."""
    record = task_named(task)
    questions, counts = lamp.read_counted(data, record)
    result = split(questions, record, settings)
    result = replace(result, counts=dict(sorted((counts | result.counts).items())))
    write(result, record, out, mended)
    if not result.base:
        log.warning("%s: all users are test users; nobody is left to train the base", task)
    shown = "".join(f", {name} {n}" for name, n in result.counts.items())
    log.info("%s: test users %d, base users %d%s", task, len(result.test), len(result.base), shown)
