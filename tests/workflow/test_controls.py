"""The controls `pooled` and `swapped`, repeats with other training seeds, and retrieval by time: on a real run."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedModel

from oppu import cohort, pooled
from oppu.config import Generation
from oppu.examples import query_prompts
from oppu.files import read_json, read_user
from oppu.generation import generate
from oppu.models import load_base, load_tokenizer
from tests.workflow.project import Project

K0 = "results/LaMP_2N/k0"


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.make(
        tmp_path_factory.mktemp("controls") / "project",
        augmentations=["k0"],
        peft=["none", "lora", "pooled", "swapped"],
        benchmark=True,
        training_seeds=2,
        personal={"rank": 4, "lr": 3e-2, "epochs": 2, "batch_size": 4},
    )
    project.run()
    return project


def answers(project: Project, model: PreTrainedModel, user: str) -> list[str]:
    """What a model answers to a user's queries at k0."""
    recipe = read_json(project.folder / K0 / "none/full/recipe.json")
    tokenizer = load_tokenizer(str(project.folder / "data/models/oppu-tiny"))
    person = read_user(project.folder / f"results/LaMP_2N/split/histories/{user}.json")
    prompts = query_prompts(cohort.context_of(recipe, tokenizer, None), person, None, 8, Counter())
    return generate(model, tokenizer, [ids for *_, ids in prompts], Generation(), 8)


def predicted(project: Project, setting: str, user: str) -> list[str]:
    path = project.folder / f"results/LaMP_2N/{setting}/full/users/{user}/predictions.jsonl"
    return [json.loads(line)["prediction"] for line in path.read_text().splitlines()]


def with_adapter(project: Project, adapter: Path) -> PreTrainedModel:
    """The oracle: the base with the task LoRA and one adapter, both merged by PEFT."""
    from oppu.models import merge

    model = load_base(str(project.folder / "data/models/oppu-tiny"), task_adapter=project.folder / K0 / "base/adapter")
    return merge(model, adapter)


def test_swapped_answers_with_the_next_users_adapter_and_pooled_with_the_common_one(controlled: Project) -> None:
    users = controlled.users()
    for user, other in zip(users, [*users[1:], users[0]], strict=True):
        lent = with_adapter(controlled, controlled.folder / K0 / f"lora/full/users/{other}/adapter")
        assert predicted(controlled, "k0/swapped", user) == answers(controlled, lent, user)
        common = with_adapter(controlled, controlled.folder / K0 / "pooled/full/adapter")
        assert predicted(controlled, "k0/pooled", user) == answers(controlled, common, user)
        for peft in ("swapped", "pooled"):
            assert not (controlled.folder / K0 / peft / "full/users" / user / "adapter").exists()


def test_repeats_have_their_own_seed(controlled: Project) -> None:
    seeds = {path.parts[-4]: json.loads(path.read_text())["seed"] for path in recipes(controlled)}
    assert seeds == {"k0": 0, "k0-s1": 1}
    user = controlled.users()[0]
    first, second = (
        load_file(controlled.folder / f"results/LaMP_2N/{a}/lora/full/users/{user}/adapter/adapter_model.safetensors")
        for a in ("k0", "k0-s1")
    )
    assert any((first[name] != second[name]).any() for name in first)


def recipes(project: Project) -> list[Path]:
    return sorted(project.folder.glob("results/LaMP_2N/*/*/full/recipe.json"))


def test_the_controls_are_scored(controlled: Project) -> None:
    with (controlled.folder / "results/tables/scores.csv").open() as f:
        rows = {(r["augmentation"], r["peft"]) for r in csv.DictReader(f)}
    assert {("k0", "none"), ("k0", "lora"), ("k0", "pooled"), ("k0", "swapped")} <= rows


def test_nothing_is_trained_again_and_a_changed_adapter_is_asked_again(controlled: Project, tmp_path: Path) -> None:
    project = controlled.copy(tmp_path / "project")
    project.forget_logs()
    project.run("--forcerun", "pooled", "cells")
    assert project.made() == (0, 0)
    user = project.users()[1]
    project.forget_logs()
    (project.folder / K0 / f"lora/full/users/{user}/adapter/adapter_model.safetensors").unlink()
    project.run()
    adapters, _ = project.made()
    assert adapters == 1
    assert "Nothing to be done" in project.run()


def test_pooled_learns_from_everybody_and_is_refused_outside_a_benchmark(
    controlled: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    train = cohort.train

    def spy(model, bank, examples, *rest, **named):
        seen.extend(map(len, examples))
        return train(model, bank, examples, *rest, **named)

    monkeypatch.setattr(cohort, "train", spy)
    monkeypatch.chdir(controlled.folder)
    histories = sorted((controlled.folder / "results/LaMP_2N/split/histories").glob("*.json"))
    recipe = tmp_path / "pooled/full/recipe.json"
    recipe.parent.mkdir(parents=True)
    recipe.write_text((controlled.folder / K0 / "pooled/full/recipe.json").read_text())
    pooled.run(recipe.parent / "pooled.json", recipe, controlled.folder / K0 / "base/base.json", histories)
    assert seen == [sum(len(read_user(path).history) for path in histories)], "one adapter, everybody's items"
    again, before = (
        read_json(path / "pooled.json") for path in (recipe.parent, controlled.folder / K0 / "pooled/full")
    )
    assert again["key"] == before["key"]

    refused = Project(controlled.folder, controlled.config | {"benchmark": False})
    assert "benchmark: true" in refused.run("-n", ok=False)
