"""The records that everything else speaks of. Frozen: loaded data is never changed in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class InputError(ValueError):
    """Bad input, refused whole. Each problem names the file, the record, what was found and the fix."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        super().__init__("\n".join(shown))


@dataclass(frozen=True)
class Item:
    """One past item of a user: h_u in section 2.1.

    `fields` holds the task's history fields by LaMP's names, all text (`{"text": …, "category": …}`).
    `date` is LaMP's own text, or None where the file has none.
    """

    id: str
    date: str | None
    fields: dict[str, str]


@dataclass(frozen=True)
class Query:
    """What must be answered for a user: q_u. `input` is LaMP's own text; `gold` is None where it is not known."""

    id: str
    input: str
    gold: str | None = None


@dataclass(frozen=True)
class User:
    """A user: safe key `u-<12 hex>`, LaMP's own id, history oldest first, queries in file order."""

    key: str
    id: str
    history: tuple[Item, ...]
    queries: tuple[Query, ...]

    def as_json(self, golds: bool) -> dict[str, Any]:
        """Plain JSON values; without golds for whoever only predicts."""
        queries: list[dict[str, Any]] = [{"id": q.id, "input": q.input} for q in self.queries]
        if golds:
            queries = [q | {"gold": full.gold} for q, full in zip(queries, self.queries, strict=True)]
        items = [{"id": i.id, "date": i.date, "fields": i.fields} for i in self.history]
        return {"key": self.key, "id": self.id, "history": items, "queries": queries}

    @staticmethod
    def from_json(data: dict[str, Any]) -> User:
        """The inverse of `as_json`."""
        return User(
            key=data["key"],
            id=data["id"],
            history=tuple(Item(i["id"], i["date"], i["fields"]) for i in data["history"]),
            queries=tuple(Query(q["id"], q["input"], q.get("gold")) for q in data["queries"]),
        )
