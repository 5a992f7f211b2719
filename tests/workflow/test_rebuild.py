"""What each kind of change rebuilds: trained, predicted and scored cells, counted on runs of the real Snakemake.

Models do nothing here (benchmarks/no_models.py), so that counting is cheap; test_workflow.py trains.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workflow.project import ROOT, TEST_USERS, Project, slice_of_sample

sys.path.insert(0, str(ROOT / "benchmarks"))
from no_models import install

TASKS = ("LaMP_2N", "LaMP_4")
SETTINGS = [f"{augmentation}/{peft}/full" for augmentation in ("k0", "k1") for peft in ("none", "lora")]
OTHER = "LaMP_4/k0/lora/full"
Counts = tuple[int, int, int]
U = TEST_USERS
NOTHING: Counts = (0, 0, 0)
NEWS: Counts = (2 * U, 4 * U, 4 * U)
ALL: Counts = (3 * U, 5 * U, 5 * U)
"""LaMP_2N in four settings, and LaMP_4 in one, for what must not reach another task."""


def score(project: Project, *options: str) -> str:
    """Run up to the scores of all settings of LaMP_2N and of one of LaMP_4."""
    settings = [f"LaMP_2N/{a}/{p}/full" for a in project.config["augmentations"] for p in project.config["peft"]]
    return project.run(*options, "--", *(f"results/{name}/scores.json" for name in [*settings, OTHER]))


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that is scored."""
    folder = tmp_path_factory.mktemp("rebuild") / "project"
    project = Project.make(folder, TASKS, users_per_job=100, model={"path": "somebody/some-model", "revision": "1"})
    install(folder / "bin", ROOT)
    score(project)
    assert counts(project) == ALL
    return project


@pytest.fixture
def project(counted: Project, tmp_path: Path) -> Project:
    copy = counted.copy(tmp_path / "project")
    copy.forget_logs()
    return copy


def counts(project: Project) -> Counts:
    """Cells trained, predicted and scored, by the logs of the last run of each job."""
    return (*project.made(), sum(int(n) for n in re.findall(r"(\d+) users scored", project.logs())))


def questions(project: Project, edit: Callable[[list[dict]], list[dict]]) -> None:
    path = project.folder / "data/raw/LaMP_2N/dev_questions.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def one_item(project: Project) -> None:
    def edit(asked: list[dict]) -> list[dict]:
        for question in asked:
            if question["user_id"] == asked[0]["user_id"]:
                question["profile"][3]["text"] += " And one more thing."
        return asked

    questions(project, edit)


def a_user_more(project: Project) -> None:
    slice_of_sample(project.folder / "data/raw", "LaMP_2N", users=TEST_USERS + 1)


def a_user_less(project: Project) -> None:
    first = json.loads((project.folder / f"results/LaMP_2N/split/histories/{project.users()[0]}.json").read_text())
    questions(project, lambda asked: [q for q in asked if q["user_id"] != first["id"]])
    gone = {query["id"] for query in first["queries"]}
    golds(project, "dev", lambda given: [gold for gold in given if gold["id"] not in gone])


def golds(project: Project, part: str, edit: Callable[[list[dict]], list[dict]]) -> None:
    path = project.folder / f"data/raw/LaMP_2N/{part}_outputs.json"
    outputs = json.loads(path.read_text())
    path.write_text(json.dumps(outputs | {"golds": edit(outputs["golds"])}))


def a_gold(part: str) -> Callable[[Project], None]:
    def edit(given: list[dict]) -> list[dict]:
        return [given[0] | {"output": "travel" if given[0]["output"] != "travel" else "women"}, *given[1:]]

    return lambda project: golds(project, part, edit)


def config(**values: object) -> Callable[[Project], None]:
    return lambda project: project.config.update(values)


def package(file: str, old: str, new: str) -> Callable[[Project], None]:
    """The package with one text of it replaced by another."""

    def change(project: Project) -> None:
        project.package = project.folder / "package"
        shutil.copytree(ROOT / "oppu", project.package / "oppu", ignore=shutil.ignore_patterns("__pycache__"))
        path = project.package / "oppu" / file
        assert path.read_text().count(old) == 1
        path.write_text(path.read_text().replace(old, new))
        install(project.folder / "bin", project.package)

    return change


def version(step: str) -> Callable[[Project], None]:
    return package("keys.py", f'"{step}": 1', f'"{step}": 2')


def touch(project: Project) -> None:
    for path in project.folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and ".snakemake" not in path.parts:
            path.touch()


def a_missing_adapter(project: Project) -> None:
    (project.folder / f"results/LaMP_2N/k1/lora/full/users/{project.users()[1]}/adapter/adapter_config.json").unlink()


CHANGES: dict[str, tuple[Callable[[Project], None], Counts]] = {
    # k0 without an adapter reads no history.
    "one item of one user": (one_item, (2, 3, 3 * U)),
    "a user more": (a_user_more, (2, 4, 4 * (U + 1))),
    "a user less": (a_user_less, (0, 0, 4 * (U - 1))),
    "a user excluded": (lambda p: p.config["split"].update(exclude=[p.users()[0]]), (0, 0, 4 * (U - 1))),
    # Who is no longer tested trains the base, and everything stands on it.
    "N, the number of test users": (config(split={"test_users": 3}), (3 * 3, 5 * 3, 5 * 3)),
    "a hyperparameter of one task": (config(task_personal={"LaMP_2N": {"lr": 1e-3}}), (2 * U, 2 * U, 2 * U)),
    "a prompt template": (package("tasks.yaml", "{article} category:", "{article} its category:"), NEWS),
    "a label of the label table": (
        package("tasks.yaml", "labels: [travel,", "labels: [another, travel,"),
        (0, 0, NEWS[2]),
    ),
    "a test user's gold": (a_gold("dev"), (0, 0, NEWS[2])),
    "a base user's gold": (a_gold("train"), NEWS),
    "the model's revision": (config(model={"path": "somebody/some-model", "revision": "2"}), ALL),
    "the seed": (config(seed=1), ALL),
    "an augmentation more": (config(augmentations=["k0", "k1", "k2"]), (U, 2 * U, 2 * U)),
    "the version of retrieval": (version("retrieval"), (U, 2 * U, 2 * U)),
    "the version of generation": (version("generation"), (0, *ALL[1:])),
    "the version of scoring": (package("keys.py", "SCORING = 1", "SCORING = 2"), (0, 0, ALL[2])),
    "a comment in the package": (package("training.py", "\nimport torch\n", "\nimport torch  # a comment\n"), NOTHING),
    "how a run goes": (config(users_per_job=1, generation={"tokens_per_batch": 99}), NOTHING),
    "every file's time": (touch, NOTHING),
    "a missing file": (a_missing_adapter, (1, 0, 0)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_rebuilds_what_depends_on_it(project: Project, change: str) -> None:
    edit, expected = CHANGES[change]
    edit(project)
    score(project)
    assert counts(project) == expected
    if expected[0] <= 1:  # where a wrong time or a wrong stamp could bring a job back
        assert "Nothing to be done" in score(project, "-n")


def test_a_history_that_was_changed_by_hand_is_written_again(project: Project) -> None:
    path = project.folder / f"results/LaMP_2N/split/histories/{project.users()[0]}.json"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"a", b"b"))
    score(project)
    assert path.read_bytes() == whole
    assert counts(project) == NOTHING
    assert "Nothing to be done" in score(project, "-n")


def test_a_job_for_each_user_is_a_profile_that_makes_the_same_cells(project: Project) -> None:
    profile = ("--profile", "workflow/profiles/one-user")
    before = project.cells()
    score(project, *profile)
    assert counts(project) == NOTHING and project.cells() == before
    assert project.logs().count("1 users, 0 to train, 0 to predict") == 5 * U
    project.forget_logs()
    one_item(project)
    score(project, *profile)
    assert counts(project) == (2, 3, 3 * U)
    assert project.logs().count("1 users, ") == 4, "that user's jobs alone"
    project.forget_logs()
    score(project)
    assert counts(project) == NOTHING, "and back"


TARGETS = {
    "one cell": ("results/LaMP_2N/k1/lora/full/users/{user}/predictions.jsonl",),
    "a score file": ("results/LaMP_2N/k1/lora/full/scores.json",),
    "a table": ("results/tables/scores.csv",),
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_failed_cohort_fails_again_whatever_is_asked_for(project: Project, target: str) -> None:
    """Never exit code 0 with scores or answers from before. (For all targets at once: test_workflow.py.)"""
    project.config["tasks"] = ["LaMP_2N"]
    user = project.users()[0]
    asked = [part.format(user=user) for part in TARGETS[target]]
    if target != "a score file":  # which is there already
        project.run(*asked)
    project.config["task_personal"] = {"LaMP_2N": {"lr": 1e-3}}
    record = project.folder / f"results/LaMP_2N/k1/lora/full/users/{user}/cell.json"
    record.unlink()
    record.mkdir()  # what is to be written there cannot be
    for _ in range(2):
        assert "Nothing to be done" not in project.run(*asked, ok=False)
    record.rmdir()
    project.forget_logs()
    project.run(*asked)
    assert project.made() == (1, 1), "all others were kept"
    assert "Nothing to be done" in project.run(*asked)


def test_what_removed_users_left_is_listed_and_deleted_on_request_only(project: Project, tmp_path: Path) -> None:
    removed = project.users()[0]
    a_user_less(project)
    score(project)
    users = project.folder / "results/LaMP_2N/k0/none/full/users"
    outside = tmp_path / "outside"
    (outside / removed).mkdir(parents=True)
    (users / "..u-000000000000").mkdir()
    (project.folder / "results/LaMP_2N/k9").symlink_to(outside)
    before = project.cells()
    (users / "u-000000000000").symlink_to(outside)
    listed = project.oppu("gc")
    paths = [line.partition("\t")[0] for line in listed.splitlines()[:-1]]
    cells = {f"results/LaMP_2N/{setting}/users/{removed}" for setting in SETTINGS}
    assert set(paths) == cells | {"results/LaMP_2N/k0/none/full/users/u-000000000000"}
    assert "--delete deletes them" in listed
    assert all((project.folder / path).exists() for path in paths)
    project.oppu("gc", "--delete")
    assert before.keys() - project.cells().keys() == {path.removeprefix("results/") for path in cells}
    assert (outside / removed).is_dir() and (users / "..u-000000000000").is_dir()
    assert not (users / "u-000000000000").is_symlink()
    assert project.oppu("gc") == "0 files and folders, 0 bytes\n"
    assert "Nothing to be done" in score(project, "-n")


def test_settings_that_left_the_config_are_kept_unless_asked(project: Project) -> None:
    before = project.cells()
    project.config["augmentations"] = ["k0"]
    score(project)
    assert project.oppu("gc") == "0 files and folders, 0 bytes\n"
    listed = project.oppu("gc", "--config", "config/config.yaml").splitlines()[:-1]
    assert {line.partition("\t")[0] for line in listed} == {
        f"results/LaMP_2N/k1/{name}" for name in ("base", "lora/full", "none/full")
    }
    project.config["augmentations"] = ["k0", "k1"]
    score(project)
    assert counts(project) == NOTHING and project.cells() == before
    project.config["results"] = "elsewhere"
    project.command()
    assert "elsewhere" in project.oppu("gc", "results", "--config", "config/config.yaml", ok=False)


HEAVY = ("pydantic", "typer", "yaml", "numpy", "polars", "torch")


def test_what_finds_nothing_stale_imports_nothing_heavy(project: Project, tmp_path: Path) -> None:
    """The two commands that the workflow calls for each cohort and each setting."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    split, setting = "results/LaMP_2N/split", "results/LaMP_2N/k1/lora/full"
    lines = {
        "cells": f"{setting}/cohorts/000.json --recipe {setting}/recipe.json --base results/LaMP_2N/k1/base/base.json"
        f" --base-users {split}/base.jsonl " + " ".join(f"{split}/histories/{user}.json" for user in project.users()),
        "score-setting": f"{setting}/scores.json --scored {setting}/scored.jsonl --submission"
        f" {setting}/submission.json --users {split}/users.json --queries {split}/queries.jsonl",
    }

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "oppu.command", name, *lines[name].split()]
        environment = project.environment() | {"PYTHONPATH": path}
        return subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True, check=False)

    for name, line in lines.items():
        output = project.folder / line.split()[0]
        kept = output.read_bytes()
        output.unlink()
        done = run(name)
        assert done.returncode == 0, done.stderr
        assert output.read_bytes() == kept
    scores = (project.folder / setting / "scores.json").read_bytes()
    shutil.rmtree(project.folder / setting / ".scores")
    assert "4 users scored" in run("score-setting").stderr, "nor does counting"
    assert (project.folder / setting / "scores.json").read_bytes() == scores
    a_missing_adapter(project)
    assert "was imported" in run("cells").stderr, "the trap works"
