"""SIGKILL during training: one documented command continues, and every finished user stays as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.workflow.project import TEST_USERS, Project


def test_a_killed_run_continues_and_keeps_finished_users(tmp_path: Path) -> None:
    project = Project.make(tmp_path / "project", augmentations=["k0"], peft=["lora"], users_per_job=100)
    project.config["personal"] |= {"epochs": 6, "batch_size": 2, "tokens_per_batch": 64}  # one user at a time
    run = subprocess.Popen(
        project.command(),
        cwd=project.folder,
        env=project.environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    users = project.folder / "results/LaMP_2N/k0/lora/full/users"
    deadline = time.monotonic() + 300
    while not list(users.glob("u-*/cell.json")):
        assert run.poll() is None and time.monotonic() < deadline, project.logs()
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert not list(users.parent.glob("cohorts/*.json"))
    kept = {p: p.stat().st_mtime_ns for p in users.glob("u-*/adapter/*") if (p.parents[1] / "cell.json").exists()}
    finished = {path.parents[1].name for path in kept}
    assert 1 <= len(finished) < TEST_USERS
    done = subprocess.run(
        ["make", "-s", "resume"],
        cwd=project.folder,
        env=project.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + project.logs()
    assert project.made() == (TEST_USERS - len(finished), TEST_USERS)
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in kept.items())
    assert "0 damaged" in project.oppu("verify")
