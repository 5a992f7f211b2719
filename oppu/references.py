"""Reference lines without a language model: what counting, copying and a bag of words reach on the same queries.

They stand beside the results (results/tables/references.csv), since labels are skewed enough for a constant answer to
look good. Which of them a task has follows from its record: closed labels or free text, pairs or plain items.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from oppu.files import jsonl, read_base, read_jsonl, read_user, sweep, write_bytes
from oppu.profiles import commonest
from oppu.records import Item, Query, User
from oppu.retrieval import Index, query_text
from oppu.scores import score_texts
from oppu.tasks import Task, fields_of
from oppu.tasks import task as task_named

Predictions = dict[tuple[str, str], str]
"""Answers by (user key, query id)."""
Answer = Callable[[User, Query], str]

MOST_TEXTS = 20_000
"""The bag of words learns from at most this many texts, evenly spaced over the base's data."""
PRIOR_STRENGTH = 1.0
"""Weight of the base's label shares in a user's, in items: the alpha of `_bag_of_words`."""


def run(out: Path, task: str, base_users: Path, queries: Path, histories: Sequence[Path]) -> None:
    """Predict every query without any model, and score it; rows as in scored.jsonl, with the field `reference`."""
    record, asked = task_named(task), read_jsonl(queries)
    found = references(record, [read_user(path) for path in histories], read_base(base_users))
    scored = {name: score_texts(record, asked, texts).scored for name, texts in found.items()}
    sweep(out)
    write_bytes(out, jsonl(row | {"reference": name} for name, rows in scored.items() for row in rows))


def references(task: Task, test: Sequence[User], base: Sequence[User]) -> dict[str, Predictions]:
    """The answers of every reference that the task allows, by name (DESIGN section 6), for all test users' queries.

    The base's data are its users' queries with gold and, for pairs, their histories; of a test user only the history
    is used, and never a gold. Without a base (or a history) the references fall back: see each below.

    - global-majority: the base's commonest label (among equals the first of `labels`). Closed labels.
    - user-majority: the history's commonest answer (among equals the later one), else the global majority.
    - last-label: the last item's answer; a plain item's own text; else the global majority.
    - copy-bm25: the answer of the item that BM25 finds first (phi_t as the query), likewise.
    - bag-of-words, bag-of-words-user-prior: see `_bag_of_words`; where the labels choose among texts in the prompt
      (LaMP_1) the choice is the text nearest to the history, see `_nearest_option`, and there is no prior.
    - lead: the first words of x, as many as the base's answers have in the mean. Free text.
    """
    answers = _closed(task, base) if task.labels else _free(task, base)
    return {
        name: {(user.key, query.id): answer(user, query) for user in test for query in user.queries}
        for name, answer in answers.items()
    }


def _closed(task: Task, base: Sequence[User]) -> dict[str, Answer]:
    labels = task.labels or []
    counts = Counter(y for _, y in _base_data(task, base))
    majority = max(labels, key=lambda label: counts[label])
    answers: dict[str, Answer] = {"global-majority": lambda user, query: majority}
    if task.pair:
        answers["user-majority"] = lambda user, query: commonest(_answers(task, user.history)) or majority
        answers |= _from_history(task, majority) | _bag_of_words(task, base, majority)
    elif options := _options(task):
        chosen = _nearest_option(task, options)
        answers["bag-of-words"] = lambda user, query: chosen(user, query) or majority
    return answers


def _free(task: Task, base: Sequence[User]) -> dict[str, Answer]:
    lengths = [len(y.split()) for _, y in _base_data(task, base)]
    words = max(round(float(np.mean(lengths))), 1) if lengths else None
    lead: Answer = lambda user, query: " ".join(_x_of_query(task, query).split()[:words])  # noqa: E731
    return _from_history(task, "") | {"lead": lead}


def _from_history(task: Task, otherwise: str) -> dict[str, Answer]:
    indices: dict[str, Index] = {}

    def nearest(user: User, query: Query) -> str:
        if user.key not in indices:
            indices[user.key] = Index([task.item_text(item) for item in user.history])
        found = indices[user.key].top_k(query_text(task, query), 1)
        return _answer(task, user.history[found[0]]) if found else otherwise

    return {
        "last-label": lambda user, query: _answer(task, user.history[-1]) if user.history else otherwise,
        "copy-bm25": nearest,
    }


def _answer(task: Task, item: Item) -> str:
    """An item's answer; of a plain item its text without the label that introduces it."""
    if task.y is not None:
        return item.fields[task.y].strip()
    return task.item_text(item)[len(task.plain_label) :].strip()


def _answers(task: Task, history: Sequence[Item]) -> list[str]:
    return [_answer(task, item) for item in history]


def _x_of_query(task: Task, query: Query) -> str:
    return " ".join(task.query_fields(query.input).values())


def _base_data(task: Task, base: Sequence[User]) -> Iterator[tuple[str, str]]:
    """(x, y) of the base users' queries and, for pairs, of their histories; plain histories have no y."""
    for user in base:
        for item in user.history if task.pair else ():
            yield " ".join(task.item_fields(item).values()), _answer(task, item)
        for query in user.queries:
            if query.gold is not None:
                yield _x_of_query(task, query), query.gold.strip()


def _bag_of_words(task: Task, base: Sequence[User], majority: str) -> dict[str, Answer]:
    """TF-IDF (words, 1 + log tf, l2) and multinomial logistic regression (C = 10) on the base's x and y.

    With the user's prior the class probabilities p(c | x) become p(c | x) * s_u(c) / s(c), where s(c) is the label's
    share of the base's data and s_u(c) = (n_u(c) + alpha * s(c)) / (n_u + alpha), alpha = `PRIOR_STRENGTH`, its share
    of the user's history smoothed towards s. With fewer than two labels or no word at all: the global majority.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    pairs = [(x, y) for x, y in _base_data(task, base) if y in (task.labels or [])]
    pairs = pairs[:: -(-len(pairs) // MOST_TEXTS) or 1]
    if len({y for _, y in pairs}) < 2 or not any(re.search(r"\b\w\w", x) for x, _ in pairs):
        constant: Answer = lambda user, query: majority  # noqa: E731
        return {"bag-of-words": constant, "bag-of-words-user-prior": constant}
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=1000)
    model.fit(vectorizer.fit_transform([x for x, _ in pairs]), [y for _, y in pairs])
    classes = [str(label) for label in model.classes_]
    share = _shares(classes, [y for _, y in pairs])

    def probabilities(query: Query) -> np.ndarray:
        return model.predict_proba(vectorizer.transform([_x_of_query(task, query)]))[0]

    def with_prior(user: User, query: Query) -> str:
        own = Counter(_answers(task, user.history))
        counts = np.array([own[label] for label in classes])
        smoothed = (counts + PRIOR_STRENGTH * share) / (counts.sum() + PRIOR_STRENGTH)
        return classes[int(np.argmax(probabilities(query) * smoothed / share))]

    return {
        "bag-of-words": lambda user, query: classes[int(np.argmax(probabilities(query)))],
        "bag-of-words-user-prior": with_prior,
    }


def _shares(classes: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    counts = Counter(labels)
    return np.array([counts[label] for label in classes]) / len(labels)


def _options(task: Task) -> dict[str, str]:
    """For labels that stand in the prompt, each before a text of its own: label -> field (`[1]` -> option1)."""
    options = {}
    for label in task.labels or ():
        _, found, rest = task.prompt.rpartition(label)
        if found and (fields := fields_of(rest)):
            options[label] = fields[0]
    return options if len(set(options.values())) == len(task.labels or ()) else {}


def _nearest_option(task: Task, options: Mapping[str, str]) -> Callable[[User, Query], str | None]:
    """The label whose text has the largest mean TF-IDF cosine to the user's items; None for a tie or no word."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    kept: dict[str, tuple[TfidfVectorizer, np.ndarray] | None] = {}

    def learned(user: User) -> tuple[TfidfVectorizer, np.ndarray] | None:
        history = [" ".join(item.fields[name] for name in task.history) for item in user.history]
        if not any(re.search(r"\b\w\w", text) for text in history):
            return None
        vectorizer = TfidfVectorizer(sublinear_tf=True)
        return vectorizer, np.asarray(vectorizer.fit_transform(history).mean(axis=0)).ravel()

    def nearest(user: User, query: Query) -> str | None:
        if user.key not in kept:
            kept[user.key] = learned(user)
        if (found := kept[user.key]) is None:
            return None
        parts, (vectorizer, mean) = task.query_fields(query.input), found
        cosines = vectorizer.transform([parts[field] for field in options.values()]) @ mean
        winners = np.flatnonzero(cosines == cosines.max())
        return list(options)[winners[0]] if len(winners) == 1 else None

    return nearest
