"""What a plan counts: a task's users from the real files, or made up to Table 5's lengths where there are none."""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from oppu import lamp
from oppu.config import Config
from oppu.prompts import Tokenizer
from oppu.records import Item, Query, User
from oppu.shape import model_file
from oppu.split import split, user_key
from oppu.tasks import Task, fields_of, render
from oppu.tasks import task as task_named

TABLE_5 = Path("data/paper/table5.csv")
WORD_TOKENS = 1.35
"""Tokens per whitespace word, where no tokenizer is at hand."""
PAPER_USERS = 100
MADE_UP = 32
"""Users that are made up; they all have Table 5's mean lengths, so a few stand for all."""


class FileTokenizer:
    """A tokenizer.json without transformers, whose import takes seconds."""

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer as Inner

        self._inner = Inner.from_file(str(file))
        self._inner.no_truncation()
        self._inner.no_padding()

    def __call__(self, text: str, **options: Any) -> dict[str, list]:
        """`input_ids` and `offset_mapping`, as of a Hugging Face fast tokenizer."""
        encoded = self._inner.encode(text, add_special_tokens=options.get("add_special_tokens", True))
        return {"input_ids": encoded.ids, "offset_mapping": encoded.offsets}


class Words:
    """Whitespace words in the place of tokens."""

    def __call__(self, text: str, **options: Any) -> dict[str, list]:
        """`input_ids` and `offset_mapping`, one for each word."""
        words = list(re.finditer(r"\S+", text))
        ids = [zlib.crc32(word[0].encode("utf-8", "replace")) for word in words]
        return {"input_ids": ids, "offset_mapping": [word.span() for word in words]}


def tokenizer_of(config: Config) -> tuple[Tokenizer, float, str]:
    """What counts tokens, how many tokens each of its tokens stands for, and its name."""
    file = model_file(config.model.path, config.model.revision, "tokenizer.json")
    if file is None:
        return Words(), WORD_TOKENS, f"words * {WORD_TOKENS}: no tokenizer.json of {config.model.path} here"
    return FileTokenizer(file), 1.0, f"the tokenizer of {config.model.path}"


@dataclass(frozen=True)
class Data:
    """A task's users. Each listed test (base) user stands for `test_times` (`base_times`) of them."""

    test: list[User]
    base: list[User]
    note: str
    test_times: float = 1.0
    base_times: float = 1.0
    queries: float = 0.0
    """Queries of all test users."""


def data_of(config: Config, name: str) -> Data | None:
    """A task's users as `oppu split` will share them out; from Table 5 where the files are not there; else None.

    Raises InputError for files that cannot be used.
    """
    task, folder = task_named(name), Path(config.folder(name))
    if not any((folder / name).glob("*_questions.json*")):
        return _by_table_5(config, task)
    result = split(lamp.read(folder, task), task, config.split)
    queries = sum(len(user.queries) for user in result.test)
    return Data(result.test, result.base, f"files in {folder / name}", queries=queries)


def _by_table_5(config: Config, task: Task) -> Data | None:
    rows = pl.read_csv(TABLE_5).rows_by_key("task", named=True, unique=True) if TABLE_5.exists() else {}
    if (row := rows.get(task.name)) is None:
        return None
    wanted = config.split.test_users
    users = wanted if isinstance(wanted, int) else PAPER_USERS
    queries = row["personal_queries"] / PAPER_USERS * users
    items = round(row["personal_history"])
    test = [_made_up(task, f"test {n}", row, "personal", items, round(queries / users)) for n in range(MADE_UP // 2)]
    base = [_made_up(task, f"base {n}", row, "base", 8, 1) for n in range(MADE_UP)]
    return Data(
        test,
        base,
        f"NO FILES in {Path(config.folder(task.name)) / task.name}, so Table 5's counts and mean lengths",
        test_times=users / len(test),
        base_times=row["base_queries"] / MADE_UP,
        queries=queries,
    )


def _made_up(task: Task, id_: str, row: dict[str, Any], part: str, items: int, queries: int) -> User:
    """A user whose texts have a row's mean numbers of words. LaMP counts the instruction to the input; items have none.

    A plain item's text has no length of its own in the table: it gets the input's, and so does a history's x.
    """
    draw = random.Random(f"{task.name} {id_}")

    def words(count: float) -> str:
        return " ".join(f"w{draw.randrange(5000)}" for _ in range(max(round(count), 1)))

    parts = fields_of(task.input)
    bare = len(render(task.input, dict.fromkeys(parts, "")).split())
    text, answer = max(row[f"{part}_in_tokens"] - bare, 1), row[f"{part}_out_tokens"]
    xs = [name for name in task.history if name != task.y]
    history = [
        {name: words(text / len(xs)) for name in xs} | ({task.y: words(answer)} if task.y else {}) for _ in range(items)
    ]
    asked = [render(task.input, {name: words(text / len(parts)) for name in parts}) for _ in range(max(queries, 1))]
    return User(
        user_key(id_),
        id_,
        tuple(Item(str(n), None, fields) for n, fields in enumerate(history)),
        tuple(Query(str(n), text, words(answer)) for n, text in enumerate(asked)),
    )


def spread(users: Sequence[User], size: Callable[[User], int], limit: int) -> list[User]:
    """Evenly spread users with about `limit` examples together, one at least; all where they have no more."""
    every = max(-(-sum(map(size, users)) // limit), 1)
    return list(users[::every])
