"""Where a user's adapter begins and which items it learns next (`personal.start`; beyond the paper).

With `previous`, items that were added at the end of a history are learned by the adapter that is there already: it goes
on, with a new optimiser and a new schedule, on the new items and a sample of old ones. What it then is depends on its
chain of trainings, so the chain is in its key and, as `trained_on`, in cell.json. Whatever else changes (an old item, a
setting, the profile in the prompts, the base) changes what the old items teach: then all is trained anew.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from oppu.files import digest
from oppu.records import User
from oppu.seeds import seed_of

Link = dict[str, Any]
"""One training: {start, items (of the history, learned so far), history (their digest), replayed (old items again)}."""
KeyOf = Callable[[User], str]
"""The key of an adapter trained from its initial parameters on a user's history."""


@dataclass(frozen=True)
class Lesson:
    """A training that an adapter needs, or, where it is fresh, had."""

    key: str
    links: list[Link]
    items: tuple[int, ...]
    """Places in the history of the items to learn from, oldest first."""
    warm: bool = False
    """Whether it begins at the adapter that is there."""

    @property
    def after(self) -> int:
        """How many items had been learned before."""
        return int(self.links[-2]["items"]) if self.warm else 0


def anew(recipe: dict[str, Any], user: User, key_of: KeyOf, lent: str | None = None) -> Lesson:
    """All of a history (`max_items` of it), from the initial parameters or, by digest, from the pooled adapter."""
    count = len(user.history)
    key = key_of(user) if lent is None else digest({"start": lent, "adapter": key_of(user)})
    start = "initial" if lent is None else f"pooled {lent}"
    return Lesson(key, [_link(user, start, 0)], _newest(recipe, 0, count))


def lesson_of(recipe: dict[str, Any], user: User, key_of: KeyOf, trained_on: list[Link], known: str | None) -> Lesson:
    """What a user's adapter has learned or has still to learn, where it may go on from the previous one.

    `trained_on` and `known` are the recorded chain and key of the whole adapter that is there; None: there is none.
    """
    places = [link["items"] for link in trained_on]
    count = len(user.history)
    rising = all(a < b for a, b in itertools.pairwise(places))
    if not places or not rising or places[-1] > count or _chain(recipe, user, key_of, places) != known:
        return anew(recipe, user, key_of)
    if places[-1] == count:
        return Lesson(str(known), trained_on, ())
    new = _newest(recipe, places[-1], count)
    old = _replayed(recipe, user, places[-1], len(new))
    key = _chain(recipe, user, key_of, [*places, count])
    return Lesson(key, [*trained_on, _link(user, "previous", len(old))], old + new, warm=True)


def _chain(recipe: dict[str, Any], user: User, key_of: KeyOf, places: list[int]) -> str:
    """Key of an adapter trained on the history up to places[0], then on what follows up to places[1], and so on."""
    key = key_of(_until(user, places[0]))
    settings = key_of(_until(user, 0))
    for first, last in itertools.pairwise(places):
        new = _until(user, last).as_json(golds=False)["history"][first:]
        key = digest({"previous": key, "new": new, "settings": settings, "replay": recipe["start"]["replay"]})
    return key


def _until(user: User, count: int) -> User:
    return replace(user, history=user.history[:count])


def _link(user: User, start: str, replayed: int) -> Link:
    history = digest(user.as_json(golds=False)["history"])
    return {"start": start, "items": len(user.history), "history": history, "replayed": replayed}


def _newest(recipe: dict[str, Any], first: int, count: int) -> tuple[int, ...]:
    limit = recipe["training"]["max_items"] or count
    return tuple(range(max(first, count - limit), count))


def _replayed(recipe: dict[str, Any], user: User, old: int, new: int) -> tuple[int, ...]:
    """A sample of the user's own old items: `replay` times as many as there are new ones, rounded up."""
    draw = random.Random(seed_of(recipe["seed"], recipe["task"]["name"], user.key, f"replay after {old} items"))
    return tuple(sorted(draw.sample(range(old), min(old, math.ceil(recipe["start"]["replay"] * new)))))
