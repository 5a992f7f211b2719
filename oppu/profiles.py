"""Textual profiles s_u of a user's history (section 2.2, appendix J): their records, and the form that needs no model.

A profile is read from its record by the user's key, never by position. oppu/profile_records.py makes the records;
what they hold is counted here (`extractive`), written by a model (oppu/llm_profiles.py), or the user's own text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oppu.files import digest, read_json
from oppu.records import InputError, Item, User
from oppu.setting import parse_augmentation

if TYPE_CHECKING:
    from oppu.tasks import Task

NONE = "none"
OFTEN = 0.3
WORDS = 8

# Light on purpose: scikit-learn's list costs a second of imports where profiles are needed to compute keys.
_STOP_WORDS = """
a about above after again all also always am among an and another any are as at back be because been before
being below between both but by can cannot could did do does doing don't down during each else ever every few for
from further get gets getting give given got had has have having he her here hers herself him himself his how i if
in into is isn't it it's its itself just let let's like made make makes many may me might more most much must my
myself need no nor not now of off often on once one only or other our ours out over own per really same say says
she should since so some still such take than that that's the their theirs them themselves then there these they
thing things this those though through to too under until up upon us use used using very via was way we well were
what when where whether which while who whom whose why will with within without won't would yet you you're your
yours yourself"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_NOT_WORDS = re.compile(r"https?://\S+|@\w+")

SIGNS: dict[str, Callable[[str], bool]] = {
    "often with a colon": lambda text: ":" in text,
    "often a question": lambda text: "?" in text,
    "often exclaiming": lambda text: "!" in text,
    "often with numbers": lambda text: any(c.isdigit() for c in text),
    "often with hashtags": lambda text: re.search(r"#\w", text) is not None,
}


def sealed(user: str, task: str, key: str, source: str, text: str) -> dict[str, Any]:
    """The record of a profile; `source` is extractive, llm or own. Its sha256 tells a record that was edited later."""
    record = {"user": user, "task": task, "key": key, "source": source, "text": text}
    return record | {"sha256": digest(record)}


def whole(record: Any) -> bool:
    """Whether a record is as it was written."""
    try:
        known = sealed(*(record[name] for name in ("user", "task", "key", "source", "text")))
        return bool(known["sha256"] == record["sha256"])
    except (KeyError, TypeError):
        return False


def profile_of(recipe: dict[str, Any], user: User, profiles: Path | None) -> str | None:
    """A test user's profile where the prompts of a base or a cell carry one, from {profiles}/users/{key}.json.

    Raises InputError where the record is missing, changed, or of another user or task.
    """
    if not parse_augmentation(recipe["augmentation"]).profile:
        return None
    path = _folder(recipe, profiles) / "users" / f"{user.key}.json"
    try:
        record = read_json(path)
    except FileNotFoundError:
        raise InputError([f"{path}: no profile of {user.key}; `snakemake --cores all` makes it"]) from None
    except ValueError:
        record = None
    return _text(record, recipe["task"]["name"], user.key, f"{path}", "profiles")


def base_profiles_of(recipe: dict[str, Any], profiles: Path | None) -> dict[str, str] | None:
    """The base users' profiles by user key, where a base's prompts carry them, from {profiles}/base.jsonl.

    Raises InputError for a missing file, and for the first record that was changed or is another task's.
    """
    if not parse_augmentation(recipe["augmentation"]).profile:
        return None
    path = _folder(recipe, profiles) / "base.jsonl"
    if not path.is_file():
        raise InputError([f"{path}: no profiles of base users; `snakemake --cores all` makes them"])
    texts = {}
    for number, line in enumerate(read_lines(path), start=1):
        user = str(line["user"]) if whole(line) else ""
        texts[user] = _text(line, recipe["task"]["name"], user, f"{path}: line {number}", "base_profiles")
    return texts


def read_lines(path: Path) -> list[Any]:
    """The records of a .jsonl file; None for a line that is no JSON."""
    return [_json(line) for line in path.read_bytes().split(b"\n") if line] if path.is_file() else []


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _folder(recipe: dict[str, Any], profiles: Path | None) -> Path:
    if profiles is None:
        raise InputError([f"{recipe['augmentation']} needs profiles; give --profiles results/{{task}}/profiles"])
    return profiles


def _text(record: Any, task: str, user: str, where: str, rule: str) -> str:
    if not whole(record):
        fix = f"`snakemake --cores all -R {rule}` mends it; your own text goes into profiles.own (config/README.md)"
        raise InputError([f"{where}: the profile was changed by hand or cut; {fix}"])
    if (record["user"], record["task"]) != (user, task):
        raise InputError([f"{where}: is of {record['user']} in {record['task']}, not of {user} in {task}; delete it"])
    return str(record["text"])


def extractive(task: Task, history: Sequence[Item], /) -> str:
    """The profile that counting gives: `task.profile.form` filled in. Deterministic; an empty history gives ''.

    The form may use `most_common` (of `profile.most_common`; among equals the value used last),
    `most_common_positive` and `most_common_negative` (the same over scores of at least 4 and at most 2), and of the
    texts in `profile.words`: `length` (mean number of whitespace words), `shape` (how most are capitalised, and what
    over 30 % of them carry), `words` (the eight words that most items use; 'none' where nothing can be said).
    """
    from oppu.tasks import fields_of, render  # pydantic and a table: not where a record is only read

    if not history:
        return ""
    return render(task.profile.form, {name: _FIELDS[name](task, history) for name in fields_of(task.profile.form)})


def commonest(values: Sequence[str]) -> str | None:
    """The commonest value, among equals the one that stands last; None of nothing."""
    counts = Counter(values)
    last = {value: place for place, value in enumerate(values)}
    return max(counts, key=lambda value: (counts[value], last[value]), default=None)


def _values(task: Task, history: Sequence[Item]) -> list[str]:
    name = task.profile.most_common
    if name is None:
        raise ValueError(f"{task.name}: the profile's form counts values, so profile.most_common must name a field")
    return [value for item in history if (value := item.fields[name].strip())]


def _score(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _commonest_score(task: Task, history: Sequence[Item], wanted: Callable[[float], bool]) -> str:
    scores = [(value, _score(value)) for value in _values(task, history)]
    return commonest([value for value, score in scores if score is not None and wanted(score)]) or NONE


def _texts(task: Task, history: Sequence[Item]) -> list[str]:
    import html

    texts = [" ".join(item.fields[name] for name in task.profile.words).strip() for item in history]
    return [html.unescape(text).replace("’", "'") for text in texts if text]


def _length(task: Task, history: Sequence[Item]) -> str:
    lengths = [len(text.split()) for text in _texts(task, history)]
    return str((2 * sum(lengths) + len(lengths)) // (2 * len(lengths))) if lengths else "0"


def _case(text: str) -> str:
    words = _WORD.findall(text)
    if not words:
        return "no words"
    if text.isupper():
        return "UPPER CASE"
    if text == text.lower():
        return "lower case"
    long = [word for word in words if len(word) > 3]
    if len(long) > 1 and 4 * sum(word[0].isupper() for word in long) >= 3 * len(long):
        return "Title Case"
    return "Sentence case" if words[0][0].isupper() else "mixed case"


def _shape(task: Task, history: Sequence[Item]) -> str:
    texts = _texts(task, history)
    case = commonest([_case(text) for text in texts]) or NONE
    bare = [_NOT_WORDS.sub(" ", text) for text in texts]
    signs = [name for name, has in SIGNS.items() if sum(map(has, bare)) > OFTEN * len(bare)]
    return ", ".join([case, *signs])


def _content_words(text: str) -> list[str]:
    words = _WORD.findall(_NOT_WORDS.sub(" ", text).lower())
    words = [word.removesuffix("'s") for word in words]
    return [word for word in dict.fromkeys(words) if len(word) > 2 and word not in STOP_WORDS]


def _words(task: Task, history: Sequence[Item]) -> str:
    counts = Counter(word for text in _texts(task, history) for word in _content_words(text))
    repeated = Counter({word: n for word, n in counts.items() if n > 1}) or counts
    return ", ".join(word for word, _ in repeated.most_common(WORDS)) or NONE


_FIELDS: dict[str, Callable[[Task, Sequence[Item]], str]] = {
    "most_common": lambda task, history: commonest(_values(task, history)) or NONE,
    "most_common_positive": lambda task, history: _commonest_score(task, history, lambda score: score >= 4),
    "most_common_negative": lambda task, history: _commonest_score(task, history, lambda score: score <= 2),
    "length": _length,
    "shape": _shape,
    "words": _words,
}
