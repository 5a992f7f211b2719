"""Settings of a task as per-user sums over the same users and queries: what every table and test is computed on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from oppu.metrics import totals, user_values
from oppu.records import InputError
from oppu.significance import Difference, Estimate, Floats, differences, draws, estimates, resampled, swaps
from oppu.tasks import Task

Rows = Sequence[Mapping[str, Any]]
References = Mapping[str, Mapping[str, Rows]]
"""Task name -> reference name -> its scored answers, as of a setting."""


@dataclass(frozen=True)
class Setting:
    """One scored setting of a task; `scored` is what `scores.score` gives (scored.jsonl).

    `repeat` is the number of its training seed, 0 for the first, whose numbers the tables show.
    """

    task: Task
    augmentation: str
    peft: str
    history: str
    scored: Rows
    repeat: int = 0

    def __str__(self) -> str:
        seed = f"-s{self.repeat}" if self.repeat else ""
        return f"{self.task.name}/{self.augmentation}{seed}/{self.peft}/{self.history}"


@dataclass(frozen=True)
class UserSums:
    """Per-user sums of query statistics: users sorted by key, sums [U, S]."""

    users: list[str]
    sums: Floats


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn and differences tested: config.bootstrap, config.seed, config.significance."""

    resamples: int = 2000
    seed: int = 0
    test: Literal["bootstrap", "permutation"] = "bootstrap"


@dataclass(frozen=True)
class Board:
    """All settings and references of one task; `weights` and `swapped` are shared, so every difference is paired."""

    task: Task
    users: list[str]
    settings: dict[tuple[str, str, str], UserSums]
    references: dict[str, UserSums]
    weights: Any
    swapped: Any
    kept: dict[int, tuple[UserSums, dict[str, Floats]]] = field(default_factory=dict)

    def counterpart(self, augmentation: str, history: str) -> UserSums | None:
        """The same setting without a personal adapter. Without retrieval the prompt holds no history, so k0 has one
        counterpart for every history variant."""
        same = self.settings.get((augmentation, "none", history))
        return same or (self.settings.get(("k0", "none", "full")) if augmentation == "k0" else None)

    def estimates(self, own: UserSums) -> dict[str, Estimate]:
        """Each metric of one of the board's sums, with its interval."""
        return estimates(self.task, own.sums, self._drawn(own))

    def user_means(self, own: UserSums) -> dict[str, float]:
        """Each metric as the mean of the users' own values."""
        return {name: float(of_users.mean()) for name, of_users in user_values(self.task, own.sums).items()}

    def differences(self, own: UserSums, other: UserSums) -> dict[str, Difference]:
        """Each metric of one minus the other, paired over users and tested."""
        return differences(self.task, own.sums, other.sums, self._drawn(own), self._drawn(other), self.swapped)

    def _drawn(self, own: UserSums) -> dict[str, Floats]:
        """Each metric of one of the board's sums in each resample; kept, since every difference to it needs them."""
        if id(own) not in self.kept:
            self.kept[id(own)] = own, resampled(self.task, own.sums, self.weights)
        return self.kept[id(own)][1]

    def only(self, chosen: set[str], how: Bootstrap) -> Board:
        """The board of some of its users."""
        keep = np.array([user in chosen for user in self.users])
        users = [user for user in self.users if user in chosen]

        def cut(whole: UserSums) -> UserSums:
            return UserSums(users, whole.sums[keep])

        return Board(
            self.task,
            users,
            {key: cut(sums) for key, sums in self.settings.items()},
            {name: cut(sums) for name, sums in self.references.items()},
            *_resamples(self.task, len(users), how),
        )


def boards(settings: Sequence[Setting], references: References, how: Bootstrap) -> list[Board]:
    """One board per task, in the order of the settings.

    InputError where settings or references of a task differ in their queries.
    """
    by_task: dict[str, list[Setting]] = {}
    for setting in settings:
        by_task.setdefault(setting.task.name, []).append(setting)
    problems = [problem for name, group in by_task.items() for problem in _unpaired(group, references.get(name, {}))]
    if problems:
        raise InputError(problems)
    return [_board(group, references.get(name, {}), how) for name, group in by_task.items()]


def user_sums(task: Task, scored: Rows) -> UserSums:
    """Per-user sums of scored rows, on which metrics, intervals and differences are computed."""
    of_user: dict[str, list[Mapping[str, Any]]] = {}
    for row in scored:
        of_user.setdefault(row["user"], []).append(row)
    users = sorted(of_user)
    return UserSums(users, np.array([totals(task, of_user[user]) for user in users]))


def _board(group: list[Setting], references: Mapping[str, Rows], how: Bootstrap) -> Board:
    task = group[0].task
    settings = {(s.augmentation, s.peft, s.history): user_sums(task, s.scored) for s in group}
    lines = {name: user_sums(task, scored) for name, scored in references.items()}
    users = next(iter(settings.values())).users
    return Board(task, users, settings, lines, *_resamples(task, len(users), how))


def _resamples(task: Task, users: int, how: Bootstrap) -> tuple[Any, Any]:
    weights = draws(task, users, how.resamples, how.seed)
    return weights, swaps(task, users, how.resamples, how.seed) if how.test == "permutation" else None


def _unpaired(group: list[Setting], references: Mapping[str, Rows]) -> list[str]:
    def queries(scored: Rows) -> set[tuple[str, ...]]:
        return {(row["user"], row["id"], row["gold"]) for row in scored}

    first, problems = queries(group[0].scored), []
    named = [(str(setting), setting.scored) for setting in group]
    problems += [f"{name}: given twice" for name, count in Counter(name for name, _ in named).items() if count > 1]
    for name, scored in [*named, *((f"{group[0].task.name}/{name}", scored) for name, scored in references.items())]:
        if odd := first ^ queries(scored):
            user, query, _ = min(odd)
            problems.append(
                f"{name}: {len(odd)} queries differ from those of {group[0]}, first user {user}, query {query};"
                " score both on the same users.json"
            )
    return problems
