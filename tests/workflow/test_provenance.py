"""What each table says of how it was made, and that who ran it makes nothing stale."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.no_models import install
from oppu.provenance import commit
from tests.workflow.project import ROOT, Project

NOTHING = "Nothing to be done"


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def tables(project: Project) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (project.folder / "results/tables").iterdir()}


def record(project: Project, name: str = "provenance.json") -> dict:
    return json.loads(tables(project)[name])


def test_tables_say_what_they_were_made_from_and_who_ran_them_makes_nothing_stale(tmp_path: Path) -> None:
    project = Project.make(tmp_path / "project", augmentations=["k0"])
    install(project.folder / "bin", ROOT)
    git(project.folder, "init", "-q")
    git(project.folder, "add", "Snakefile")
    git(project.folder, "commit", "-qm", "one")
    project.run()
    first, before = record(project), tables(project)
    assert first["run"]["command"][:3] == ["snakemake", "--cores", "2"] and first["run"]["commit"] == commit(
        project.folder
    )
    assert first["run"]["config"]["personal"]["lr"] == 3e-3
    assert {"python", "torch", "transformers", "peft", "snakemake"} <= first["run"]["packages"].keys()
    made = first["made_from"]
    assert made["model"]["name"] == "oppu-tiny" and made["recipe_versions"]["training"] >= 1
    assert set(made["data"]) == {"LaMP_2N"} and len(made["config"]) == 64
    line = f"Made from config {made['config'][:12]}, data "
    for name in ("table1.md", "table1.html", "results.txt"):
        assert line in before[name].decode() and "provenance.json" in before[name].decode()
    assert "Made from data " in before["table5.md"].decode()
    for source in (first, record(project, "table5.provenance.json")):
        for name, known in source["tables"].items():
            assert hashlib.sha256(before[name]).hexdigest() == known

    git(project.folder, "commit", "--allow-empty", "-qm", "two")
    assert NOTHING in project.run("--printshellcmds")
    half = [project.folder / "results" / name for name in ("tables/.scores.csv.abcdefgh", "LaMP_2N/.plot.csv.abcdefgh")]
    theirs = project.folder / "results/tables/.table5.csv.abcdefgh"
    for path in (*half, theirs):
        path.touch()
    project.run("-R", "tables")
    assert not any(path.exists() for path in half), "what a killed writer left"
    assert theirs.exists(), "the rule table5 may be at work in the same folder"
    project.run("-R", "table5")
    assert tables(project) == before, "the run that first gave these bytes is kept"
    assert NOTHING in project.run()

    project.config["users_per_job"] = 1
    project.run()
    assert tables(project) == before, "how cohorts are cut changes no result"

    (project.folder / "results/tables/provenance.json").unlink()
    project.config["bootstrap"] = 50
    project.run("--printshellcmds")
    second = record(project)
    assert second["made_from"]["config"] != made["config"] and second["made_from"]["data"] == made["data"]
    assert second["run"]["commit"] == commit(project.folder) != first["run"]["commit"]
    assert "--printshellcmds" in second["run"]["command"]
    (project.folder / "results/tables/provenance.json").unlink()
    project.run()
    assert record(project)["made_from"] == second["made_from"], "a plain run brings a lost file back"


def test_a_commit_says_when_files_differ_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert commit(tmp_path) is None and not caplog.messages
    git(tmp_path, "init", "-q")
    (tmp_path / "a").write_text("one")
    git(tmp_path, "add", "a")
    git(tmp_path, "commit", "-qm", "one")
    git(tmp_path, "tag", "v1")
    clean = commit(tmp_path)
    assert clean is not None and len(clean) == 40
    (tmp_path / "a").write_text("two")
    assert commit(tmp_path) == f"{clean}-dirty"
    assert not caplog.messages
    # As in a container: the checkout is somebody else's.
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert commit(tmp_path) is None
    assert "which commit made them: fatal: detected dubious ownership" in caplog.text
