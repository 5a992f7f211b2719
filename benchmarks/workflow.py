"""What the workflow itself costs, with models that do nothing: the paper's grid of 7 tasks, 13 columns and 100 users.

    python benchmarks/workflow.py --json workflow.json
    python benchmarks/workflow.py --users-per-job 1 --repeats 1                     a job for each of the 9,100 cells
    python benchmarks/workflow.py --users-per-job 1 --tasks LaMP_2N --users 10      the same, of a smaller grid

Snakemake, the rules and `oppu` are the real ones, on made-up users with short histories; only loading a model, training
and generating are replaced (no_models.py). Timed, each as a command of its own:

    first            the first run of all
    dry_run          -n with everything but the splits still to do
    dry_run_done     -n with everything done
    no_change        a run with everything done
    one_user         a run after one test user of one task has got one more item
    check_all_cells  -R cells --until cells: every cell's key and files are checked, nothing is trained
    check_and_score  -R cells: the same, and every setting's scores and the tables after it
    verify           oppu verify: every cell's files are checked
    status           oppu status: every cell's key is checked, and whether its files are there

Each in seconds of wall time and, besides, of processor time, its jobs' included, which other work on the machine
hardly changes. The first run is made with 100 users per job; with another --users-per-job all cells are then checked in
such jobs (`check_all_cells`) before the rest is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from common import ROOT, Seconds, finish, parser, show, spread, timed
from no_models import install

from oppu.records import InputError
from oppu.tasks import Task, fields_of, render, task

TASKS = ["LaMP_1", "LaMP_2N", "LaMP_2M", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"]
COLUMNS = ["k0", "random", "k1", "k2", "k4", "profile-k0", "profile-k1"]
GOALS = {"dry_run": 5.0, "no_change": 10.0, "one_user": 15.0, "check_all_cells": 30.0, "status": 2.0}
"""Seconds, for the paper's grid at 100 users a job; one_user's is besides training."""
WORDS = [f"word{n}" for n in range(500)]


def text(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS, k=12))


def item(record: Task, number: int, draw: random.Random) -> dict[str, Any]:
    fields = {name: text(draw) for name in record.history}
    if record.y and record.labels:
        fields[record.y] = draw.choice(record.labels)
    return {"id": str(number), "date": f"{2000 + number // 12}-{number % 12 + 1:02d}", **fields}


def write_users(folder: Path, record: Task, source: str, users: int, items: int, queries: int) -> None:
    """Users in LaMP's format: {folder}/{task}/{source}_questions.json and …_outputs.json; the same bytes each time."""
    draw = random.Random(f"{record.name} {source}")
    questions, golds = [], []
    for user in range(users):
        history = [item(record, number, draw) for number in range(items)]
        for number in range(queries):
            asked = {"id": f"{source}-{user}-{number}", "user_id": f"{source}-{user}", "profile": history}
            fields = {name: text(draw) for name in fields_of(record.input)}
            questions.append(asked | {"input": render(record.input, fields)})
            golds.append({"id": asked["id"], "output": draw.choice(record.labels or [text(draw)])})
    (folder / record.name).mkdir(parents=True, exist_ok=True)
    outputs = {"task": record.name, "golds": golds}
    for kind, data in (("questions", questions), ("outputs", outputs)):
        (folder / record.name / f"{source}_{kind}.json").write_text(json.dumps(data), encoding="utf-8")


@dataclass
class Meter:
    """Seconds of named commands, by the wall's clock and the processors'."""

    wall: Seconds = field(default_factory=dict)
    processor: Seconds = field(default_factory=dict)

    def time(self, name: str, run: Callable[[], object]) -> None:
        before = self._spent()
        self.wall.setdefault(name, []).append(timed(run))
        self.processor.setdefault(name, []).append(self._spent() - before)

    def _spent(self) -> float:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)  # commands that have ended, and what they started
        return ended.ru_utime + ended.ru_stime


@dataclass(frozen=True)
class Project:
    """A folder in which the repository's workflow runs with models that do nothing."""

    folder: Path
    options: argparse.Namespace

    def make(self) -> None:
        for name in ("Snakefile", "workflow", "profiles", "envs", "data/models", "data/paper"):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).symlink_to(ROOT / name)
        for name in self.options.tasks:
            for source, users in (("train", 10), ("dev", self.options.users)):
                write_users(self.folder / "data/raw", task(name), source, users, self.options.items, queries=2)
        install(self.folder / "bin", ROOT)
        self.configure(100)

    def configure(self, users_per_job: int) -> None:
        config = {
            "data": "data/raw",
            "tasks": self.options.tasks,
            "augmentations": self.options.columns,
            "peft": ["none", "lora"],
            "split": {"test_users": "dev"},
            "users_per_job": users_per_job,
            "model": {"path": "data/models/oppu-tiny", "max_length": 512},
        }
        (self.folder / "config").mkdir(exist_ok=True)
        (self.folder / "config/config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")

    def run(self, *arguments: str) -> str:
        """Run Snakemake; what it printed."""
        return self.command(sys.executable, "-m", "snakemake", "--cores", self.options.cores, *arguments)

    def command(self, *command: str) -> str:
        """Run a command with the project's `oppu` on the PATH; what it printed."""
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled once, as it is where packages are installed
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise InputError([f"{' '.join(command)} ended with {done.returncode}", done.stdout[-4000:]])
        return done.stdout

    def jobs(self) -> int:
        """How many jobs a dry run lists."""
        lines = self.run("-n", "--quiet", "rules").splitlines()
        return next((int(line.split()[1]) for line in lines if line.split()[:1] == ["total"]), 0)

    def splits(self) -> list[str]:
        return [f"results/{name}/split/users.json" for name in self.options.tasks]

    def add_item(self) -> None:
        """Give the first test user of the first task one more item."""
        path = self.folder / "data/raw" / self.options.tasks[0] / "dev_questions.json"
        questions = json.loads(path.read_text(encoding="utf-8"))
        user, number = questions[0]["user_id"], len(questions[0]["profile"])
        new = item(task(self.options.tasks[0]), number, random.Random(number))
        for question in questions:
            question["profile"] += [new] if question["user_id"] == user else []
        path.write_text(json.dumps(questions), encoding="utf-8")

    def made(self, since: float) -> dict[str, int]:
        """Adapters trained and users predicted since a time, by the logs of `oppu cells`."""
        logs = [path for path in self.folder.glob("results/logs/*/*/*/full/[0-9]*.log") if path.stat().st_mtime > since]
        found = [re.findall(r"(\d+) to train, (\d+) to predict", path.read_text(encoding="utf-8")) for path in logs]
        trained, predicted = (sum(int(pair[side]) for pairs in found for pair in pairs) for side in (0, 1))
        return {"jobs": len(logs), "trained": trained, "predicted": predicted}


def measure(project: Project) -> tuple[Meter, dict[str, Any]]:
    """Seconds of every command, and what the runs that should do little have done."""
    options, meter, done = project.options, Meter(), {}  # type: argparse.Namespace, Meter, dict[str, Any]
    project.run("--", *project.splits())
    project.configure(options.users_per_job)
    for _ in range(options.repeats):
        meter.time("dry_run", lambda: project.run("-n", "--quiet", "rules"))
    done["jobs_of_first_run"] = project.jobs()
    project.configure(100)
    meter.time("first", project.run)
    if options.users_per_job != 100:
        project.configure(options.users_per_job)
        done["check_all_cells"] = count(project, meter, "check_all_cells", project.run)
    sides: dict[str, Callable[[], object]] = {
        "dry_run_done": lambda: project.run("-n", "--quiet", "rules"),
        "no_change": project.run,
        "one_user": project.run,
        "check_all_cells": lambda: project.run("-R", "cells", "--until", "cells"),
        "check_and_score": lambda: project.run("-R", "cells"),
        "verify": lambda: project.command("oppu", "verify"),
        "status": lambda: project.command("oppu", "status"),
    }
    if options.users_per_job != 100:
        del sides["check_all_cells"], sides["check_and_score"]
    for _ in range(options.repeats):
        for name, run in sides.items():
            if name == "one_user":
                project.add_item()
            done[name] = count(project, meter, name, run)
    return meter, done


def count(project: Project, meter: Meter, name: str, run: Callable[[], object]) -> dict[str, int]:
    """Time a run; what it made."""
    before = project.folder / "clock"
    before.touch()
    meter.time(name, run)
    return project.made(before.stat().st_mtime)


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, metavar="TASK", help="tasks (all seven)")
    arguments.add_argument(
        "--columns", nargs="+", default=COLUMNS, metavar="NAME", help="augmentations, without and with LoRA (Table 1's)"
    )
    arguments.add_argument("--users", type=int, default=100, help="test users of each task (100)")
    arguments.add_argument("--items", type=int, default=12, help="items of a history (12)")
    arguments.add_argument("--users-per-job", type=int, default=100, help="the config's users_per_job (100)")
    arguments.add_argument("--cores", default="all", help="Snakemake's --cores (all)")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="oppu-workflow-") as folder:
        project = Project(Path(folder), options)
        project.make()
        meter, done = measure(project)
    figures = {name: spread(values) for name, values in meter.wall.items()}
    processor = {name: spread(values) for name, values in meter.processor.items()}
    goals = GOALS if options.users_per_job == 100 else {}
    rows = [[n, goals.get(n), figure["median"], processor[n]["median"]] for n, figure in figures.items()]
    show(["", "goal (s)", "median (s)", "of processors (s)"], rows)
    for name, what in done.items():
        sys.stdout.write(f"{name}: {what}\n")
    finish(options, figures, {}, processor_seconds=processor, done=done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
