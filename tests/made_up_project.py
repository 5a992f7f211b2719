"""A results folder as the workflow makes it, in a second: the product's own jobs, on models that do nothing."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import no_models
from oppu import base, job, pooled, profile_records, recipe, split
from oppu.config import load
from oppu.files import write_json
from oppu.tasks import fields_of, render, task

WORDS = [f"word{n}" for n in range(50)]


@dataclass
class Made:
    """The jobs of a configuration, run one after the other in this process."""

    folder: Path
    values: dict[str, Any]

    @classmethod
    def start(cls, folder: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> Made:
        cohort = ModuleType("oppu.cohort")
        cohort.Cohort = no_models.Cohort  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "oppu.cohort", cohort)
        monkeypatch.setattr(base, "_train", no_models.train_base)
        (folder / "model").mkdir(parents=True)
        (folder / "model/model.safetensors").write_bytes(b"weights")
        own = {"results": str(folder / "results"), "data": str(folder / "raw"), "tasks": ["LaMP_2N"]}
        model = {"path": str(folder / "model")}
        made = cls(folder, own | {"split": {"test_users": "dev"}, "model": model, "augmentations": ["k0"]} | values)
        made.values["profiles"] = {"own": str(folder / "own")}
        made.write_users({"train": 3, "dev": 3})
        return made

    def write_users(self, users: dict[str, int], items: int = 5) -> None:
        record, draw = task("LaMP_2N"), random.Random(0)
        (self.folder / "raw/LaMP_2N").mkdir(parents=True, exist_ok=True)
        for source, count in users.items():
            questions, golds = [], []
            for n in range(count):
                fields = [{name: " ".join(draw.choices(WORDS, k=6)) for name in record.history} for _ in range(items)]
                history = [{"id": str(i), **f, record.y: record.labels[0]} for i, f in enumerate(fields)]
                asked = render(
                    record.input, {name: " ".join(draw.choices(WORDS, k=6)) for name in fields_of(record.input)}
                )
                person = {"id": f"{source}-{n}", "user_id": f"{source}{n}", "input": asked, "profile": history}
                questions.append(person)
                golds.append({"id": person["id"], "output": record.labels[0]})
            where = self.folder / "raw/LaMP_2N"
            (where / f"{source}_questions.json").write_text(json.dumps(questions))
            (where / f"{source}_outputs.json").write_text(json.dumps({"task": "LaMP_2N", "golds": golds}))

    @property
    def config(self) -> Any:
        return load(self.values)

    @property
    def task(self) -> Path:
        return self.folder / "results/LaMP_2N"

    @property
    def users(self) -> list[str]:
        return json.loads((self.task / "split/users.json").read_text())["users"]

    @property
    def histories(self) -> list[Path]:
        return [self.task / f"split/histories/{user}.json" for user in self.users]

    def split(self) -> None:
        split.run(self.folder / "raw", "LaMP_2N", self.config.split, self.task / "split/users.json")

    def profiles(self) -> None:
        where = self.task / "profiles"
        write_json(where / "recipe.json", recipe.profile_recipe(self.config, "LaMP_2N"))
        profile_records.run(
            where / "cohorts/000.json", where / "recipe.json", self.histories, self.folder / "own/LaMP_2N"
        )
        profile_records.run_base(where / "base.json", where / "recipe.json", self.task / "split/base.jsonl")

    def bases(self) -> None:
        for augmentation in {setting[0] for setting in self.config.settings}:
            where = self.task / augmentation / "base"
            write_json(where / "recipe.json", recipe.base_recipe(self.config, "LaMP_2N", augmentation))
            base.run(
                where / "base.json", where / "recipe.json", self.task / "split/base.jsonl", "-", self.task / "profiles"
            )

    def recipes(self) -> None:
        for setting in self.config.settings:
            write_json(
                self.task.joinpath(*setting) / "recipe.json", recipe.cell_recipe(self.config, "LaMP_2N", *setting)
            )

    def cells(self) -> None:
        for augmentation, peft, history in sorted(self.config.settings, key=lambda setting: setting[1] == "swapped"):
            where, manifest = self.task / augmentation / peft / history, self.task / augmentation / "base/base.json"
            if peft == "pooled":
                found = (where / "recipe.json", manifest, self.histories, "-", self.task / "profiles")
                pooled.run(where / "pooled.json", *found)
            self.job(where, manifest)

    def job(self, where: Path, manifest: Path) -> None:
        stamp, rest = where / "cohorts/000.json", (self.task / "split/base.jsonl", "-", self.task / "profiles")
        job.run(stamp, where / "recipe.json", manifest, self.histories, *rest, self.task / "split/users.json")

    def run(self) -> None:
        """All jobs, in the order of the workflow."""
        self.split()
        self.profiles()
        self.bases()
        self.recipes()
        self.cells()
