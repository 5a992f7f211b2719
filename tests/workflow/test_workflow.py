"""Any cell rebuilds alone, and nothing else is rebuilt: counted on a real run of the real workflow."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from oppu.files import read_user
from oppu.prompts import Prompt
from oppu.submissions import score_files
from oppu.tasks import task as task_record
from tests.workflow.project import ROOT, TEST_USERS, Project

NOTHING = "Nothing to be done"
PAPER = ROOT / "data/paper"
SETTINGS = [f"LaMP_2N/{augmentation}/{peft}/full" for augmentation in ("k0", "k1") for peft in ("none", "lora")]


def changed(before: dict, after: dict) -> set[str]:
    return {cell for cell in before.keys() | after.keys() if before.get(cell) != after.get(cell)}


def assert_same_cell(cell: str, one: Project, other: Project) -> None:
    """Equal keys and answers, and adapters equal to a tolerance: who is trained along decides how rows are packed."""
    first, second = (p.folder / "results" / cell for p in (one, other))
    records = [json.loads((folder / "cell.json").read_text()) for folder in (first, second)]
    keys = [{name: entry["key"] for name, entry in record["artefacts"].items()} for record in records]
    assert keys[0] == keys[1]
    assert (first / "predictions.jsonl").read_bytes() == (second / "predictions.jsonl").read_bytes()
    weights = [load_file(folder / "adapter/adapter_model.safetensors") for folder in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert max((weights[0][n] - weights[1][n]).abs().max().item() for n in weights[0]) < 1e-4


def test_a_run_makes_every_cell_and_table(finished: Project) -> None:
    assert len(finished.cells()) == len(SETTINGS) * TEST_USERS
    with (finished.folder / "results/tables/scores.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert {(r["augmentation"], r["peft"], r["metric"]) for r in rows} == {
        (a, p, m) for a in ("k0", "k1") for p in ("none", "lora") for m in ("accuracy", "f1")
    }
    assert finished.made() == (2 * TEST_USERS, 4 * TEST_USERS)
    for cell in finished.folder.glob("results/*/*/*/*/users/u-*/**/*"):
        assert cell.is_dir() or cell.stat().st_mode & 0o077 == 0, f"{cell} can be read by others"


def test_a_second_run_does_nothing(project: Project) -> None:
    assert NOTHING in project.run()


def test_one_changed_history_changes_one_user(project: Project) -> None:
    before = project.cells()
    path = project.folder / "data/raw/LaMP_2N/dev_questions.json"
    questions = json.loads(path.read_text())
    person = questions[0]["user_id"]
    for question in questions:
        if question["user_id"] == person:
            question["profile"][3]["text"] += " And one more thing."
    path.write_text(json.dumps(questions))
    project.run()
    (user,) = {Path(cell).name for cell in changed(before, project.cells())}
    assert json.loads((project.folder / f"results/LaMP_2N/split/histories/{user}.json").read_text())["id"] == person
    after = project.cells()
    for setting in SETTINGS:
        cell = f"{setting}/users/{user}"
        adapter = "adapter/adapter_model.safetensors"
        assert ("lora" in setting) == (adapter in after[cell])
        assert "lora" not in setting or before[cell][adapter] != after[cell][adapter]
    assert project.made() == (2, 3), "two adapters; predictions but for k0 without an adapter, which reads no history"


@pytest.mark.parametrize("what", ["folder", "adapter/adapter_model.safetensors", "predictions.jsonl"])
def test_a_missing_file_brings_its_cell_back_in_a_plain_run(project: Project, finished: Project, what: str) -> None:
    before = project.cells()
    cell = project.folder / "results" / SETTINGS[1] / "users" / project.users()[2]
    shutil.rmtree(cell) if what == "folder" else (cell / what).unlink()
    project.run()
    assert project.made() == {"folder": (1, 1), "predictions.jsonl": (0, 1)}.get(what, (1, 0))
    assert changed(before, project.cells()) <= {str(cell.relative_to(project.folder / "results"))}
    assert_same_cell(str(cell.relative_to(project.folder / "results")), project, finished)
    assert NOTHING in project.run()
    project.forget_logs()
    (cell / "predictions.jsonl").unlink()
    project.run()
    assert project.made() == (0, 1), "damage to the same cell is seen again"


def test_a_flipped_byte_is_found_refused_and_mended(project: Project, finished: Project) -> None:
    before = project.cells()
    user = project.users()[1]
    cell = f"{SETTINGS[3]}/users/{user}"
    adapter = project.folder / "results" / cell / "adapter/adapter_model.safetensors"
    data = bytearray(adapter.read_bytes())
    data[-5] ^= 1
    adapter.write_bytes(data)
    report = project.oppu("verify", ok=False)
    assert cell in report and "1 damaged" in report
    failing = project.run("-R", "score", ok=False)
    assert "score" in failing and "missing or changed" in project.logs()
    assert not (project.folder / "results" / SETTINGS[3] / "scores.json").exists()
    project.forget_logs()
    project.run("-R", "cells")
    assert project.made() == (1, 0)
    assert changed(before, project.cells()) <= {cell}
    assert_same_cell(cell, project, finished)
    assert "0 damaged" in project.oppu("verify")


def test_one_cell_on_a_fresh_tree_builds_what_it_needs(finished: Project, tmp_path: Path) -> None:
    fresh = Project.make(tmp_path / "project")
    cell = f"{SETTINGS[3]}/users/{finished.users()[0]}"
    fresh.run(f"results/{cell}/predictions.jsonl")
    assert list(fresh.cells()) == [cell]
    assert fresh.made() == (1, 1)
    assert [str(p.parent.relative_to(fresh.folder)) for p in fresh.folder.glob("results/*/*/base/base.json")] == [
        "results/LaMP_2N/k1/base"
    ]
    assert_same_cell(cell, fresh, finished)


def test_a_failing_user_fails_again_and_never_leaves_old_scores(project: Project) -> None:
    setting, user = SETTINGS[1], project.users()[0]
    cell = project.folder / "results" / setting / "users" / user
    shutil.rmtree(cell)
    cell.write_text("a file stands where the folder should be")
    others = {name: files for name, files in project.cells().items() if user not in name}
    for _ in range(2):
        text = project.run(ok=False)
        assert NOTHING not in text
        assert user in project.logs()
        assert "1 of 2 users failed" in project.logs()
    assert {name: files for name, files in project.cells().items() if user not in name} == others
    cell.unlink()
    project.run()
    assert NOTHING in project.run()


def test_a_cell_whose_cohort_failed_is_never_done(project: Project) -> None:
    user = project.users()[0]
    target = f"results/{SETTINGS[1]}/users/{user}/predictions.jsonl"
    project.run(target)
    project.config["task_personal"] = {"LaMP_2N": {"lr": 1e-3}}
    record = project.folder / f"results/{SETTINGS[1]}/users/{user}/cell.json"
    record.unlink()
    record.mkdir()
    for _ in range(2):
        assert NOTHING not in project.run(target, ok=False)
    record.rmdir()
    project.run(target)
    assert NOTHING in project.run(target)


def test_a_surplus_key_in_the_config_is_refused(project: Project) -> None:
    project.config["personal"]["learning_rate"] = 1
    assert "learning_rate" in project.run("-n", ok=False)


def test_the_report_holds_the_tables_and_the_figure(project: Project) -> None:
    project.run("--report", "report.html")
    text = (project.folder / "report.html").read_text(encoding="utf-8")
    outputs = ("table1.svg", "scores.csv", "seeds.csv", "table1.html", "table5.csv")
    captions = ("bootstrap intervals over users", "dagger", "over training seeds", "the model's own tokens")
    assert all(word in text for word in outputs + captions)


def test_table1_and_table5_are_targets_and_a_submission_scores_as_its_setting(finished: Project) -> None:
    for table in ("table1", "table5"):
        with (
            (finished.folder / f"results/tables/{table}.csv").open() as ours,
            (PAPER / f"{table}.csv").open() as theirs,
        ):
            columns = next(csv.reader(theirs))
            assert next(csv.reader(ours))[: len(columns)] == columns
        assert NOTHING in finished.run("-n", f"results/tables/{table}.csv")
    setting = finished.folder / "results" / SETTINGS[1]
    golds = finished.folder / "data/raw/LaMP_2N/dev_outputs.json"
    scores = json.loads((setting / "scores.json").read_text())
    found = score_files(setting / "submission.json", golds, task_record("LaMP_2N"))
    assert {name: scores[name] for name in found} == found


def test_the_recipe_beside_a_setting_says_what_was_used(finished: Project) -> None:
    recipe = json.loads((finished.folder / "results" / SETTINGS[1] / "recipe.json").read_text())
    assert (recipe["training"]["lr"], recipe["training"]["epochs"], recipe["training"]["rank"]) == (3e-3, 1, 4)
    assert recipe["task"]["prompt"].startswith("Which category does this article relate to")
    assert recipe["seed"] == 0 and recipe["versions"]["training"] >= 1


def test_an_adapter_answers_the_same_with_plain_peft_on_the_merged_base(finished: Project, tmp_path: Path) -> None:
    merged, task = tmp_path / "merged", task_record("LaMP_2N")
    finished.oppu("merge", "results/LaMP_2N/k0/base/base.json", str(merged))
    user = read_user(finished.folder / f"results/LaMP_2N/split/histories/{finished.users()[0]}.json")
    cell = finished.folder / "results" / SETTINGS[1] / "users" / user.key
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(merged), cell / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    answers = {}
    for query in user.queries:
        inputs = tokenizer(str(Prompt(task, task.query_fields(query.input))), return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=task.output_tokens, do_sample=False)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers[query.id] = text.strip()
    rows = [json.loads(line) for line in (cell / "predictions.jsonl").read_text().splitlines()]
    assert answers == {row["id"]: row["prediction"] for row in rows}
