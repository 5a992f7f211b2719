"""Profiles and examples for clusters, as far as they can be checked without one (tests/slurm has one)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from snakemake.profiles import ProfileConfigFileParser

from tests.workflow.project import Project

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ROOT / "workflow/profiles"


def slurm_profile() -> dict[str, object]:
    with (PROFILES / "slurm/config.yaml").open() as f:
        return dict(ProfileConfigFileParser().parse(f))


def resources(profile: dict[str, object], key: str) -> dict[str, str]:
    values = profile[key]
    assert isinstance(values, list)
    return dict(value.split("=", 1) for value in values)


def test_without_variables_slurm_is_told_no_account_and_no_partition() -> None:
    profile = slurm_profile()
    assert resources(profile, "default-resources") == {"mem_mb": "4000 * attempt", "runtime": "60"}
    cells = {name: value for name, value in resources(profile, "set-resources").items() if name.startswith("cells:")}
    expected = {"mem_mb": "32000 * attempt", "runtime": "1440", "gpu": "1", "processes": "1"}
    assert cells == {f"cells:{name}": value for name, value in expected.items()}


def test_variables_give_account_partitions_gpus_memory_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that looks like a number stays a name."""
    given = {"ACCOUNT": "0123", "PARTITION": "small", "GPU_PARTITION": "a100", "GPUS": "4", "MEM_MB": "1", "HOURS": "2"}
    for name, value in given.items():
        monkeypatch.setenv(f"OPPU_SLURM_{name}", value)
    profile = slurm_profile()
    asked = resources(profile, "default-resources")
    assert (asked["slurm_account"], asked["slurm_partition"]) == ("'0123'", "'small'")
    more = resources(profile, "set-resources")
    assert [more[f"cells:{name}"] for name in ("gpu", "processes", "runtime")] == ["4", "4", "120"]
    assert [more[f"base:{name}"] for name in ("gpu", "mem_mb", "slurm_partition")] == ["1", "1 * attempt", "'a100'"]
    assert "cells=16" in profile["set-threads"]  # type: ignore[operator]


def test_the_jobs_of_the_slurm_profile_are_the_rules_that_load_a_model() -> None:
    text = "".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    rules = {part.split(":")[0] for part in text.split("\nrule ")[1:] if "\n        gpu=" in part}
    assert rules == {name.split(":")[0] for name in resources(slurm_profile(), "set-resources")}


def test_the_kubernetes_example_runs_dry(tmp_path: Path) -> None:
    """The command of its container, as it stands, up to the point where jobs would run."""
    job = yaml.safe_load((PROFILES / "kubernetes/job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (script,) = container["args"]
    assert container["command"] == ["sh", "-c"] and script.count("exec snakemake ") == 1
    project = Project.make(tmp_path / "project")
    project.command()  # writes the config
    (project.folder / "config/paper.yaml").write_text((project.folder / "config/config.yaml").read_text())
    done = subprocess.run(
        ["sh", "-c", script.replace("exec snakemake", "exec snakemake --dry-run")],
        cwd=project.folder,
        env=project.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "checkpoint split" in done.stdout + done.stderr
