"""SIGKILL during training: one documented command continues, and every finished user stays as it was."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from tests.workflow.project import TEST_USERS, Project


def test_a_killed_run_continues_and_keeps_finished_users(tmp_path: Path) -> None:
    project = Project.make(tmp_path / "project", augmentations=["k0"], peft=["lora"], users_per_job=1)
    project.config["personal"] |= {"epochs": 20, "batch_size": 2}  # long enough to be hit in the middle
    run = subprocess.Popen(
        project.command(),
        cwd=project.folder,
        env=project.environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    users = project.folder / "results/LaMP_2N/k0/lora/full/users"
    deadline = time.monotonic() + 300
    while not (list(users.glob("u-*/predictions.jsonl")) and project.logs().count(" to train, ") >= 3):
        assert run.poll() is None and time.monotonic() < deadline, project.logs()
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    finished = {path.parent.name for path in users.glob("u-*/cell.json")}
    kept = {path: path.stat().st_mtime_ns for user in finished for path in users.glob(f"{user}/adapter/*")}
    assert 1 <= len(finished) < TEST_USERS
    project.forget_logs()
    done = subprocess.run(
        ["make", "-s", "resume"],
        cwd=project.folder,
        env=project.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + project.logs()
    assert project.made()[0] == TEST_USERS - len(finished)
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in kept.items())
    assert "0 damaged" in project.oppu("verify")
