"""Profiles in the real workflow: who is remade by a person's own text, by another backend, and by nothing at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.workflow.project import TEST_USERS, Project

NOTHING = "Nothing to be done"
LLM = {"backend": "llm", "path": "data/models/oppu-tiny", "history_tokens": 100, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A finished run of one augmentation with profiles. Tests work on copies."""
    project = Project.make(tmp_path_factory.mktemp("profiles") / "project", augmentations=["profile-k0"], peft=["lora"])
    project.run()
    return project


@pytest.fixture
def project(profiled: Project, tmp_path: Path) -> Project:
    copy = profiled.copy(tmp_path / "project")
    copy.forget_logs()
    return copy


def keys(project: Project) -> dict[str, dict[str, str]]:
    """The keys of each cell's artefacts, by the cell's path."""
    records = {
        cell: json.loads((project.folder / "results" / cell / "cell.json").read_text()) for cell in project.cells()
    }
    return {c: {name: entry["key"] for name, entry in r["artefacts"].items()} for c, r in records.items()}


def changed(before: dict, after: dict) -> set[str]:
    return {Path(cell).name for cell in before.keys() | after.keys() if before.get(cell) != after.get(cell)}


def records(project: Project) -> dict[str, dict]:
    folder = project.folder / "results/LaMP_2N/profiles"
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("users/*.json")}


def own_text(project: Project, user: str) -> Path:
    folder = project.folder / "data/profiles/LaMP_2N"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{user}.txt"


def test_an_own_text_remakes_that_users_cells_and_they_come_back_without_it(project: Project) -> None:
    before, files, old = keys(project), project.cells(), records(project)
    user = project.users()[1]
    own_text(project, user).write_text("I write about {crime} and trials.\n")
    project.run()
    assert project.made() == (1, 1)
    assert changed(files, project.cells()) == {user} == changed(old, records(project))
    assert NOTHING in project.run()
    project.forget_logs()
    own_text(project, user).unlink()
    project.run()
    assert project.made() == (1, 1)
    assert keys(project) == before and records(project) == old
    assert NOTHING in project.run()


def test_a_bad_own_text_stops_the_run_each_time_and_the_rest_is_kept(project: Project) -> None:
    files, user = project.cells(), project.users()[0]
    setting = "results/LaMP_2N/profile-k0/lora/full"
    cell, scores = f"{setting}/users/{user}/predictions.jsonl", f"{setting}/scores.json"
    project.run(cell)
    own_text(project, user).write_text(" \n")
    for targets in ([], [], [cell], [cell], [scores], [scores]):
        assert NOTHING not in project.run(*targets, ok=False)
        assert f"{user}.txt: is empty" in project.logs()
    assert project.cells() == files and project.made() == (0, 0)
    own_text(project, user).unlink()
    project.run()
    assert project.made() == (0, 0) and project.cells() == files


def test_a_missing_record_comes_back_and_an_edited_one_is_refused_and_mended(project: Project) -> None:
    files, old, user = project.cells(), records(project), project.users()[2]
    path = project.folder / f"results/LaMP_2N/profiles/users/{user}.json"
    path.unlink()
    project.run()
    assert records(project) == old
    path.write_text(path.read_text().replace("category", "kategory"))
    project.run("-R", "cells", ok=False)
    assert user in project.logs() and "changed by hand or cut" in project.logs()
    project.run("-R", "profiles")
    assert records(project) == old and project.cells() == files


def test_a_model_writes_all_profiles_and_nothing_twice(project: Project) -> None:
    before = keys(project)
    project.config["profiles"] = LLM
    project.run()
    assert {record["source"] for record in records(project).values()} == {"llm"}
    assert len((project.folder / "results/LaMP_2N/profiles/base.jsonl").read_text().splitlines()) == 10
    assert changed(before, keys(project)) == set(project.users())
    assert project.made() == (TEST_USERS, TEST_USERS)
    assert NOTHING in project.run()
    project.config["profiles"] = LLM | {"tokens_per_batch": 300}
    project.forget_logs()
    project.run()
    assert " 2 profiles to make" not in project.logs() and " 0 profiles to make" in project.logs()
    assert project.made() == (0, 0)


def test_only_augmentations_with_profiles_have_profile_jobs(project: Project) -> None:
    assert "base_profiles" in project.run("-n", "--forceall", "--quiet", "rules")
    project.config["augmentations"] = ["k0"]
    plan = project.run("-n", "--forceall")
    assert "base_profiles" not in plan and "/profiles/" not in plan and "rule base:" in plan
