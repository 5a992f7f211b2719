"""`dvc repro` records what Snakemake made, recomputes nothing, and shows the metrics."""

from __future__ import annotations

import json
import subprocess
import sys

import yaml

from tests.workflow.project import ROOT, Project


def test_dvc_repro_records_without_recomputing(project: Project) -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text().replace("data/sample/lamp", "data/raw"))
    stages["stages"]["split"]["matrix"]["task"] = ["LaMP_2N"]
    stages["stages"]["cells"]["matrix"] = {"task": ["LaMP_2N"], "setting": ["k0/none/full", "k0/lora/full"]}
    for stage in stages["stages"].values():
        stage["deps"] = [dep for dep in stage["deps"] if dep.startswith("data/raw")]
    (project.folder / "dvc.yaml").write_text(yaml.safe_dump(stages))
    (project.folder / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    before = project.cells()

    def run(*command: str) -> str:
        done = subprocess.run(
            command, cwd=project.folder, env=project.environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr + project.logs()
        return done.stdout + done.stderr

    run("git", "init", "-q")
    run(sys.executable, "-m", "dvc", "init", "-q")
    run(sys.executable, "-m", "dvc", "config", "core.analytics", "false")
    project.command()  # writes the config
    run(sys.executable, "-m", "dvc", "repro")
    assert project.made() == (0, 0)
    assert project.cells() == before
    assert "up to date" in run(sys.executable, "-m", "dvc", "repro")
    shown = json.loads(run(sys.executable, "-m", "dvc", "metrics", "show", "--json"))
    files = shown[""]["data"]
    assert {path.rsplit("/", 1)[0] for path in files} == {
        "results/LaMP_2N/k0/none/full",
        "results/LaMP_2N/k0/lora/full",
    }
    assert all(0 <= entry["data"]["accuracy"] <= 1 for entry in files.values())
    assert "scores.json" in run("git", "status", "--porcelain", "-uall"), "metrics are for git, not only for the cache"


def test_the_matrix_of_dvc_is_that_of_the_default_config() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    settings = [f"{a}/{p}/full" for a in config["augmentations"] for p in config["peft"]]
    assert stages["cells"]["matrix"] == {"task": config["tasks"], "setting": settings}
    assert stages["split"]["matrix"] == {"task": config["tasks"]}
    assert all(stage["cmd"].startswith("snakemake ") for stage in stages.values())
