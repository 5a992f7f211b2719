"""Several real processes make a cohort's cells as one process does, whoever starts them and whoever dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from oppu import ranks
from oppu.checkpoints import kept
from oppu.files import read_json, write_json
from oppu.job import Job
from tests.workflow.project import TEST_USERS, Project

SETTING = "results/LaMP_2N/k0/lora/full"
LAUNCHERS = {
    "ours": [],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"],
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a base and histories, and no cell yet."""
    folder = tmp_path_factory.mktemp("processes") / "project"
    model = {"path": "data/models/oppu-tiny", "max_length": 256, "dtype": "float64"}
    project = Project.make(folder, augmentations=["k0"], peft=["lora"], users_per_job=100, model=model)
    project.run("results/LaMP_2N/k0/base/base.json", f"{SETTING}/recipe.json")
    return project


@pytest.fixture(scope="module")
def alone(prepared: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same, and its cells made by one process."""
    project = prepared.copy(tmp_path_factory.mktemp("alone") / "project")
    done = cells(project)
    assert done.returncode == 0, done.stderr
    return project


@pytest.fixture
def project(prepared: Project, tmp_path: Path) -> Project:
    return prepared.copy(tmp_path / "project")


def histories(project: Project) -> list[Path]:
    return sorted((project.folder / "results/LaMP_2N/split/histories").glob("*.json"))


def command(project: Project, *more: str, launcher: str = "ours") -> list[str]:
    base = "results/LaMP_2N/k0/base/base.json"
    launch = [f"-m{part}" if n == 0 else part for n, part in enumerate(LAUNCHERS[launcher])]
    what = ["cells", f"{SETTING}/cohorts/000.json", "--recipe", f"{SETTING}/recipe.json", "--base", base]
    what += ["--base-users", "results/LaMP_2N/split/base.jsonl", *more, *map(str, histories(project))]
    return [sys.executable, *launch, "-m", "oppu.cli", *what]


def cells(project: Project, *more: str, launcher: str = "ours", **environment: str) -> subprocess.CompletedProcess[str]:
    whole = project.environment() | environment
    return subprocess.run(
        command(project, *more, launcher=launcher),
        cwd=project.folder,
        env=whole,
        capture_output=True,
        text=True,
        check=False,
    )


def shares(project: Project) -> list[list[str]]:
    """Who goes to which of two ranks while nothing is made."""
    setting, base = project.folder / SETTING, project.folder / "results/LaMP_2N/k0/base"
    recipe = read_json(setting / "recipe.json")
    job = Job(setting, recipe, read_json(base / "base.json"), base, None, project.users(), None, setting / "none")
    opened, failed = job.open(histories(project))
    assert not failed
    return ranks.share_out({cell.user.key: job.cost(cell) for cell in opened}, 2)


def assert_same_cells(one: Project, other: Project, users: list[str]) -> None:
    """Equal keys and answers, and adapters equal in float64 to a tolerance: packing differs, and 6e-13 was seen.

    (Hugging Face's norms round to float32 in between, so that the bound is wider than for the trainer alone.)
    """
    assert users
    for user in users:
        first, second = (p.folder / SETTING / "users" / user for p in (one, other))
        records = [read_json(cell / "cell.json") for cell in (first, second)]
        keys = [{name: entry["key"] for name, entry in record["artefacts"].items()} for record in records]
        assert keys[0] == keys[1]
        assert (first / "predictions.jsonl").read_bytes() == (second / "predictions.jsonl").read_bytes()
        a, b = (load_file(cell / "adapter/adapter_model.safetensors") for cell in (first, second))
        assert a.keys() == b.keys()
        assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-11


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_make_what_one_makes(project: Project, alone: Project, launcher: str) -> None:
    more = ["--processes=2"] if launcher == "ours" else []
    done = cells(project, *more, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert f"rank 1 of 2: {TEST_USERS // 2} users" in done.stderr
    assert_same_cells(project, alone, project.users())
    stamps = [read_json(p.folder / SETTING / "cohorts/000.json") for p in (project, alone)]
    for stamp in stamps:  # records hold the sha256 of adapters, which differ by rounding
        stamp["files"] = sorted(stamp["files"])
    assert stamps[0] == stamps[1]


@pytest.mark.parametrize("ranked", [False, True])
def test_with_nothing_stale_no_rank_imports_torch(alone: Project, tmp_path: Path, ranked: bool) -> None:
    project = alone.copy(tmp_path / "project")
    stamp = project.folder / SETTING / "cohorts/000.json"
    stamp.unlink()
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / "torch.py").write_text("raise SystemExit('torch was imported')")
    path = f"{trap}{os.pathsep}{project.environment()['PYTHONPATH']}"
    if ranked:
        launch = {"WORLD_SIZE": "2", "MASTER_ADDR": "nobody", "MASTER_PORT": str(os.getpid()), "PYTHONPATH": path}
        both = [
            subprocess.Popen(command(project), cwd=project.folder, env=project.environment() | launch | {"RANK": rank})
            for rank in ("1", "0")
        ]
        assert [process.wait(120) for process in both] == [0, 0]
    else:
        done = cells(project, "--processes=2", PYTHONPATH=path)
        assert done.returncode == 0, done.stderr
        assert "0 to train, 0 to predict" in done.stderr
    assert stamp.is_file()
    shutil.rmtree(project.folder / SETTING / "users" / project.users()[0])
    assert "torch was imported" in cells(project, PYTHONPATH=path).stderr, "the trap works"


@pytest.mark.parametrize("launcher", ["ours", "accelerate"])
def test_a_user_that_fails_on_another_rank_is_named_and_the_others_are_kept(
    project: Project, alone: Project, launcher: str
) -> None:
    user = shares(project)[1][0]
    path = project.folder / f"results/LaMP_2N/split/histories/{user}.json"
    record = json.loads(path.read_text())
    query = record["queries"][0]
    query["input"] = "?" * len(query["input"])  # no question of this task, and as long, so that it costs the same
    path.write_text(json.dumps(record))
    assert user in shares(project)[1]
    done = cells(project, *(["--processes=2"] if launcher == "ours" else []), launcher=launcher)
    assert done.returncode != 0
    assert f"user {user}: " in done.stderr and f"1 of {TEST_USERS} users failed" in done.stderr
    assert not (project.folder / SETTING / "cohorts/000.json").exists()
    assert_same_cells(project, alone, [other for other in project.users() if other != user])


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc to find the other rank")
@pytest.mark.parametrize("dies", ["rank 1", "rank 0"])
def test_a_rank_that_is_killed(project: Project, alone: Project, dies: str) -> None:
    """Rank 1: rank 0 finishes its own users and names the others. Rank 0: rank 1 ends too. A next run does the rest."""
    theirs = shares(project)[1]
    temporary = Path(tempfile.mkdtemp(prefix="oppu-test-"))  # a short path, as sockets need
    run = subprocess.Popen(
        command(project, "--processes=2"),
        cwd=project.folder,
        env=project.environment() | {"TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 300
    users = project.folder / SETTING / "users"
    while not (trained := [user for user in theirs if (users / user / "cell.json").exists()]):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    kept = {user: (users / user / "adapter/adapter_model.safetensors").stat().st_mtime_ns for user in trained}
    (other,) = children(run.pid)
    os.kill(other if dies == "rank 1" else run.pid, signal.SIGKILL)
    _, text = run.communicate(timeout=300)
    assert run.returncode != 0
    if dies == "rank 1":
        assert "rank 1 of 2 ended before its users were done" in text
        assert all(f"user {user}: not made: " in text for user in theirs)
        assert_same_cells(project, alone, [user for user in project.users() if user not in theirs])
    else:
        while Path(f"/proc/{other}").exists():
            assert time.monotonic() < deadline, "rank 1 goes on without rank 0"
            time.sleep(0.1)
    assert not list(temporary.glob("oppu-*")), "no socket is left behind"
    shutil.rmtree(temporary)
    done = cells(project, "--processes=2")
    assert done.returncode == 0, done.stderr
    assert_same_cells(project, alone, project.users())
    assert all((users / u / "adapter/adapter_model.safetensors").stat().st_mtime_ns == at for u, at in kept.items())


def test_killed_ranks_go_on_from_their_own_checkpoints_to_the_same_bytes(project: Project, tmp_path: Path) -> None:
    recipe = project.folder / SETTING / "recipe.json"
    values = read_json(recipe)
    values["runtime"]["training"]["checkpoint_minutes"] = 0
    values["training"]["epochs"] = 12  # so that neither rank has ended when both have a checkpoint
    write_json(recipe, values)
    whole = project.copy(tmp_path / "whole")
    done = cells(whole, "--processes=2")
    assert done.returncode == 0, done.stderr
    path, deadline = project.folder / SETTING / "cohorts/000.checkpoint", time.monotonic() + 300
    run = subprocess.Popen(
        command(project, "--processes=2"), cwd=project.folder, env=project.environment(), start_new_session=True
    )
    while kept(path).keys() != {0, 1}:
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    done = cells(project, "--processes=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" adapters go on, ") == 2
    assert project.cells() == whole.cells() and len(whole.cells()) == TEST_USERS
    assert not path.exists()


def test_the_rule_takes_processes_from_the_profile(project: Project, alone: Project) -> None:
    project.run("--set-resources", "cells:processes=2", "--", f"{SETTING}/cohorts/000.json")
    assert "rank 1 of 2: 2 users" in project.logs()
    assert_same_cells(project, alone, project.users())
    assert "Nothing to be done" in project.run("--", f"{SETTING}/cohorts/000.json"), "how many is no reason to run"
