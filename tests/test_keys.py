"""Which keys a change reaches: those of what depends on it, and no other."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from oppu.config import load
from oppu.keys import VERSIONS, adapter_key, base_key, predictions_key, scores_key
from oppu.recipe import base_recipe, cell_recipe
from oppu.records import Item, Query, User

MANIFEST = {"key": "base", "files": {}, "model": {}}
ANN = User("u-0123456789ab", "ann", (Item("1", None, {"text": "a"}),), (Query("q", "b"),))
Recipe = dict[str, Any]


def recipes(augmentation: str, labels: str) -> tuple[Recipe, Recipe]:
    config = load({"tasks": ["LaMP_2N"], "augmentations": [augmentation], "generation": {"labels": labels}})
    base, cell = (
        base_recipe(config, "LaMP_2N", augmentation),
        cell_recipe(config, "LaMP_2N", augmentation, "lora", "full"),
    )
    return copy.deepcopy(base), copy.deepcopy(cell)


def keys(base: Recipe, cell: Recipe) -> dict[str, str]:
    """Each artefact's own key, what stands before it in the chain being equal."""
    return {
        "base": base_key(base, {}, "", None),
        "adapter": adapter_key(cell, MANIFEST, ANN, None, None),
        "predictions": predictions_key(cell, MANIFEST, ANN, None, None, "adapter"),
        "scores": scores_key(cell, "queries", {}),
    }


def task(field: str, value: object) -> Callable[[Recipe], None]:
    return lambda recipe: recipe["task"].update({field: value})


def part(name: str, field: str) -> Callable[[Recipe], None]:
    return lambda recipe: recipe.get(name, {}).update({field: "another"})


MADE = {"base", "adapter", "predictions"}
CHANGES = {
    "prompt": (task("prompt", "another"), MADE),
    "item": (task("item", "another"), MADE),
    "labels": (task("labels", ["another"]), {"scores"}),
    "longest answer of the task, resolved elsewhere": (task("output_tokens", 99), set()),
    "form of profiles, whose text is a part of the key": (task("profile", {}), set()),
    "learning rate": (part("training", "lr"), {"base", "adapter"}),
    "longest answer": (part("generation", "max_new_tokens"), {"predictions"}),
    "max_length": (part("model", "max_length"), MADE),
    "how to run": (part("runtime", "training"), set()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_reaches_the_keys_of_what_depends_on_it(change: str) -> None:
    edit, expected = CHANGES[change]
    base, cell = recipes("k1", "generate")
    before = keys(base, cell)
    for recipe in (base, cell):
        edit(recipe)
    after = keys(base, cell)
    assert {name for name in before if before[name] != after[name]} == expected


def test_labels_decide_answers_that_are_chosen_among_them() -> None:
    base, cell = recipes("k1", "score")
    before = keys(base, cell)
    task("labels", ["another"])(cell)
    after = keys(base, cell)
    assert {name for name in before if before[name] != after[name]} == {"predictions", "scores"}


STEPS = {
    "split": set(),
    "profiles": set(),
    "retrieval": MADE,
    "prompts": MADE,
    "examples": MADE,
    "training": {"base", "adapter"},
    "generation": {"predictions"},
}


@pytest.mark.parametrize("step", VERSIONS)
@pytest.mark.parametrize("augmentation", ["k0", "k1", "random", "profile-k0"])
def test_a_version_reaches_what_its_step_makes(step: str, augmentation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(*recipes(augmentation, "generate"))
    monkeypatch.setitem(VERSIONS, step, 2)
    after = keys(*recipes(augmentation, "generate"))
    retrieved = step != "retrieval" or augmentation in ("k1", "random")
    assert {name for name in before if before[name] != after[name]} == (STEPS[step] if retrieved else set())
