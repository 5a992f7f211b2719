"""Adapters that go on from where they were, or begin at the pooled one: on a real run, against PEFT as the oracle."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from oppu import cohort
from oppu.examples import history_examples
from oppu.files import read_json, read_user
from oppu.models import load_base, load_tokenizer
from oppu.recipe import lora_of
from oppu.rows import plan
from oppu.seeds import seed_text
from oppu.warm import _replayed
from tests.oracle import distance, train_alone
from tests.workflow.project import TEST_USERS, Project

SETTING = "results/LaMP_2N/k1/lora/full"
PERSONAL = {"rank": 4, "lr": 3e-3, "epochs": 2, "batch_size": 4, "start": "previous", "replay": 0.5}
MODEL = {"path": "data/models/oppu-tiny", "max_length": 256, "dtype": "float64"}
BOUND = 1e-8
"""Float64, but for Hugging Face's norms, which round to float32 in between: 4e-10 was seen."""


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.make(
        tmp_path_factory.mktemp("warm") / "project",
        augmentations=["k1"],
        peft=["none", "lora"],
        users_per_job=100,
        personal=PERSONAL,
        model=MODEL,
    )
    project.run()
    return project


@pytest.fixture
def project(first: Project, tmp_path: Path) -> Project:
    copy = first.copy(tmp_path / "project")
    copy.forget_logs()
    return copy


def change(project: Project, person: str, what: str) -> None:
    """Append an item to a person's history, or edit one, in LaMP's files."""
    path = project.folder / "data/raw/LaMP_2N/dev_questions.json"
    questions = json.loads(path.read_text())
    for question in questions:
        if question["user_id"] == person and what == "append":
            latest = max(item["date"] for item in question["profile"])
            new = {"id": f"999{len(question['profile'])}", "date": latest, "category": "crime"}
            question["profile"].append(new | {"text": "A court heard it at last.", "title": "In Court"})
        elif question["user_id"] == person:
            question["profile"][3]["text"] += " And one more thing."
    path.write_text(json.dumps(questions))


def adapter(project: Project, user: str) -> dict[str, Tensor]:
    return load_file(project.folder / SETTING / "users" / user / "adapter/adapter_model.safetensors")


def chain(project: Project, user: str) -> list[tuple[str, int, int]]:
    links = read_json(project.folder / SETTING / "users" / user / "cell.json")["trained_on"]
    return [(link["start"].split()[0], link["items"], link["replayed"]) for link in links]


def by_peft(
    project: Project, user: str, start: dict[str, Tensor], places: list[int] | None, order: str
) -> dict[str, Tensor]:
    """What plain PEFT makes of an adapter with these items of a user's history, in the order that the seed gives."""
    folder = project.folder / "results/LaMP_2N"
    recipe = read_json(project.folder / SETTING / "recipe.json")
    tokenizer = load_tokenizer(str(project.folder / MODEL["path"]))
    model = load_base(
        str(project.folder / MODEL["path"]), dtype="float64", quantization=None, task_adapter=folder / "k1/base/adapter"
    )
    person, lora = read_user(folder / f"split/histories/{user}.json"), lora_of(recipe)
    everything = history_examples(cohort.context_of(recipe, tokenizer, None), person, None, Counter())
    examples = [everything[place] for place in places] if places is not None else everything
    steps = plan(len(examples), 2, 4, seed_text(0, "LaMP_2N", user, *order.split(" / ")))
    targets = lora.model_copy(update={"target_modules": ["q_proj", "v_proj"]})
    return train_alone(model, start, examples, steps, targets)


def test_an_appended_item_is_learned_alone_and_by_its_user_alone(first: Project, project: Project) -> None:
    user, *others = project.users()
    person = read_user(project.folder / f"results/LaMP_2N/split/histories/{user}.json")
    before, count = project.cells(), len(person.history)
    change(project, person.id, "append")
    project.run()
    assert project.made() == (1, 2), "one adapter; its user's answers with and without one, since both retrieve"
    assert "1 go on from their adapters: 1 new items, 1 old ones again" in project.logs()
    after = project.cells()
    assert all(
        after[f"LaMP_2N/k1/lora/full/users/{other}"] == before[f"LaMP_2N/k1/lora/full/users/{other}"]
        for other in others
    )
    assert chain(project, user) == [("initial", count, 0), ("previous", count + 1, 1)]

    places = [*_replayed(read_json(project.folder / SETTING / "recipe.json"), person, count, 1), count]
    order = f"data order / after {count} items"
    assert len(places) == 2
    assert distance(adapter(project, user), by_peft(project, user, adapter(first, user), places, order)) < BOUND
    assert distance(adapter(project, user), adapter(first, user)) > 1e-4

    assert "Nothing to be done" in project.run()
    project.forget_logs()
    project.run("-R", "cells")
    assert project.made() == (0, 0) and project.cells() == after, "a check trains nothing"

    change(project, person.id, "append")
    project.forget_logs()
    project.run()
    assert chain(project, user)[-1] == ("previous", count + 2, 1) and len(chain(project, user)) == 3
    change(project, person.id, "edit")
    project.forget_logs()
    project.run()
    assert project.made()[0] == 1 and "go on from" not in project.logs()
    assert chain(project, user) == [("initial", count + 2, 0)]


def test_a_lost_adapter_is_trained_anew(first: Project, project: Project) -> None:
    user = project.users()[1]
    person = read_user(project.folder / f"results/LaMP_2N/split/histories/{user}.json")
    change(project, person.id, "append")
    project.run()
    assert len(chain(project, user)) == 2
    (project.folder / SETTING / "users" / user / "adapter/adapter_model.safetensors").unlink()
    project.run()
    assert chain(project, user) == [("initial", len(person.history) + 1, 0)]
    assert "Nothing to be done" in project.run()


def test_adapters_begin_at_the_pooled_one(first: Project, project: Project) -> None:
    project.config |= {"benchmark": True, "personal": PERSONAL | {"start": "pooled", "replay": 0.0}}
    project.run()
    assert project.made()[0] == TEST_USERS, "where an adapter began is part of what it is"
    pooled = load_file(project.folder / "results/LaMP_2N/k1/pooled/full/adapter/adapter_model.safetensors")
    user = project.users()[2]
    assert chain(project, user)[0][0] == "pooled" and len(chain(project, user)) == 1
    assert distance(adapter(project, user), by_peft(project, user, pooled, None, "data order")) < BOUND
    assert "Nothing to be done" in project.run()
    project.config["benchmark"] = False
    assert "needs `benchmark: true`" in project.run("-n", ok=False)
