"""Made-up users: what the generator promises, and that personal adapters learn exactly what it put in."""

from collections import Counter
from pathlib import Path

import pytest
from rank_bm25 import BM25Okapi
from torch import no_grad

from oppu import base, fixtures, lamp, split
from oppu.cohort import Cohort
from oppu.config import load
from oppu.files import read_json, read_user, write_json
from oppu.fixtures import FORMS, Sizes, ceilings, mean_points, people, points
from oppu.recipe import base_recipe, cell_recipe
from oppu.records import InputError
from oppu.tasks import task

MODEL = str(Path(__file__).parents[1] / "data/models/oppu-tiny")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHANCE = 0.05
SMALL = Sizes(test_users=3, base_users=2, items=13, queries=4, base_items=5, base_queries=3)
MADE = [(name, sizes, seed) for name in FORMS for sizes, seed in ((Sizes(), 0), (Sizes(), 5), (SMALL, 1))]


def test_the_same_arguments_give_the_same_bytes_and_another_seed_others(tmp_path):
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        fixtures.write(tmp_path / folder, "LaMP_2M", SMALL, seed)
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / f / "LaMP_2M").iterdir()} for f in "abc")
    assert a == b
    assert all(a[name] != c[name] for name in a)
    assert set(a) == {f"{s}_{k}.json" for s in ("train", "dev") for k in ("questions", "outputs")}


def test_a_user_does_not_depend_on_how_many_others_there_are():
    few, many = (people("LaMP_7", Sizes(test_users=n, base_users=n), 0) for n in (2, 4))
    assert many[0][:2] == few[0] and many[1][:2] == few[1]


def test_unknown_tasks_and_sizes_are_refused():
    with pytest.raises(InputError, match="LaMP_2N"):
        people("LaMP_2N", Sizes(), 0)
    with pytest.raises(InputError, match="more items"):
        Sizes(items=5, base_items=5)


@pytest.mark.parametrize(("name", "sizes", "seed"), MADE)
def test_the_files_are_read_and_split_without_any_complaint(tmp_path, name, sizes, seed):
    fixtures.write(tmp_path, name, sizes, seed)
    questions, counts = lamp.read_counted(tmp_path, task(name))
    result = split.split(questions, task(name), load({"split": {"test_users": "dev"}}).split)
    assert counts == {} and result.counts == {}
    assert [len(u.history) for u in result.test] == [sizes.items] * sizes.test_users
    assert [len(u.history) for u in result.base] == [sizes.base_items] * sizes.base_users
    assert {len(u.queries) for u in result.test} == {sizes.queries}
    assert all(a.date <= b.date for u in result.test for a, b in zip(u.history, u.history[1:], strict=False))


def about(text):
    """The subject that a text's words belong to, by the lists of words."""
    found = Counter(n for n, words in enumerate(fixtures.SUBJECTS) for word in words.split() if word in text.split())
    return found.most_common(1)[0][0]


def answered(name, item):
    """What an item says about its user, by its own words alone: (what it is about, what the user answers to it)."""
    if name == "LaMP_1":
        options, answer = item.fields["abstract"].split("reference: [1] - ")[1].split("\nanswer: ")
        subjects = [about(option) for option in options.split(" [2] - ")]
        return tuple(sorted(subjects)), subjects[int(answer[1]) - 1]
    if name == "LaMP_7":
        words = item.fields["text"].split()
        return about(item.fields["text"]), " ".join(words[3:])
    text, answer = (item.fields[field] for field in task(name).history)
    return about(text), answer


def expected(name, likes, query):
    """The answer to a query that follows from the history alone."""
    parts = task(name).read(query.input)
    if name == "LaMP_1":
        subjects = [about(parts["option1"]), about(parts["option2"])]
        return f"[{1 + subjects.index(likes[tuple(sorted(subjects))])}]"
    (text,) = parts.values()
    return f"{text} {likes[about(text)]}" if name == "LaMP_7" else likes[about(text)]


@pytest.mark.parametrize(("name", "sizes", "seed"), MADE)
def test_the_golds_follow_from_each_users_own_history_read_anew(tmp_path, name, sizes, seed):
    fixtures.write(tmp_path, name, sizes, seed)
    for q in lamp.read(tmp_path, task(name)):
        if q.source == "dev":
            seen = {answered(name, item) for item in q.history}
            assert len(seen) == len(dict(seen)) == fixtures.TOPICS  # one answer to each topic
            assert expected(name, dict(seen), q) == q.gold


@pytest.mark.parametrize(("name", "sizes", "seed"), MADE)
def test_users_cannot_be_served_without_knowing_them(name, sizes, seed):
    known = ceilings(task(name), people(name, sizes, seed)[1])
    metric = next(iter(known["personal"]))
    assert known["personal"][metric] == 1
    if sizes != SMALL:  # three users with four queries each are too few to say
        assert known["user-majority"][metric] < 0.6
        assert known["unpersonal"][metric] < 0.75
    if "MAE" in known["personal"]:
        assert known["personal"]["MAE"] == 0 and known["unpersonal"]["MAE"] > 0.4


def test_ceilings_are_those_of_an_independent_count():
    test = people("LaMP_3", Sizes(), 3)[1]
    rows = [
        (q.asked["review"], about(q.asked["review"]), int(user.gold(q)), user) for user in test for q in user.queries
    ]
    known = ceilings(task("LaMP_3"), test)
    topics = {topic for _, topic, _, _ in rows}
    hits = sum(max(Counter(g for _, t, g, _ in rows if t == topic).values()) for topic in topics)
    error = sum(min(sum(abs(g - c) for _, t, g, _ in rows if t == topic) for c in range(1, 6)) for topic in topics)
    assert known["unpersonal"] == pytest.approx({"accuracy": hits / len(rows), "MAE": error / len(rows)})

    right, prompt = 0, task("LaMP_3").prompt
    for text, _, gold, user in rows:
        documents = [f"review: {made.item['text']} score: {made.item['score']}" for made in user.history]
        scores = BM25Okapi([d.split(" ") for d in documents]).get_scores(prompt.format(review=text).split(" "))
        best = max(range(len(documents)), key=lambda n: (scores[n], n))
        right += user.history[best].item["score"] == str(gold)
    assert known["copy"]["accuracy"] == pytest.approx(right / len(rows))


# --- learning -----------------------------------------------------------------------------------------------------

BASE = {"examples": "queries+history", "rank": 16, "lr": 5e-3, "epochs": 3, "batch_size": 16, "weight_decay": 0.01}
PERSONAL = {"rank": 16, "lr": 1e-2, "epochs": 3, "batch_size": 8, "weight_decay": 0.0, "target_modules": ALL}
TUNED = {
    "LaMP_1": ({"max_items": 3}, {"epochs": 8, "batch_size": 4}),
    "LaMP_2M": ({}, {"epochs": 12, "batch_size": 4}),
    "LaMP_3": ({"epochs": 5}, {"epochs": 8, "batch_size": 4}),
    "LaMP_7": ({"epochs": 6, "max_items": 10}, {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
}
"""Per task what differs from BASE and PERSONAL."""


def made_config(name, **personal):
    own_base, own_personal = TUNED[name]
    fast = {"target_modules": ALL, "tokens_per_batch": 2048}
    values = {"tasks": [name], "model": {"path": MODEL, "max_length": 512}, "split": {"test_users": "dev"}}
    values |= {"base": BASE | fast | own_base, "personal": PERSONAL | fast | own_personal | personal}
    return load(values)


class Lab:
    """One task's fixtures, split, with a base trained: what the settings of the test are run on."""

    def __init__(self, folder, name, augmentation="k0"):
        self.folder, self.name, self.augmentation, config = folder, name, augmentation, made_config(name)
        fixtures.write(folder / "raw", name)
        split.run(folder / "raw", name, config.split, folder / "users.json")
        write_json(folder / "base/recipe.json", base_recipe(config, name, augmentation))
        base.run(folder / "base/base.json", folder / "base/recipe.json", folder / "base.jsonl")
        self.users = [read_user(path) for path in sorted((folder / "histories").glob("*.json"))]
        self.test = people(name, Sizes(), 0)[1]
        self.golds = {q.id: q.gold for q in lamp.read(folder / "raw", task(name)) if q.source == "dev"}

    def cohort(self, peft, **personal):
        recipe = cell_recipe(made_config(self.name, **personal), self.name, self.augmentation, peft, "full")
        users = [(user, None, Counter()) for user in self.users]
        return Cohort(recipe, read_json(self.folder / "base/base.json"), self.folder / "base", None, users)

    def score(self, cohort):
        predictions = {}
        assert not cohort.predict([user.key for user in self.users], predictions.__setitem__)
        rows = [
            points(task(self.name), self.golds[r["id"]], r["prediction"])
            for u in self.users
            for r in predictions[u.key]
        ]
        return mean_points(rows)

    def scores(self, **personal):
        """The mean of each metric without adapters, with one's own, and with the next user's."""
        found = {"none": self.score(self.cohort("none"))}
        cohort = self.cohort("lora", **personal)
        assert not cohort.train([user.key for user in self.users], lambda key: None)
        found["lora"] = self.score(cohort)
        with no_grad():
            cohort.bank.weights.copy_(cohort.bank.weights.roll(-1, 0))
        return found | {"swapped": self.score(cohort)}


def check(scores, known):
    """What personal adapters must do on fixtures; `known` are the ceilings of the very queries."""
    metric = next(iter(known["personal"]))  # accuracy or rouge-1: higher is better
    values = {name: of[metric] for name, of in (scores | known).items()}
    assert values["lora"] >= 0.9 * values["personal"], values
    assert values["none"] <= values["unpersonal"] + CHANCE, values
    assert values["swapped"] <= values["unpersonal"] + CHANCE, values
    if "MAE" in known["personal"]:
        assert scores["lora"]["MAE"] <= 0.25 * known["unpersonal"]["MAE"], scores
        assert scores["swapped"]["MAE"] >= known["unpersonal"]["MAE"], scores


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    made = {}

    def of(name):
        if name not in made:
            made[name] = Lab(tmp_path_factory.mktemp(name), name)
        return made[name]

    return of


@pytest.mark.parametrize("name", TUNED)
def test_own_adapters_reach_the_ceiling_and_others_adapters_do_not(lab, name):
    made = lab(name)
    check(made.scores(), ceilings(task(name), made.test))


def test_retrieval_lies_between_what_needs_no_user_and_what_copying_reaches(tmp_path):
    made = Lab(tmp_path, "LaMP_2M", "k1")
    known = ceilings(task("LaMP_2M"), made.test)
    found = made.score(made.cohort("none"))["accuracy"]
    assert known["unpersonal"]["accuracy"] + 0.05 < found < known["copy"]["accuracy"] + CHANCE, (found, known)


def test_the_check_fails_when_training_is_switched_off(lab):
    made = lab("LaMP_3")
    scores = made.scores(lr=1e-9, epochs=1)
    assert scores["lora"] == scores["none"]
    with pytest.raises(AssertionError):
        check(scores, ceilings(task("LaMP_3"), made.test))
