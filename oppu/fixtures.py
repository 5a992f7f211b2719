"""Made-up users with known preferences, in LaMP's format: data for the tasks that the sample does not serve.

Every text is about one of five topics, and every user answers each topic in a way of their own (a tag, a score, a
closing phrase, a liked subject): the common way for some topics, another for the others. So the right answer is known,
it depends on the text *and* on the user, and what can be reached without knowing the user can be computed (`ceilings`).

- LaMP_2M, LaMP_3: a description (review) is words of its topic among others; the user has a tag (score) per topic.
- LaMP_7: a tweet is such a text and the closing phrase that the user puts under the topic; the query is the bare text.
- LaMP_1: a topic is a couple of subjects, of which the user likes one and cites it. A query has an option of each, [1]
  and [2] as often. Its history is plain (title, abstract), learned as text, from which a tiny model learns nothing of
  choosing. So the abstract is the task's own prompt with its answer, and a subject has one phrase as [1] and another as
  [2], or the tiny model would not find which option is which. Genuine abstracts give no such aids: these fixtures test
  the machinery, not whether prose teaches a choice.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oppu.files import sweep, write_if_changed
from oppu.metrics import measure
from oppu.records import InputError, Item, Query
from oppu.retrieval import Index, query_text
from oppu.seeds import seed_text
from oppu.tasks import Task, render
from oppu.tasks import task as task_named

SUBJECTS = (
    "police prison lawyer attorney arrest guilty gun judge",
    "school students teacher class education degree book math",
    "hospital drug patient disease health treatment mental care",
    "money market price trade business company fund financial",
    "team game players goal match sports competition skill",
    "president election voters vote senator lawmakers secretary campaign",
    "movie film video star stage scene comedy character",
    "children parents marriage father daughter husband girls woman",
    "city streets bridge wind fire land trees water",
    "software computer phone internet machine robot digital online",
)
FILLERS = "one two day long year small first time last week big young find way about many good world next part"
TAGS = ("comedy", "fantasy", "romance", "violence", "psychology")
CLOSINGS = (
    "never look back just keep going forward",
    "huge thanks honor your heart every morning",
    "come together people here right now again",
    "nothing else really makes any sense today",
    "we must wait until their story ends",
)
TOPICS = 5


@dataclass(frozen=True)
class Sizes:
    """How many users of the train files (base) and of the dev files (test), and what each of them has."""

    test_users: int = 10
    base_users: int = 30
    items: int = 50
    queries: int = 8
    base_items: int = 12
    base_queries: int = 32

    def __post_init__(self) -> None:
        if (
            not self.items > self.base_items >= 0
            or min(self.test_users, self.base_users, self.queries, self.base_queries) < 1
        ):
            raise InputError(["fixtures: test users need more items than base users, and everyone a query"])


@dataclass(frozen=True)
class Made:
    """One text in both uses: as a history item, and as a query with its answer under each value of the topic."""

    topic: int
    item: dict[str, str]
    asked: dict[str, str]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Person:
    """A made-up user: the value they give to each topic (a number in `Made.answers`), history and queries."""

    id: str
    values: tuple[int, ...]
    history: tuple[Made, ...]
    queries: tuple[Made, ...]

    def gold(self, query: Made) -> str:
        """The only right answer of this user."""
        return query.answers[self.values[query.topic]]


@dataclass(frozen=True)
class Form:
    """How a task's texts are made, the population's value of each topic, and how many of them a test user changes.

    Every `every`-th base user changes two: where all do, a base has reason to look at what was retrieved.
    """

    make: Callable[[random.Random, int, int], Made]
    values: int
    common: tuple[int, ...]
    own: int
    every: int = 2


def _text(draw: random.Random, subject: int, words: int, fillers: int) -> str:
    chosen = draw.sample(SUBJECTS[subject].split(), words) + draw.sample(FILLERS.split(), fillers)
    draw.shuffle(chosen)
    return " ".join(chosen)


def _tagged(draw: random.Random, topic: int, value: int) -> Made:
    text = _text(draw, topic, 2, 4)
    return Made(topic, {"description": text, "tag": TAGS[value]}, {"description": text}, TAGS)


def _rated(draw: random.Random, topic: int, value: int) -> Made:
    text, scores = _text(draw, topic, 2, 4), ("1", "2", "3", "4", "5")
    return Made(topic, {"text": text, "score": scores[value]}, {"review": text}, scores)


def _tweeted(draw: random.Random, topic: int, value: int) -> Made:
    text = _text(draw, topic, 3, 0)
    tweets = tuple(f"{text} {closing}" for closing in CLOSINGS)
    return Made(topic, {"text": tweets[value]}, {"text": text}, tweets)


def _cited(draw: random.Random, topic: int, value: int) -> Made:
    """All items have one title: what is learned must hang on the options, which are all that a query shares with it."""
    first, title = draw.randrange(2), "another paper"
    subjects = [SUBJECTS[2 * topic + (first + slot) % 2].split() for slot in range(2)]
    options = [" ".join(words[2 * slot : 2 * slot + 2]) for slot, words in enumerate(subjects)]
    answers = ("[1]", "[2]") if first == 0 else ("[2]", "[1]")
    asked = {"title": _text(draw, topic, 0, 3), "option1": options[0], "option2": options[1]}
    citation = f"{render(task_named('LaMP_1').prompt, asked | {'title': title})} {answers[value]}"
    return Made(topic, {"title": title, "abstract": citation}, asked, answers)


FORMS = {
    "LaMP_1": Form(_cited, 2, (0,) * TOPICS, 2),
    "LaMP_2M": Form(_tagged, 5, (0, 1, 2, 3, 4), 3, every=1),
    "LaMP_3": Form(_rated, 5, (4, 0, 2, 3, 1), 3, every=1),
    "LaMP_7": Form(_tweeted, 5, (0, 1, 2, 3, 4), 3),
}


def people(task: str, sizes: Sizes, seed: int) -> tuple[list[Person], list[Person]]:
    """The base users and the test users of a task; each depends on (seed, task, id) alone."""
    if task not in FORMS:
        raise InputError([f"fixtures: no task {task!r}; there are {', '.join(FORMS)}"])
    own = FORMS[task].own
    base = [
        _person(task, f"base-{n:03d}", 2 * (n % FORMS[task].every == 0), sizes.base_items, sizes.base_queries, seed)
        for n in range(sizes.base_users)
    ]
    test = [_person(task, f"test-{n:03d}", own, sizes.items, sizes.queries, seed) for n in range(sizes.test_users)]
    return base, test


def _values(form: Form, own: int, draw: random.Random) -> tuple[int, ...]:
    """The common values, but for `own` topics, which take each other's (of two values: the other one)."""
    values = list(form.common)
    chosen = draw.sample(range(TOPICS), own)
    for topic, other in zip(chosen, chosen[1:] + chosen[:1], strict=True):
        values[topic] = 1 - form.common[topic] if form.values == 2 else form.common[other]
    return tuple(values)


def _person(task: str, id_: str, own: int, items: int, queries: int, seed: int) -> Person:
    """A user: values first, then items and queries over all topics in turn, none of them twice."""
    form, draw = FORMS[task], random.Random(seed_text(seed, task, id_, "fixtures"))
    values = _values(form, own, draw)
    made: list[Made] = []
    start = draw.randrange(TOPICS)
    while len(made) < items + queries:
        topic = (start + len(made)) % TOPICS
        new = form.make(draw, topic, values[topic])
        if _name(new) not in {_name(old) for old in made}:
            made.append(new)
    history = made[:items]
    draw.shuffle(history)
    return Person(id_, values, tuple(history), tuple(made[items:]))


def _name(made: Made) -> str:
    """The text that a query is known by: its first part. The split drops history items that share it."""
    return next(iter(made.asked.values()))


def raw(task: Task, users: Sequence[Person]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """LaMP's questions and outputs of these users, in the time-based form: user_id, and items with id and date."""
    questions, golds = [], []
    for user in users:
        items = [
            {"id": f"{user.id}-{n}", "date": f"{2000 + n // 336}-{n // 28 % 12 + 1:02d}-{n % 28 + 1:02d}", **made.item}
            for n, made in enumerate(user.history)
        ]
        for n, query in enumerate(user.queries):
            asked = {"id": f"{user.id}-q{n}", "user_id": user.id, "input": render(task.input, query.asked)}
            questions.append(asked | {"profile": items})
            golds.append({"id": asked["id"], "output": user.gold(query)})
    return questions, {"task": task.name, "golds": golds}


def write(folder: Path, task: str, sizes: Sizes = Sizes(), seed: int = 0) -> None:  # noqa: B008
    """Write {folder}/{task}/{train,dev}_{questions,outputs}.json; the same arguments give the same bytes."""
    record = task_named(task)
    sweep(folder / task / "*")
    for source, users in zip(("train", "dev"), people(task, sizes, seed), strict=True):
        for kind, data in zip(("questions", "outputs"), raw(record, users), strict=True):
            write_if_changed(folder / task / f"{source}_{kind}.json", json.dumps(data, indent=1).encode() + b"\n")


Known = dict[str, dict[str, float]]
"""By reference, then by metric: accuracy for closed labels, MAE for ratings, rouge-1 and rouge-L for free text."""


def ceilings(task: Task, test: Sequence[Person]) -> Known:
    """What can be reached on the queries of these users, for every metric of `points`.

    - personal: the right answers, which a perfect personal adapter gives.
    - unpersonal: the best that any function of the text alone reaches, since a text says no more than its topic: of
      each topic the one value that is best over all users. Computed with the golds, so an upper bound.
    - user-majority: the commonest answer of the user's history (of free texts: the commonest closing), always.
    - copy: the value of the history item that BM25 (k1) finds first, applied to the query; a wrong topic's may be
      right by chance.
    """
    asked = [(user, query) for user in test for query in user.queries]
    copied = {user.id: iter(_copied(task, user)) for user in test}
    rows: dict[str, list[dict[str, float]]] = {
        "personal": [points(task, user.gold(query), user.gold(query)) for user, query in asked],
        "user-majority": [points(task, user.gold(query), _majority(task, user, query)) for user, query in asked],
        "copy": [points(task, user.gold(query), query.answers[next(copied[user.id])]) for user, query in asked],
    }
    known = {name: mean_points(found) for name, found in rows.items()}
    return known | {"unpersonal": _unpersonal(task, asked)}


def points(task: Task, gold: str, answer: str) -> dict[str, float]:
    """One answer's share in each metric that is a plain mean over queries."""
    if task.labels is None:
        found = measure(task, gold, answer)
        return {"rouge-1": found["rouge1"], "rouge-L": found["rougeL"]}
    exact = {"accuracy": float(answer.strip() == gold)}
    return exact | ({"MAE": abs(measure(task, gold, answer)["error"])} if task.kind == "rating" else {})


def mean_points(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over queries."""
    return {metric: sum(row[metric] for row in rows) / len(rows) for metric in rows[0]}


def _majority(task: Task, user: Person, query: Made) -> str:
    if task.labels:
        return Counter(user.gold(made) for made in user.history).most_common(1)[0][0]
    return query.answers[Counter(user.values[made.topic] for made in user.history).most_common(1)[0][0]]


def _copied(task: Task, user: Person) -> list[int]:
    """For each query of a user the value of the item that BM25 finds first."""
    index = Index([task.item_text(Item("", None, made.item)) for made in user.history])
    texts = [query_text(task, Query("", render(task.input, query.asked))) for query in user.queries]
    return [user.values[user.history[index.top_k(text, 1)[0]].topic] for text in texts]


def _unpersonal(task: Task, asked: Sequence[tuple[Person, Made]]) -> dict[str, float]:
    """For each metric: topic by topic the value whose answers are best, over all users' queries."""
    totals: dict[str, float] = {}
    for topic in range(TOPICS):
        own = [(user, query) for user, query in asked if query.topic == topic]
        if not own:
            continue
        values = range(len(own[0][1].answers))
        means = [mean_points([points(task, user.gold(query), query.answers[v]) for user, query in own]) for v in values]
        for metric in means[0]:
            best = min if metric == "MAE" else max
            totals[metric] = totals.get(metric, 0.0) + best(mean[metric] for mean in means) * len(own)
    return {metric: total / len(asked) for metric, total in totals.items()}
