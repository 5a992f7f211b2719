"""What can go wrong besides a kill: each ends with a clear message, and a run afterwards mends it."""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from oppu import job, orphans
from oppu.checkpoints import kept
from oppu.files import TEMPORARY, read_json, write_json
from oppu.records import InputError
from tests.faults.conftest import SETTING, TASK
from tests.faults.test_kill import compare, whole
from tests.workflow.project import TEST_USERS, Project

NOTHING = "Nothing to be done"
DAY = 86400
KIB = 1024


@pytest.fixture
def bare(project: Project) -> Project:
    """The finished project without its cells."""
    shutil.rmtree(project.folder / SETTING / "users")
    (project.folder / SETTING / "cohorts/000.json").unlink()
    return project


def cells(project: Project) -> list[str]:
    split, base = f"results/{TASK}/split", f"results/{TASK}/k1/base/base.json"
    histories = sorted(f"{split}/histories/{user}.json" for user in project.users())
    command = ["-m", "oppu.cli", "cells", f"{SETTING}/cohorts/000.json", "--recipe", f"{SETTING}/recipe.json"]
    return [sys.executable, *command, "--base", base, "--base-users", f"{split}/base.jsonl", *histories]


def make_cells(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in this process."""
    monkeypatch.chdir(project.folder)
    histories = [Path(f"results/{TASK}/split/histories/{user}.json") for user in project.users()]
    setting, base = Path(SETTING), Path(f"results/{TASK}/k1/base/base.json")
    pool = Path(f"results/{TASK}/split/base.jsonl")
    job.run(setting / "cohorts/000.json", setting / "recipe.json", base, histories, pool)


def run(project: Project, command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    where: dict[str, Any] = {"cwd": project.folder, "env": project.environment()}
    return subprocess.run(command, **where, capture_output=True, text=True, check=False, **more)


def half_written(project: Project) -> list[Path]:
    return [path for path in project.folder.glob("results/**/*") if TEMPORARY.fullmatch(path.name)]


def tmpfs() -> bool:
    script = "mount -t tmpfs -o size=64k tmpfs /mnt"
    try:
        return subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_a_full_disk_keeps_who_is_finished_and_a_run_with_room_makes_the_rest(bare: Project, finished: Project) -> None:
    """A file system with room for two of the four adapters, which then grows; without mounts, a limit on file sizes."""
    users, command = f"{SETTING}/users", shlex.join(cells(bare))
    size = (finished.folder / users / finished.users()[0] / "adapter/adapter_model.safetensors").stat().st_size
    if tmpfs():
        room = 3 * size // KIB
        script = f"""
            mkdir -p {users}; mount -t tmpfs -o size={room}k tmpfs {users}
            {command}; echo first: $? >&2; find {users} -name 'adapter_model.safetensors' | wc -l > between.txt
            find {users} -name '.*.????????' >> between.txt
            mount -o remount,size=50m {users}; {command}; echo second: $? >&2
            cp -a {users} kept; umount {users}; cp -a kept/. {users}"""
        done = run(bare, ["unshare", "-rm", "sh", "-c", script])
        assert "No space left on device" in done.stderr
        assert (bare.folder / "between.txt").read_text().split() == ["2"], "two are kept, and nothing is half there"
        assert "first: 1" in done.stderr and "second: 0" in done.stderr, done.stderr
    else:
        limit = (size // 2, resource.RLIM_INFINITY)
        done = run(bare, cells(bare), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
        assert done.returncode == 1 and "File too large" in done.stderr
        assert not whole(bare) and not half_written(bare)
        assert run(bare, cells(bare)).returncode == 0
    assert "make room and run again; what is finished is kept" in done.stderr
    compare(bare, finished, 1e-4)


def test_without_any_memory_a_cohort_fails_by_name_and_a_run_with_memory_goes_on(
    bare: Project, finished: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out for good once a user is finished; what was trained until then is not trained again."""
    recipe = read_json(bare.folder / SETTING / "recipe.json")
    recipe["runtime"]["training"]["checkpoint_minutes"] = 0
    write_json(bare.folder / SETTING / "recipe.json", recipe)
    plain = torch.autograd.backward

    def backward(*arguments: Any, **more: Any) -> None:
        if whole(bare):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        plain(*arguments, **more)

    monkeypatch.setattr(torch.autograd, "backward", backward)
    with pytest.raises(InputError, match="does not fit into memory, even alone"):
        make_cells(bare, monkeypatch)
    monkeypatch.setattr(torch.autograd, "backward", plain)
    _, state = kept(bare.folder / SETTING / "cohorts/000.checkpoint")[0]
    ready = whole(bare)
    assert ready and sum(state["done"].values()) > 0
    make_cells(bare, monkeypatch)
    assert ready.items() <= whole(bare).items()
    shutil.copy(finished.folder / SETTING / "recipe.json", bare.folder / SETTING / "recipe.json")
    adapters, _ = compare(bare, finished, 1e-4)
    assert adapters == TEST_USERS, "the same bytes, from the checkpoint"


KILLED = """
import os, signal
from oppu import cli, cohort
plain, groups = cohort.Cohort._answers, []
def answers(*arguments):
    groups.append(1)
    if len(groups) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*arguments)
cohort.Cohort._answers, cohort.QUERIES_AT_ONCE = answers, 1
cli.main()
"""


def test_a_kill_amid_predictions_loses_only_those_of_the_users_at_hand(bare: Project, finished: Project) -> None:
    """Users are answered one after the other here, and the third is killed: two are kept."""
    command = cells(bare)
    assert run(bare, [command[0], "-c", KILLED, *command[3:]]).returncode == -signal.SIGKILL
    before = whole(bare)
    assert sorted(path.name for path in before).count("adapter_model.safetensors") == TEST_USERS
    assert sorted(path.name for path in before).count("predictions.jsonl") == 2 < TEST_USERS
    done = run(bare, command)
    assert done.returncode == 0 and "4 users, 0 to train, 2 to predict" in done.stderr, done.stderr
    assert before.items() <= whole(bare).items()
    compare(bare, finished, 1e-4)


def test_truncated_records_are_mended_by_a_plain_run_and_cells_by_the_command_that_verify_names(
    project: Project, finished: Project
) -> None:
    before = whole(project)
    names = [f"{SETTING}/cohorts/000.json", f"results/{TASK}/split/users.json"]
    names += [f"results/{TASK}/k1/base/{name}" for name in ("base.json", "manifest.json")]
    for name in names:
        path = project.folder / name
        os.truncate(path, path.stat().st_size // 2)
    project.run()
    assert project.made() == (0, 0) and whole(project) == before
    assert NOTHING in project.run()
    recipe = project.folder / SETTING / "recipe.json"
    os.truncate(recipe, 100)
    project.run(ok=False)
    assert f"{SETTING}/recipe.json: is not whole JSON" in project.logs()
    assert "; delete it and run again" in project.logs()
    recipe.unlink()
    cell = project.folder / SETTING / "users" / project.users()[1]
    os.truncate(cell / "cell.json", 100)
    assert f"{cell.relative_to(project.folder)}: cell.json" in project.oppu("verify", ok=False)
    project.forget_logs()
    project.run("-R", "cells")
    assert project.made() == (1, 1), "nothing for the recipe"
    assert {path: at for path, at in whole(project).items() if cell not in path.parents} == {
        path: at for path, at in before.items() if cell not in path.parents
    }
    compare(project, finished, 1e-4)


def test_a_half_record_given_to_a_command_is_named(bare: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(bare.folder / f"results/{TASK}/k1/base/base.json", 50)
    with pytest.raises(InputError, match=r"base\.json: is not whole JSON .*; delete it and run again"):
        make_cells(bare, monkeypatch)


def wait_for(path: Path, run: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_a_second_run_in_the_same_folder_is_refused(bare: Project, finished: Project) -> None:
    first = subprocess.Popen(bare.command(), cwd=bare.folder, env=bare.environment(), stderr=subprocess.PIPE, text=True)
    wait_for(bare.folder / f"results/logs/{TASK}/k1/lora/full/000.log", first)
    assert "Directory cannot be locked" in bare.run(ok=False)
    refused = run(bare, ["make", "-s", "resume"])
    assert refused.returncode != 0
    assert f"a run is at work in . (process {first.pid}); wait for it or stop it" in refused.stderr
    _, text = first.communicate(timeout=300)
    assert first.returncode == 0, text
    assert bare.made() == (TEST_USERS, TEST_USERS)
    compare(bare, finished, 1e-4)


HOLDER = """
import sys, time
from pathlib import Path
from oppu.files import held
with held(Path(sys.argv[1]), sys.argv[2:]):
    print("held", flush=True)
    time.sleep(1.5)
    Path("done").touch()
"""


@pytest.fixture
def holder(bare: Project) -> Iterator[subprocess.Popen[str]]:
    """A command by hand that has a user of the cohort for a while."""
    command = [sys.executable, "-c", HOLDER, SETTING, bare.users()[0]]
    with subprocess.Popen(command, cwd=bare.folder, env=bare.environment(), stdout=subprocess.PIPE, text=True) as one:
        assert one.stdout is not None and one.stdout.readline() == "held\n"
        yield one


def test_a_command_by_hand_waits_for_users_that_another_has(
    bare: Project,
    holder: subprocess.Popen[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made: list[bool] = []
    monkeypatch.setattr(job.Job, "make", lambda *_: made.append(Path("done").exists()) or {})
    with pytest.raises(InputError, match="not made"):
        make_cells(bare, monkeypatch)
    assert f"another run holds users of {SETTING}; waiting for it" in caplog.text
    assert made == [True], "it began after the other had ended"


def test_a_clock_set_back_hides_no_change(project: Project) -> None:
    """All is dated tomorrow; today a history changes."""
    for path in project.folder.glob("results/**/*"):
        os.utime(path, (time.time() + DAY,) * 2, follow_symlinks=False)
    before = project.cells()
    path = project.folder / f"data/raw/{TASK}/dev_questions.json"
    questions = json.loads(path.read_text())
    person = questions[0]["user_id"]
    for question in questions:
        if question["user_id"] == person:
            question["profile"][1]["text"] += " And one more thing."
    path.write_text(json.dumps(questions))
    project.run()
    assert project.made() == (1, 1)
    assert len([cell for cell, files in project.cells().items() if files != before[cell]]) == 1
    assert NOTHING in project.run()


def test_orphans_are_those_whose_run_has_ended(tmp_path: Path) -> None:
    def start(run: int | str, folder: Path = tmp_path) -> subprocess.Popen[bytes]:
        environment = os.environ | {orphans.RUN: str(run)}
        return subprocess.Popen([sys.executable, "-c", "input()"], cwd=folder, env=environment, stdin=subprocess.PIPE)

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "other").mkdir()
    ours, by_hand, elsewhere = start(os.getpid()), start(""), start(gone.pid, tmp_path / "other")
    later = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left = [start(gone.pid), start(later.pid)]
    later.kill()
    later.wait()
    time.sleep(0.2)  # until each has become what it shall run
    assert orphans.end(tmp_path) == len(left)
    assert all(process.poll() is not None for process in left)
    for process in (ours, by_hand, elsewhere):
        assert process.poll() is None
        process.kill()
        process.wait()
    assert orphans.end(tmp_path) == 0
