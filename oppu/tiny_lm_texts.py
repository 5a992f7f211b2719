"""What the tiny language model may read: the corpus and the base users' files, less everything that is held out.

Held out, by normalised text: whatever a dev (test) user of any task wrote, and whatever the validation base users
wrote (hyperparameters are chosen on them later).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oppu.records import Item, Query
from oppu.tasks import task

SAMPLE_TASKS = ("LaMP_2N", "LaMP_4", "LaMP_5")
VALIDATION_USERS = 20
GOLD_WORDS = 3
"""A gold of more words than this is a text somebody wrote (a headline, a title); a shorter one is a label."""


@dataclass(frozen=True)
class Document:
    """One text to learn from; `title` and `category` are empty where they are not known."""

    source: str
    title: str
    text: str
    category: str = ""


@dataclass(frozen=True)
class Author:
    """A user of one LaMP file: LaMP's id, history oldest first, queries with golds."""

    id: str
    history: tuple[Item, ...]
    queries: tuple[Query, ...]


def normalised(text: str) -> str:
    """The text for comparison: casefolded, letters and digits only, whitespace folded."""
    return " ".join(re.sub(r"[\W_]+", " ", text.casefold()).split())


def _json(path: Path) -> Any:
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return json.load(f)


def authors(data: Path, name: str, split: str) -> list[Author]:
    """All users of one task's train or dev file, in the order of their first question."""
    folder = data / "lamp" / name
    golds = {str(g["id"]): str(g["output"]) for g in _json(folder / f"{split}_outputs.json.gz")["golds"]}
    found: dict[str, Author] = {}
    for row in _json(folder / f"{split}_questions.json.gz"):
        user = str(row["user_id"])
        items = (
            Item(str(i.get("id", "")), i.get("date"), {k: str(v) for k, v in i.items() if k not in ("id", "date")})
            for i in row["profile"]
        )
        author = found.get(user) or Author(user, tuple(sorted(items, key=lambda i: i.date or "")), ())
        query = Query(str(row["id"]), str(row["input"]), golds[str(row["id"])])
        found[user] = replace(author, queries=(*author.queries, query))
    return list(found.values())


def validation_authors(data: Path, name: str) -> list[Author]:
    """The base users with the longest histories of a task: kept from the model, for choosing hyperparameters."""
    return sorted(authors(data, name, "train"), key=lambda a: (-len(a.history), a.id))[:VALIDATION_USERS]


def _written(name: str, author: Author) -> Iterable[str]:
    """All texts of a user: what stands in the history, in the queries, and golds that are more than a label."""
    for item in author.history:
        yield from (item.fields[field] for field in ("text", "title", "abstract") if field in item.fields)
    for query in author.queries:
        yield from task(name).query_fields(query.input).values()
        if query.gold and len(query.gold.split()) > GOLD_WORDS:
            yield query.gold


def forbidden_texts(data: Path) -> set[str]:
    """Normalised texts of all dev users and all validation users, of every task of the sample."""
    found: set[str] = set()
    for name in SAMPLE_TASKS:
        for author in [*authors(data, name, "dev"), *validation_authors(data, name)]:
            found.update(map(normalised, _written(name, author)))
    return found - {""}


def is_forbidden(document: Document, forbidden: set[str]) -> bool:
    """Whether the document's title or text is forbidden; it is then dropped whole."""
    return normalised(document.title) in forbidden or normalised(document.text) in forbidden


def corpus_documents(corpus: Path) -> list[Document]:
    """The corpus file's texts, in file order."""
    with gzip.open(corpus, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    return [Document(r["source"], r["title"], r["text"], r.get("category") or "") for r in rows]


def _base_documents(data: Path, name: str) -> Iterable[Document]:
    """What the base users of a task wrote, validation users left out."""
    source = "acl" if name == "LaMP_5" else "news"
    left_out = {a.id for a in validation_authors(data, name)}
    for author in authors(data, name, "train"):
        if author.id in left_out:
            continue
        for item in author.history:
            text = item.fields.get("text") or item.fields.get("abstract", "")
            yield Document(source, item.fields.get("title", ""), text, item.fields.get("category", ""))
        for query in author.queries:
            (text,) = task(name).query_fields(query.input).values()
            label = name == "LaMP_2N"
            yield Document(source, "" if label else query.gold or "", text, query.gold or "" if label else "")


def training_texts(corpus: Path, data: Path) -> list[Document]:
    """Every document that the model and its tokenizer may read, each text once, in a fixed order.

    Copies of one text are joined: the first title and the first category that are known are kept.
    """
    forbidden = forbidden_texts(data)
    candidates = [*corpus_documents(corpus), *(d for name in SAMPLE_TASKS for d in _base_documents(data, name))]
    found: dict[str, Document] = {}
    for document in candidates:
        key = normalised(document.text)
        if not key or is_forbidden(document, forbidden):
            continue
        known = found.get(key, document)
        title, category = known.title or document.title, known.category or document.category
        found[key] = replace(known, title=title, category=category)
    return list(found.values())
