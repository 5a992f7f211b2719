"""`oppu status` against what the jobs themselves would make, for each kind of change."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from oppu import job
from oppu.records import InputError
from oppu.status import as_json, status, text_of
from tests.made_up_project import Made
from tests.workflow.project import ROOT

KINDS = ["swapped", "none", "lora", "pooled"]
AUGMENTATIONS = ["k0", "random", "k1", "profile-k0"]
SETTINGS = len(KINDS) * 3 + 1


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    found = Made.start(tmp_path / "made", monkeypatch, augmentations=AUGMENTATIONS, peft=KINDS, benchmark=True)
    found.run()
    return found


def states(made: Made) -> dict[str, int]:
    return as_json(status(made.config))["total"]


def remade(made: Made, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many cells each setting's job finds stale, by the full check of keys and bytes, and makes."""
    found: dict[str, int] = {}
    make = job.Job.make

    def counted(self: job.Job, cells: list, *rest: int) -> dict[str, str]:
        found["/".join(self.setting.parts[-3:])] = sum(bool(cell.stale) for cell in cells)
        return make(self, cells, *rest)

    monkeypatch.setattr(job.Job, "make", counted)
    made.run()
    return found


def item(made: Made) -> None:
    path = made.folder / "raw/LaMP_2N/dev_questions.json"
    questions = json.loads(path.read_text())
    questions[0]["profile"][2]["text"] += " changed"
    path.write_text(json.dumps(questions))
    made.split()


def base_user(made: Made) -> None:
    path = made.folder / "raw/LaMP_2N/train_questions.json"
    path.write_text(path.read_text().replace("word1 ", "word2 "))
    made.split()


def own_profile(made: Made) -> None:
    path = made.folder / f"own/LaMP_2N/{made.users[0]}.txt"
    path.parent.mkdir(parents=True)
    path.write_text("likes rain")


def weights(made: Made) -> None:
    (made.folder / "model/model.safetensors").write_bytes(b"other weights")


CHANGES: dict[str, Callable[[Made], object]] = {
    "nothing": lambda made: None,
    "an item": item,
    "a base user": base_user,
    "a hyperparameter": lambda made: made.values.update(personal={"lr": 0.5}),
    "the seed": lambda made: made.values.update(seed=7),
    "the longest answer": lambda made: made.values.update(generation={"max_new_tokens": 3}),
    "tokens of a pass": lambda made: made.values.update(personal={"tokens_per_batch": 99}, users_per_job=1),
    "an augmentation": lambda made: made.values.update(augmentations=[*AUGMENTATIONS, "k2"]),
    "own profile": own_profile,
    "weights": weights,
    "touched weights": lambda made: (made.folder / "model/model.safetensors").touch(),
    "a moved model": lambda made: made.values.update(
        model={"path": str(shutil.move(made.folder / "model", made.folder / "m"))}
    ),
    "a cell": lambda made: shutil.rmtree(made.task / "k0/none/full/users" / made.users[0]),
    "an adapter": lambda made: (
        made.task / f"k1/lora/full/users/{made.users[1]}/adapter/adapter_model.safetensors"
    ).unlink(),
    "a cut record": lambda made: (made.task / f"k1/none/full/users/{made.users[1]}/cell.json").write_text("{"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_fresh_is_what_the_jobs_make(made: Made, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    CHANGES[change](made)
    found = {count.setting: count.states for count in status(made.config)}
    expected = remade(made, monkeypatch)
    if change == "an adapter":  # made anew first, here to the very bytes that were borrowed
        expected["k1/swapped/full"] = 1
    assert {name: n.total() - n["fresh"] for name, n in found.items() if n.total() > n["fresh"]} == expected
    assert bool(expected) is (change not in ("nothing", "tokens of a pass", "touched weights", "a moved model"))
    total = len(made.users) * len(made.config.settings)
    assert states(made) == {"fresh": total, "stale": 0, "failed": 0, "missing": 0}


def test_an_appended_item_of_an_adapter_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made.start(tmp_path / "made", monkeypatch, personal={"start": "previous", "replay": 0.5})
    made.run()
    path = made.folder / "raw/LaMP_2N/dev_questions.json"
    questions = json.loads(path.read_text())
    questions[0]["profile"].append(questions[0]["profile"][0] | {"id": "new", "text": "new"})
    path.write_text(json.dumps(questions))
    made.split()
    counts = {count.setting: count.states for count in status(made.config)}
    assert (counts["k0/lora/full"]["fresh"], counts["k0/lora/full"]["stale"]) == (2, 1)
    made.run()
    assert states(made)["fresh"] == 2 * 3, "its chain of two trainings is as it should be"


def test_before_anything_ran_all_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made.start(tmp_path / "made", monkeypatch, peft=["none"])
    (count,) = status(made.config)
    assert (count.cells, count.note) == (None, "no split yet")
    made.values["split"] = {"test_users": 2}
    assert states(made)["missing"] == 2
    made.split()
    (count,) = status(made.config)
    assert (count.states["missing"], count.note) == (2, "base missing")


def test_a_failed_user_is_failed_until_a_job_succeeds(made: Made) -> None:
    user, where = made.users[0], made.task / "k0/lora/full"
    shutil.rmtree(where / "users" / user)
    (where / "users" / user).write_text("a file stands where the folder should be")
    assert states(made)["missing"] == 1
    with pytest.raises(InputError, match="1 of 3 users failed"):
        made.job(where, made.task / "k0/base/base.json")
    (count,) = [count for count in status(made.config) if count.failures]
    assert count.states == {"fresh": 2, "failed": 1} and "Not a directory" in count.failures[user]
    assert user in text_of([count])
    assert (where / f"failed/{user}.json").stat().st_mode & 0o077 == 0
    (where / "users" / user).unlink()
    made.job(where, made.task / "k0/base/base.json")
    assert states(made)["failed"] == 0 and not list((where / "failed").iterdir())


def test_a_job_that_ends_as_a_whole_fails_for_all_its_stale_users(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: job.Job, *rest: object) -> dict[str, str]:
        raise MemoryError("no room")

    monkeypatch.setattr(job.Job, "make", broken)
    made.values["personal"] = {"lr": 0.5}
    made.recipes()
    with pytest.raises(MemoryError):
        made.job(made.task / "k0/lora/full", made.task / "k0/base/base.json")
    counts = {count.setting: count for count in status(made.config)}
    assert counts["k0/lora/full"].states == {"failed": 3}
    assert set(counts["k0/lora/full"].failures.values()) == {"MemoryError: no room"}


def test_the_command_prints_json_and_never_imports_torch(made: Made) -> None:
    config = made.folder / "config.yaml"
    config.write_text(yaml.safe_dump(made.values))
    code = "import sys; from oppu.cli import app; app(standalone_mode=False); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "status", "--json", "--config", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["total"] == states(made) and len(found["settings"]) == SETTINGS
    assert [row["setting"] for row in found["settings"]][:2] == ["k0/swapped/full", "k0/none/full"]
