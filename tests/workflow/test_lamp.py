"""`snakemake lamp` fetches LaMP's files, goes on where it was cut, and nothing else ever downloads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from oppu.download import CHUNK, FILES, PLACES
from tests.http_server import Site, lamp_site
from tests.workflow.project import Project

NOTHING = "Nothing to be done"
URL = "/LaMP_2/train/train_questions.json"


@pytest.fixture
def site(monkeypatch):
    """A site with the two tasks' files, which the workflow is told of."""
    with Site(lamp_site("LaMP_2N", "LaMP_4")) as site:
        monkeypatch.setenv("OPPU_LAMP_SITE", site.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield site


def bare(folder: Path, *tasks: str, **config: object) -> Project:
    """A project without raw files."""
    project = Project.make(folder, (), **config)
    project.config["tasks"] = list(tasks)
    return project


def raw(project: Project, task: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (project.folder / "data/raw" / task).iterdir()}


def test_lamp_fetches_every_task_once_and_goes_on_after_a_failure(site, tmp_path):
    project = bare(tmp_path / "project", "LaMP_2N", "LaMP_4")
    site.cut(URL, 2 * CHUNK)
    site.fail(URL, 404)
    project.run("lamp", ok=False)
    assert "by hand" in project.logs()
    assert set(raw(project, "LaMP_4")) == {*FILES, "sources.json"}, "keep-going: the other task is there"
    assert "train_questions.json" not in raw(project, "LaMP_2N")
    assert not (project.folder / "results/lamp/LaMP_2N.json").exists()
    assert "3 of the 4 files" in project.run("-n", "data", ok=False), "half a download is no data"

    site.asked = []
    project.run("lamp")
    assert site.asked == [(URL, f"bytes={2 * CHUNK}-")]
    for task in ("LaMP_2N", "LaMP_4"):
        bodies = {f"/{PLACES[task]}/{name.split('_')[0]}/{name}": raw(project, task)[name] for name in FILES}
        assert bodies.items() <= site.files.items()
        assert set(raw(project, task)) == {*FILES, "sources.json"}
    assert NOTHING in project.run("lamp")

    site.asked = []
    (project.folder / "data/raw/LaMP_2N/train_questions.json").unlink()
    project.run("lamp")
    assert site.asked == [(URL, None)], "a file that is gone comes back, alone"
    assert NOTHING in project.run("lamp")
    shutil.rmtree(project.folder / "results")
    project.run("lamp")
    assert site.asked == [(URL, None)], "files that are there are only checked"


def test_without_files_the_main_workflow_names_the_command_and_downloads_nothing(site, tmp_path):
    project = bare(tmp_path / "project", "LaMP_2N")
    text = project.run(ok=False)
    assert "data/raw/LaMP_2N: 0 of the 4 files" in text and "`snakemake --cores all lamp`" in text
    assert site.asked == []


def test_there_is_nothing_to_fetch_for_made_up_users_and_the_sample(site, tmp_path):
    where = {"LaMP_2N": "fixtures", "LaMP_4": "data/sample/lamp"}
    project = bare(tmp_path / "project", *where, task_data=where)
    project.run("lamp")
    assert site.asked == []
    assert not list(project.folder.glob("results/lamp/*"))


def test_files_put_there_by_hand_are_taken_as_they_are(site, tmp_path):
    project = Project.make(tmp_path / "project")
    before = raw(project, "LaMP_2N")
    project.run("lamp")
    assert site.asked == []
    after = raw(project, "LaMP_2N")
    records = json.loads(after.pop("sources.json"))
    assert after == before and set(records) == set(before)
    assert "checkpoint split" in project.run("-n", "results/LaMP_2N/split/users.json")
