"""What stands in LaMP's JSON, value by value: files, texts, dates and history items."""

from __future__ import annotations

import datetime
import gzip
import json
import math
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from oppu.files import digest
from oppu.records import InputError, Item
from oppu.tasks import Task

LONG = 100_000
"""An item of more characters than this is accepted, and counted as long."""
_DATE = re.compile(r"([0-9]{4})(?:-([0-9]{2})(?:-([0-9]{2}))?)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "missing or null"}


def load(path: Path) -> Any:
    """JSON of a file, plain or gzip. InputError says what is wrong and where, without the file's name."""
    text = read_text(path)
    try:
        return json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError([f"is not JSON: {error.msg} at {place}; fetch it again or mend it there"]) from None
    except (ValueError, RecursionError) as error:
        raise InputError([f"is not JSON that can be read: {error}"]) from None


def read_text(path: Path) -> str:
    """Text of a file, plain or gzip. InputError as in `load`."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError([f"its gzip data is cut short or damaged ({error}); fetch it again"]) from None
    except OSError as error:
        raise InputError([f"cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise InputError([f"is not UTF-8 at byte {error.start}; fetch it again"]) from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it has {constant}, which is no JSON number; write text or a finite number")


def kind(value: Any) -> str:
    """A JSON value's kind, in words; never the value."""
    return _KINDS.get(type(value), "a number")


def identifier(value: Any) -> str | None:
    """An id as text (600 and "600" are the same id); None where it is none: empty, not text, not valid Unicode."""
    if type(value) is int:
        return str(value)
    return value if isinstance(value, str) and value and not _SURROGATE.search(value) else None


def is_date(text: str) -> bool:
    """Whether a text is a date that exists: YYYY-MM-DD, YYYY-MM or YYYY."""
    if (match := _DATE.fullmatch(text)) is None:
        return False
    try:
        return bool(datetime.date(*(int(part or 1) for part in match.groups())))
    except ValueError:
        return False


def earliest(date: str) -> str:
    """The first day that a date of any precision can mean; such texts sort as time does."""
    return date + "-01-01"[len(date) - 10 :] if len(date) < 10 else date


class Items:
    """Makes items from JSON, each distinct one once: a user's questions repeat the same history.

    `counts` tells what was mended or is unusual; a distinct item counts once.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.counts: Counter[str] = Counter()
        self._made: dict[tuple, Item] = {}

    def item(self, raw: Any) -> Item | str:
        """The item, or what is wrong with it."""
        if not isinstance(raw, dict):
            return f"is {kind(raw)}, not an object"
        values = (raw.get("id"), raw.get("date"), *(raw.get(name) for name in self.task.history))
        key = (*values, *map(type, values))  # with types, because 1, 1.0 and True are equal
        try:
            if (item := self._made.get(key)) is not None:
                return item
        except TypeError:  # a list or an object among the values: `_make` says which
            key = ()
        made = self._make(raw)
        if isinstance(made, Item):
            self._made[key] = made
        return made

    def _make(self, raw: dict[str, Any]) -> Item | str:
        fields: dict[str, str] = {}
        for name in self.task.history:
            if name not in raw:
                return f"has no '{name}'"
            text = self.text(raw[name])
            if text is None:
                return f"has a '{name}' that is {kind(raw[name])}, not text"
            fields[name] = text
        date = raw.get("date")
        date = str(date) if type(date) is int else date or None
        if date is not None and (not isinstance(date, str) or not is_date(date)):
            shown = repr(date[:20]) if isinstance(date, str) else kind(date)
            return f"has the date {shown}; needed is YYYY-MM-DD, YYYY-MM, YYYY or none"
        id_ = raw.get("id")
        if id_ in (None, ""):
            self.counts["items_without_id"] += 1
            id_ = "sha256-" + digest([date, fields])[:12]
        if (text := identifier(id_)) is None:
            return f"has an 'id' that is {kind(id_)}; needed is text, an integer or none"
        self._count(fields)
        return Item(text, date, fields)

    def _count(self, fields: dict[str, str]) -> None:
        if sum(map(len, fields.values())) > LONG:
            self.counts["long_items"] += 1
        if self.task.y is not None and self.task.labels is not None and fields[self.task.y] not in self.task.labels:
            self.counts["items_with_unknown_label"] += 1

    def text(self, raw: Any) -> str | None:
        """Text as it is, a number as its shortest text (5.0 is '5'), None for anything else.

        A lone surrogate, which no file in UTF-8 can hold, becomes U+FFFD.
        """
        if isinstance(raw, str):
            if raw.isascii() or not _SURROGATE.search(raw):
                return raw
            self.counts["texts_with_lone_surrogates"] += 1
            return _SURROGATE.sub("\ufffd", raw)
        if isinstance(raw, bool) or not isinstance(raw, int | float) or not math.isfinite(raw):
            return None
        self.counts["numbers_as_text"] += 1
        return str(int(raw)) if raw == int(raw) else str(raw)
