"""A string planted in one user's history turns up nowhere among another user's things."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from oppu import base, cohort
from oppu.cells import pool_of
from oppu.examples import history_examples, query_prompts
from oppu.files import read_base, read_json, read_user
from oppu.models import load_tokenizer
from oppu.profiles import base_profiles_of, profile_of
from oppu.records import User
from oppu.split import user_key
from tests.workflow.project import ROOT, Project, sample

AUGMENTATIONS = ["k0", "k2", "random", "profile-k1"]


def canary(user_id: str) -> str:
    return "zq" + user_id.replace("-", "x") + "qz"


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run on data in which every item of every user carries that user's canary, and every own profile."""
    project = Project.make(
        tmp_path_factory.mktemp("canary") / "project",
        augmentations=AUGMENTATIONS,
        peft=["none", "lora", "ia3", "prompt"],
        users_per_job=100,
    )
    for part in ("dev", "train"):
        path = project.folder / f"data/raw/LaMP_2N/{part}_questions.json"
        questions = json.loads(path.read_text())
        for question in questions:
            for item in question["profile"]:
                item["text"] = f"{canary(question['user_id'])} {item['text']}"
        path.write_text(json.dumps(questions))
    own = project.folder / "data/profiles/LaMP_2N"
    own.mkdir(parents=True)
    for user_id in {question["user_id"] for question in sample("LaMP_2N", "dev", "questions")}:
        (own / f"{user_key(user_id)}.txt").write_text(f"writes like {canary(user_id)}")
    project.run()
    return project


def people(project: Project) -> tuple[list[User], list[User]]:
    split = project.folder / "results/LaMP_2N/split"
    return [read_user(path) for path in sorted(split.glob("histories/*.json"))], read_base(split / "base.jsonl")


def texts(project: Project, augmentation: str) -> dict[str, str]:
    """Everything a user's adapter is trained on and asked, as text, by the user's id; and the base's as `base`."""
    folder = project.folder / f"results/LaMP_2N/{augmentation}"
    recipe = read_json(folder / "none/full/recipe.json")
    base_recipe = read_json(folder / "base/recipe.json")
    tokenizer = load_tokenizer(str(ROOT / "data/models/oppu-tiny"))
    pool = pool_of(project.folder / "results/LaMP_2N/split/base.jsonl", recipe)
    context = cohort.context_of(recipe, tokenizer, pool)
    tested, others = people(project)
    profiles = project.folder / "results/LaMP_2N/profiles"
    found = {}
    for user in tested:
        profile = profile_of(recipe, user, profiles)
        rows = [e.prompt + e.target for e in history_examples(context, user, profile, Counter())]
        rows += [tuple(tokens) for *_, tokens in query_prompts(context, user, profile, 8, Counter())]
        assert len(rows) == len(user.history) + len(user.queries)
        found[user.id] = "\n".join(tokenizer.batch_decode([list(row) for row in rows]))
    context = cohort.context_of(base_recipe, tokenizer, pool)
    examples = base._examples(base_recipe, context, others, Counter(), base_profiles_of(base_recipe, profiles))
    found["base"] = "\n".join(tokenizer.batch_decode([list(e.prompt + e.target) for e in examples]))
    return found


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_rows_and_prompts_carry_their_own_users_text_only(planted: Project, augmentation: str) -> None:
    tested, others = people(planted)
    found = texts(planted, augmentation)
    for user in tested:
        carriers = {who for who, text in found.items() if canary(user.id) in text}
        assert carriers == {user.id}, f"{user.id}: found with {carriers}"
    base_canaries = {other.id for other in others for user in tested if canary(other.id) in found[user.id]}
    assert bool(base_canaries) is (augmentation == "random"), "the pool of base users is the positive control"


def test_no_file_of_another_user_and_no_log_has_a_users_text(planted: Project) -> None:
    tested, _ = people(planted)
    results = planted.folder / "results"
    files = {path: path.read_bytes() for path in results.rglob("*") if path.is_file()}
    assert any("adapter_model" in path.name for path in files)
    for user in tested:
        allowed = {results / f"LaMP_2N/{folder}/{user.key}.json" for folder in ("split/histories", "profiles/users")}
        mark = canary(user.id).encode()
        seen = {p for p, data in files.items() if mark in data and user.key not in p.parts}
        assert seen == allowed, f"{user.id}: found in {seen}"


def test_no_user_id_is_a_path_or_a_log_line(planted: Project) -> None:
    ids = [user.id for group in people(planted) for user in group]
    logs = planted.logs()
    for path in (planted.folder / "results").rglob("*"):
        assert not any(user_id in str(path.relative_to(planted.folder)) for user_id in ids)
    assert logs and not any(user_id in logs for user_id in ids)
