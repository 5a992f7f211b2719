"""DVC records, ships and forgets what Snakemake makes; it recomputes nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import yaml

from oppu.config import load
from oppu.files import read_base
from oppu.split import user_key
from tests.workflow.project import ROOT, Project

SETTINGS = ["profile-k0/none/full", "profile-k0/lora/full"]
DVC = (sys.executable, "-m", "dvc")


@dataclass
class Recorded(Project):
    """A project in git, with the repository's own DVC files."""

    def call(self, *command: str | Path, ok: bool = True, folder: Path | None = None) -> str:
        """Run a command in which a new file is its owner's alone; its output."""
        people = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        own = {"DVC_SITE_CACHE_DIR": str(self.folder.parent / "site"), "DVC_NO_ANALYTICS": "1"}
        done = subprocess.run(
            command,
            cwd=folder or self.folder,
            env=self.environment() | people | own | {"GIT_CONFIG_GLOBAL": os.devnull},
            capture_output=True,
            text=True,
            check=False,
            umask=0o077,
        )
        text = done.stdout + done.stderr
        assert (done.returncode == 0) is ok, text + self.logs()
        return text

    def dvc(self, *arguments: str | Path) -> str:
        return self.call(*DVC, *arguments)

    def commit(self) -> None:
        self.call("git", "add", "-A")
        self.call("git", "commit", "-q", "-m", "a step")

    def scores(self) -> dict[str, str]:
        found = [*self.folder.glob("results/*/*/*/*/scores.json"), *self.folder.glob("results/*/plot.csv")]
        return {str(path.relative_to(self.folder)): path.read_text() for path in found}


def canary(user_id: str) -> str:
    return "zq" + user_id.replace("-", "x") + "qz"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A project that has run, whose every item carries its user's canary, and whose record is in git."""
    made = Project.make(tmp_path_factory.mktemp("dvc") / "project", augmentations=["profile-k0"], users_per_job=100)
    project = Recorded(made.folder, made.config)
    for part in ("dev", "train"):
        path = project.folder / f"data/raw/LaMP_2N/{part}_questions.json"
        questions = json.loads(path.read_text())
        for question in questions:
            for item in question["profile"]:
                item["text"] = f"{canary(question['user_id'])} {item['text']}"
        path.write_text(json.dumps(questions))
    (project.folder / "oppu").symlink_to(ROOT / "oppu")
    shutil.copytree(ROOT / ".dvc", project.folder / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "*.local"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, project.folder)
    project.run()
    project.forget_logs()
    before, scores = project.cells(), project.scores()
    project.call("git", "init", "-q")
    project.dvc("add", "data/raw/LaMP_2N")
    text = project.dvc("repro")
    assert "Running stage 'cells@LaMP_2N-profile-k0-lora'" in text
    assert project.made() == (0, 0), "what Snakemake made is recorded as it is"
    assert project.cells() == before and project.scores().items() >= scores.items()
    project.commit()
    return project


@pytest.fixture
def project(original: Recorded, tmp_path: Path) -> Recorded:
    copy = original.copy(tmp_path / "project")
    copy.forget_logs()
    return Recorded(copy.folder, copy.config)


def objects(store: Path) -> dict[str, Path]:
    """The objects of a cache or a remote by their md5."""
    return {"".join(path.parts[-2:]): path for path in (store / "files/md5").glob("*/*")}


def test_the_record_holds_every_cell_and_base_and_git_every_score(project: Recorded) -> None:
    assert "up to date" in project.dvc("repro")
    stages = yaml.safe_load((project.folder / "dvc.lock").read_text())["stages"]
    outs = {out["path"] for stage in stages.values() for out in stage.get("outs", [])}
    task = "results/LaMP_2N"
    base = {f"{task}/profile-k0/base/{name}" for name in ("adapter", "manifest.json")}
    profiles = {f"{task}/profiles/{name}" for name in ("base.jsonl", "users")}
    scores = {f"{task}/{setting}/scores.json" for setting in SETTINGS} | {f"{task}/plot.csv"}
    assert outs == base | profiles | scores | {f"{task}/{setting}/users" for setting in SETTINGS}

    shown = json.loads(project.dvc("metrics", "show", "--json"))[""]["data"]
    assert set(shown) == {f"{task}/{setting}/scores.json" for setting in SETTINGS}
    assert all(0 <= entry["data"]["accuracy"] <= 1 for entry in shown.values())
    tracked = project.call("git", "ls-files", "results", "data/raw").split()
    assert set(tracked) == scores | {"data/raw/LaMP_2N.dvc"}, "scores are for git; what a person wrote or owns is not"


def test_dvc_yaml_fits_the_default_config() -> None:
    config = load(yaml.safe_load((ROOT / "config/config.yaml").read_text()))
    assert config.settings == list(product(config.augmentations, config.peft, ["full"])), "a stage for every setting"
    assert any(name.startswith("profile-") for name in config.augmentations), "else its stage `profiles` has to go"
    assert config.results == "results" and Path(ROOT / config.model.path).is_dir()
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert all(stage["cmd"].startswith("snakemake ") for stage in stages.values())
    outs = [out for stage in stages.values() for kind in ("outs", "metrics", "plots") for out in stage.get(kind, [])]
    assert all(flags["persist"] for out in outs for flags in out.values()), "DVC deletes the others before a stage"


def test_a_clone_pulls_and_recomputes_nothing(project: Recorded, tmp_path: Path) -> None:
    store = tmp_path / "store"
    project.dvc("remote", "add", "--default", "store", store)
    project.commit()
    project.dvc("push")
    clone = Recorded(tmp_path / "clone", project.config)
    project.call("git", "clone", "-q", project.folder, clone.folder)
    assert not clone.cells()
    clone.dvc("pull")
    before = project.cells()
    assert clone.cells() == before
    for place in (store, project.folder / ".dvc/cache", clone.folder / ".dvc/cache", clone.folder / "results"):
        assert not any(path.stat().st_mode & 0o077 for path in place.rglob("*") if path.is_dir()), place
    clone.run()
    assert clone.made() == (0, 0), "no training, no prediction"
    assert "is fresh" in clone.logs() and " to make" in clone.logs()
    assert "0 profiles to make" in clone.logs() and not re.search(r"[1-9]\d* profiles to make", clone.logs())
    assert clone.cells() == before and clone.scores() == project.scores()
    assert "up to date" in clone.dvc("status") and not clone.call("git", "status", "--porcelain")


def test_an_experiment_changes_what_depends_on_it_and_is_taken_back_without_training(project: Recorded) -> None:
    before = project.cells()
    project.dvc("exp", "run", "--name", "faster", "-S", "config/config.yaml:personal.lr=0.02")
    assert project.made() == (4, 4)
    after = project.cells()
    assert {name for name in before if before[name] != after[name]} == {n for n in before if "/lora/" in n}
    (change,) = json.loads(project.dvc("params", "diff", "--json"))["config/config.yaml"].items()
    assert change == ("personal.lr", {"old": 0.003, "new": 0.02, "diff": 0.017})
    assert "faster" in project.dvc("exp", "show", "--csv")
    compared = json.loads(project.dvc("metrics", "diff", "--all", "--json"))
    assert set(compared) == {f"results/LaMP_2N/{setting}/scores.json" for setting in SETTINGS}
    (plot,) = json.loads(project.dvc("plots", "diff", "--json"))["data"].values()
    drawn = json.loads(plot[0]["content"]) if isinstance(plot[0].get("content"), str) else plot[0]
    assert set(plot[0].get("revisions", plot[0].get("versions", []))) == {"HEAD", "workspace"} and drawn
    project.dvc("plots", "diff", "--out", project.folder / "page")
    page = (project.folder / "page/index.html").read_text()
    assert '"rev": "workspace"' in page and "LaMP_2N" in page and "<DVC_METRIC" not in page

    # A forced checkout, as `dvc exp run` begins with, of a version that is not the config's.
    project.call("git", "checkout", "-q", "dvc.lock")
    project.dvc("checkout", "--force")
    assert project.cells() == before
    project.forget_logs()
    project.config["personal"]["lr"] = 0.02
    project.run()
    assert project.made() == (4, 4) and project.cells() == after, "another version's cells do not pass for its own"

    project.call("git", "checkout", "-q", ".")
    project.dvc("checkout")
    project.forget_logs()
    project.config["personal"]["lr"] = 0.003
    project.run()
    assert project.made() == (0, 0) and project.cells() == before, "a version that was recorded comes back"


def test_who_is_kept_out_is_in_no_object_and_keeps_the_cells(project: Recorded, tmp_path: Path) -> None:
    user, other = project.users()[:2]
    shutil.rmtree(project.folder / ".dvc/cache")
    (project.folder / "dvc.lock").unlink()
    with (project.folder / ".dvcignore").open("a") as f:
        f.write(f"{user}*\n")
    project.dvc("repro")
    assert project.made() == (0, 0)
    kept = objects(project.folder / ".dvc/cache")
    files = {who: [path for path in files_of(project, who) if "split" not in path.parts] for who in (user, other)}
    own = {hashlib.md5(path.read_bytes()).hexdigest(): path for path in files[user]}
    assert len(own) >= 6 and not {path for md5, path in own.items() if md5 in kept} - shared(files[user], files[other])
    assert not [path for path in kept.values() if user.encode() in path.read_bytes()]
    assert [path for path in kept.values() if other.encode() in path.read_bytes()]
    before = project.cells()
    project.dvc("checkout", "--force")
    assert project.cells() == before, "DVC does not delete what it is not to see"


def files_of(project: Recorded, user: str) -> list[Path]:
    """The files named after a user, or in a folder that is, which DVC would record."""
    named = [p for p in project.folder.glob("results/*/**/*") if p.is_file() and user in str(p)]
    return [path for path in named if "cohorts" not in path.parts and path.suffix not in (".log", ".tsv")]


def shared(own: list[Path], others: list[Path]) -> set[Path]:
    """Files that say nothing of a user: another's are the same (adapter_config.json)."""
    same = {path.read_bytes() for path in others}
    return {path for path in own if path.read_bytes() in same}


def test_who_is_forgotten_is_in_no_file_cache_or_remote(project: Recorded, tmp_path: Path) -> None:
    store = tmp_path / "store"
    project.dvc("remote", "add", "--default", "store", store)
    project.dvc("push")
    project.commit()
    tested, *rest = project.users()
    (base, *_) = read_base(project.folder / "results/LaMP_2N/split/base.jsonl")
    people = json.loads((project.folder / "data/raw/LaMP_2N/dev_questions.json").read_text())
    (tested_id,) = {q["user_id"] for q in people if user_key(q["user_id"]) == tested}
    traces = [text.encode() for text in (tested, canary(tested_id), base.key, canary(base.id))]
    others = [path for user in rest for path in files_of(project, user)]
    own = files_of(project, tested)
    gone = {hashlib.md5(path.read_bytes()).hexdigest() for path in set(own) - shared(own, others)}
    old_base = project.folder / "results/LaMP_2N/profile-k0/base/adapter/adapter_model.safetensors"
    gone.add(hashlib.md5(old_base.read_bytes()).hexdigest())
    places = (project.folder / ".dvc/cache", store)
    for place in places:
        assert len(gone & set(objects(place))) >= 4, "the test would see them"
        found = [trace for trace in traces if any(trace in path.read_bytes() for path in objects(place).values())]
        assert found == traces

    told = project.oppu("forget", tested, base.key)
    assert "dev_questions.json" in told and "train_questions.json" in told
    project.call(ROOT / "workflow/scripts/dvc-forget.sh")
    project.commit()
    assert project.users() == rest and len(project.cells()) == len(rest) * len(SETTINGS)
    for place in places:
        left = objects(place)
        assert left and not gone & set(left)
        assert not [path for path in left.values() if any(trace in path.read_bytes() for trace in traces)]
    named = [p for p in project.folder.rglob("*") if p.is_file() and not p.is_symlink() and ".snakemake" not in p.parts]
    named = [path for path in named if "oppu" not in path.relative_to(project.folder).parts]
    assert not [path for path in named if any(trace in path.read_bytes() for trace in traces)]
    revisions = project.call("git", "rev-list", "--all").split()
    for trace in traces:
        assert not project.call("git", "grep", "-c", trace.decode(), *revisions, ok=False), "git never had them"

    clone = Recorded(tmp_path / "clone", project.config)
    project.call("git", "clone", "-q", project.folder, clone.folder)
    clone.dvc("pull")
    assert clone.cells() == project.cells(), "the others' cells are all there"
