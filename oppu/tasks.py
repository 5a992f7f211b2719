"""The table of tasks (tasks.yaml): LaMP's seven tasks and others as records, and templates with named fields."""

from __future__ import annotations

import re
import string
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from oppu.records import InputError, Item


def fields_of(template: str) -> list[str]:
    """The named fields of a template, in order; a positional or formatted field is refused."""
    found = [(name, spec, conv) for _, name, spec, conv in string.Formatter().parse(template) if name is not None]
    bad = [name for name, spec, conv in found if not name.isidentifier() or spec or conv]
    if bad:
        raise ValueError(f"template {template!r}: fields must be plain names, found {bad}")
    return [name for name, _, _ in found]


def render(template: str, fields: dict[str, str]) -> str:
    """The template with its fields filled in; a missing and a surplus field are refused.

    Values are inserted as they are: braces in a user's text are never read as fields.
    """
    wanted = set(fields_of(template))
    if missing := wanted - set(fields):
        raise ValueError(f"template {template!r} lacks a value for {sorted(missing)}")
    if surplus := set(fields) - wanted:
        raise ValueError(f"template {template!r} has no place for {sorted(surplus)}")
    return template.format_map(fields)


def _loose(literal: str) -> str:
    """A pattern for a literal with any white space where it has some; none will do beside a sign (`[2]: "`)."""
    pieces = re.split(r"(\s+)", literal)
    for n in range(1, len(pieces), 2):
        letters = pieces[n - 1][-1:].isalnum() and pieces[n + 1][:1].isalnum()
        pieces[n] = r"\s+" if letters else r"\s*"
    return "".join(piece if n % 2 else re.escape(piece) for n, piece in enumerate(pieces))


class Closed(BaseModel):
    """A record in which an unknown key is an error and which nobody changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class PersonalDefaults(Closed):
    """The row of Table 4 for a task."""

    rank: int
    epochs: int
    lr: float
    weight_decay: float
    batch_size: int


class ProfileForm(Closed):
    """How the extractive profile is written: its short form and the history fields it counts."""

    form: str
    most_common: str | None = None
    words: list[str] = []


class Task(Closed):
    """One row of the table of tasks. See the head of tasks.yaml for each field."""

    name: str
    title: str
    kind: Literal["classification", "rating", "generation"]
    input: str
    prompt: str
    item: str
    history: list[str]
    x: dict[str, str] = {}
    y: str | None = None
    labels: list[str] | None
    output_tokens: int
    profile_prompt: str
    profile: ProfileForm
    personal: PersonalDefaults
    retrieval_query: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        problems = []
        if surplus := set(fields_of(self.prompt)) - set(fields_of(self.input)):
            problems.append(f"prompt uses {sorted(surplus)}, which input does not give")
        if surplus := set(fields_of(self.item)) - set(self.history):
            problems.append(f"item uses {sorted(surplus)}, which history does not list")
        if self.y is not None and (set(self.x) != set(fields_of(self.prompt)) or self.y not in self.history):
            problems.append("x must fill every field of prompt and y must be a history field")
        given = set(self.x) if self.pair else set(fields_of(self.input))  # a pair is searched for in training too
        if self.retrieval_query and (surplus := set(fields_of(self.retrieval_query)) - given):
            problems.append(f"retrieval_query uses {sorted(surplus)}, which {'x' if self.pair else 'input'} lacks")
        if problems:
            raise ValueError(f"task {self.name}: " + "; ".join(problems))
        return self

    @property
    def pair(self) -> bool:
        """Whether a history item is (x, y); otherwise it is plain text, learned as such (section 3)."""
        return self.y is not None

    def _pattern(self, exact: bool, shortest: bool) -> re.Pattern[str]:
        """`input` as a pattern. Not exact: white space may differ, and may lack where a word does not need it."""
        pattern = ""
        for literal, name, _, _ in string.Formatter().parse(self.input):
            bare = literal.rstrip()
            pattern += re.escape(bare) if exact else _loose(bare)
            pattern += r"\s*" if bare != literal else ""
            pattern += f"(?P<{name}>.*{'?' * shortest})" if name else ""
        return re.compile(pattern, re.DOTALL)

    @cached_property
    def _readers(self) -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
        return [(self._pattern(exact, True), self._pattern(exact, False)) for exact in (True, False)]

    def _readings(self, text: str) -> list[dict[str, str]]:
        """The readings with the shortest and with the longest first parts: equal if there is one reading only.

        A text that has the very form of `input` is read by it alone: other spacing within it is the user's own.
        """
        for patterns in self._readers:
            matches = [pattern.fullmatch(text.strip()) for pattern in patterns]
            if found := [match.groupdict() for match in matches if match is not None]:
                return found
        raise ValueError(f"input does not have the form {self.input!r}")

    def read(self, text: str) -> dict[str, str]:
        """The named parts of a query's input text, less white space at its ends.

        A separator that a user's own text repeats is read at its first place (see `ambiguous`). Raises ValueError
        where the text does not have the form of `input`.
        """
        return self._readings(text)[0]

    def ambiguous(self, text: str) -> bool:
        """Whether a query's input text can be read in more than one way: a user's text repeats a whole separator."""
        first, last = self._readings(text)
        return first != last

    def query_fields(self, text: str) -> dict[str, str]:
        """The parts of a query's input that the prompt uses."""
        parts = self.read(text)
        return {name: parts[name] for name in fields_of(self.prompt)}

    def item_fields(self, item: Item) -> dict[str, str]:
        """A pair's x, by the names of the prompt's fields."""
        return {name: item.fields[source] for name, source in self.x.items()}

    def item_text(self, item: Item) -> str:
        """A history item as it stands in a prompt and as a BM25 document."""
        return render(self.item, {name: item.fields[name] for name in fields_of(self.item)})

    @property
    def plain_label(self) -> str:
        """What a plain item is introduced by, e.g. `tweet:`."""
        return self.item[: self.item.index("{")].rstrip()


@lru_cache
def tasks(path: str | None = None) -> dict[str, Task]:
    """All records of the table, by name."""
    file = Path(path) if path else Path(__file__).with_name("tasks.yaml")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C: 25 ms less
    rows = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
    return {name: Task(name=name, **row) for name, row in rows.items()}


def task(name: str) -> Task:
    """One record; an unknown name is refused with the names there are."""
    try:
        return tasks()[name]
    except KeyError:
        raise InputError([f"no task {name!r} in oppu/tasks.yaml; there are {', '.join(tasks())}"]) from None
