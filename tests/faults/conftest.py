from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.workflow.project import Project

TASK, SETTING = "LaMP_2N", "results/LaMP_2N/k1/lora/full"
STAGES = ("split", "base", "personal", "prediction", "scoring", "report")


def make(folder: Path, dtype: str = "float32") -> Project:
    """Four users with histories of 4, 6, 8 and 10 items in one cohort: the first is finished well before the last."""
    model = {"path": "data/models/oppu-tiny", "max_length": 256, "dtype": dtype}
    project = Project.make(folder, augmentations=["k1"], peft=["lora"], users_per_job=4, model=model)
    project.config["base"] |= {"epochs": 3, "batch_size": 4, "tokens_per_batch": 2048}
    project.config["personal"] |= {"epochs": 8, "batch_size": 2, "lr": 5e-4, "tokens_per_batch": 2048}
    path = project.folder / f"data/raw/{TASK}/dev_questions.json"
    questions = json.loads(path.read_text())
    users = sorted({question["user_id"] for question in questions})
    for question in questions:
        question["profile"] = question["profile"][: 4 + 2 * users.index(question["user_id"])]
    path.write_text(json.dumps(questions))
    return project


def stage(project: Project) -> str | None:
    """What a run is at, by the logs it has written so far; None before the first job."""
    logs = project.folder / "results/logs"
    cells = logs / f"{TASK}/k1/lora/full/000.log"
    lines = cells.read_text() if cells.exists() else ""
    steps = [line.split(": ")[1].split(" steps")[0].split(" of ") for line in lines.splitlines() if " steps, " in line]
    begun = {
        "split": (logs / f"{TASK}/split.log").exists(),
        "base": (logs / f"{TASK}/k1/base.log").exists(),
        "personal": " to train, " in lines,
        "prediction": " 0 to train, " in lines or any(done == of for done, of in steps),
        "scoring": (logs / f"{TASK}/k1/lora/full/score.log").exists(),
        "report": (logs / "tables.log").exists(),
    }
    return next((name for name in reversed(STAGES) if begun[name]), None)


@dataclass
class Reference:
    """An uninterrupted run, and how many seconds it was at each stage."""

    project: Project
    seconds: dict[str, float]


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """Uninterrupted runs by dtype, made when they are asked for."""

    class Made(dict[str, Reference]):
        def __missing__(self, dtype: str) -> Reference:
            project = make(tmp_path_factory.mktemp("faults") / "project", dtype)
            began: dict[str, float] = {}
            with subprocess.Popen(
                project.command(), cwd=project.folder, env=project.environment(), stderr=subprocess.DEVNULL
            ) as run:
                while run.poll() is None:
                    began.setdefault(stage(project) or "start", time.monotonic())
                    time.sleep(0.01)
            assert run.returncode == 0, project.logs()
            times = [*(began[name] for name in STAGES), time.monotonic()]
            seconds = {name: times[n + 1] - times[n] for n, name in enumerate(STAGES)}
            self[dtype] = Reference(project, seconds)
            return self[dtype]

    return Made()


@pytest.fixture(scope="session")
def finished(references: dict[str, Reference]) -> Project:
    """A project whose workflow has run to its end. Tests work on copies."""
    return references["float32"].project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    copy = finished.copy(tmp_path / "project")
    copy.forget_logs()
    return copy
