"""A small real project: the repository's workflow on a slice of the sample, run by the real Snakemake."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
TEST_USERS, BASE_USERS = 4, 10


def sample(name: str, part: str, kind: str) -> object:
    path = ROOT / "data/sample/lamp" / name / f"{part}_{kind}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


def slice_of_sample(folder: Path, name: str, items: int = 10, users: int = TEST_USERS) -> None:
    """The first users of a task of the sample, with short histories, as plain JSON."""
    for part, count in (("dev", users), ("train", BASE_USERS)):
        questions, outputs = sample(name, part, "questions"), sample(name, part, "outputs")
        chosen = sorted({q["user_id"] for q in questions})[:count]
        kept = [q | {"profile": q["profile"][:items]} for q in questions if q["user_id"] in chosen]
        ids = {q["id"] for q in kept}
        golds = [g for g in outputs["golds"] if g["id"] in ids]
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{part}_questions.json").write_text(json.dumps(kept))
        (folder / name / f"{part}_outputs.json").write_text(json.dumps({"task": name, "golds": golds}))


CONFIG = {
    "data": "data/raw",
    "tasks": ["LaMP_2N"],
    "augmentations": ["k0", "k1"],
    "peft": ["none", "lora"],
    "split": {"test_users": "dev"},
    "users_per_job": 2,
    "model": {"path": "data/models/oppu-tiny", "max_length": 256},
    "base": {"rank": 4, "lr": 1e-3, "epochs": 1, "batch_size": 16, "weight_decay": 0.0},
    "personal": {"rank": 4, "lr": 3e-3, "epochs": 1, "batch_size": 4},
    "bootstrap": 200,
}


@dataclass
class Project:
    """A folder in which the workflow runs; `config` is written before each run."""

    folder: Path
    config: dict
    package: Path = ROOT
    """Where the package oppu is; a changed copy, in some tests."""

    @classmethod
    def make(cls, folder: Path, tasks: tuple[str, ...] = ("LaMP_2N",), **config: object) -> Project:
        folder.mkdir(parents=True)
        for name in ("Snakefile", "workflow", "envs", "profiles", "Makefile"):
            (folder / name).symlink_to(ROOT / name)
        (folder / "data/models").mkdir(parents=True)
        (folder / "data/models/oppu-tiny").symlink_to(ROOT / "data/models/oppu-tiny")
        (folder / "data/paper").symlink_to(ROOT / "data/paper")
        for name in tasks:
            slice_of_sample(folder / "data/raw", name)
        return cls(folder, copy.deepcopy(CONFIG) | {"tasks": list(tasks)} | config)

    def copy(self, folder: Path) -> Project:
        """The same project elsewhere, mtimes and Snakemake's records included."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Project(folder, json.loads(json.dumps(self.config)), self.package)

    def environment(self) -> dict[str, str]:
        """An `oppu` of the project's own (benchmarks/no_models.py writes one) stands before the installed one."""
        path = os.pathsep.join([str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        return os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(self.package)}

    def command(self, *arguments: str) -> list[str]:
        (self.folder / "config").mkdir(exist_ok=True)
        (self.folder / "config/config.yaml").write_text(yaml.safe_dump(self.config))
        return [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]

    def run(self, *arguments: str, ok: bool = True) -> str:
        """Run Snakemake; its output. Fails the test when the exit code is not what `ok` says."""
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        text = done.stdout + done.stderr
        assert (done.returncode == 0) is ok, f"exit code {done.returncode}\n{text}\n{self.logs()}"
        return text

    def oppu(self, *arguments: str, ok: bool = True) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "oppu.cli", *arguments],
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode == 0) is ok, done.stdout + done.stderr
        return done.stdout + done.stderr

    def logs(self) -> str:
        return "\n".join(f"== {p}\n{p.read_text()}" for p in sorted(self.folder.glob("results/logs/**/*.log")))

    def made(self) -> tuple[int, int]:
        """How many adapters were trained and how many users predicted, by the logs of the last run of each job."""
        lines = [line for line in self.logs().splitlines() if " to train, " in line]
        numbers = [(int(a.split()[-1]), int(b.split()[0])) for a, b in (s.split(" to train, ") for s in lines)]
        return sum(n for n, _ in numbers), sum(n for _, n in numbers)

    def forget_logs(self) -> None:
        shutil.rmtree(self.folder / "results/logs", ignore_errors=True)

    def cells(self) -> dict[str, dict[str, str]]:
        """sha256 of each file of each cell, by the cell's path."""
        found: dict[str, dict[str, str]] = {}
        for cell in sorted(self.folder.glob("results/*/*/*/*/users/u-*")):
            files = sorted(p for p in cell.rglob("*") if p.is_file())
            hashes = {str(p.relative_to(cell)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
            found[str(cell.relative_to(self.folder / "results"))] = hashes
        return found

    def users(self, task: str = "LaMP_2N") -> list[str]:
        return json.loads((self.folder / f"results/{task}/split/users.json").read_text())["users"]
