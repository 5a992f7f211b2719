"""The workflow on a real Slurm of two nodes, through the shipped profile: jobs that are killed are run again.

Without accounting, and once more with it (slurmdbd and a database).

Runs where Slurm is installed or may be (OPPU_TEST_SLURM=install, root, Debian); says elsewhere that it was skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.workflow.project import TEST_USERS, Project

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "tests/slurm/cluster.sh"
SETTING = "results/LaMP_2N/k0/lora/full"
PROFILE = ["--profile", "workflow/profiles/slurm"]
FIRST = 500
"""MB that jobs of training ask for first; they need more."""
# One thread a job, for the machine has fewer cores than the nodes claim.
ONE_THREAD = ["--set-threads", "base=1", "cells=1"]


def call(*command: object, **more: str) -> str:
    done = subprocess.run([*map(str, command)], env=os.environ | more, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def slurm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables under which Snakemake finds the cluster, and the plugin that nothing else should find."""
    installed = all(map(shutil.which, ("slurmctld", "slurmd", "slurmdbd", "munged", "sbatch", "mariadbd")))
    if os.getuid() != 0:
        pytest.skip("SLURM IS NOT TESTED: starting one needs root")
    if not installed:
        if os.environ.get("OPPU_TEST_SLURM") != "install":
            pytest.skip("SLURM IS NOT TESTED: not installed (OPPU_TEST_SLURM=install installs Debian's packages)")
        done = subprocess.run([CLUSTER, "install"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"SLURM IS NOT TESTED: no packages: {done.stderr.strip()[-300:]}")
    folder = tmp_path_factory.mktemp("slurm")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "plugin"]
    done = subprocess.run(
        [*map(str, pip), "-r", ROOT / "requirements-slurm.lock"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"SLURM IS NOT TESTED: no plugin: {done.stderr.strip()[-300:]}")
    with (folder / "start.log").open("w") as log:  # no pipe: daemons would hold it open
        done = subprocess.run(
            [CLUSTER, "start", folder, request.param], stdout=log, stderr=log, timeout=300, check=False
        )
    said = (folder / "start.log").read_text()
    if done.returncode == 3:
        pytest.skip(f"SLURM IS NOT TESTED: {said.strip()}")
    assert done.returncode == 0, said
    path = os.pathsep.join([str(ROOT), str(folder / "plugin")])
    yield {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHONPATH": path, "OPPU_SLURM_CHECK_SECONDS": "9"}
    call(CLUSTER, "stop", folder)


class OnSlurm(Project):
    """A project whose jobs go to Slurm."""

    variables: dict[str, str]

    def environment(self) -> dict[str, str]:
        return super().environment() | self.variables

    def command(self, *arguments: str) -> list[str]:
        command = super().command(*PROFILE, *arguments)
        at = command.index("--cores")
        return command[:at] + command[at + 2 :]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def jobs(self, rule: str) -> list[dict[str, str]]:
        """What Slurm knows about the jobs of a rule, oldest first."""
        text = call("scontrol", "show", "job", "--oneliner", "--details", **self.variables)
        found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in text.splitlines()]
        return sorted(
            (j for j in found if j.get("Comment", "").startswith(f"rule_{rule}_")), key=lambda j: int(j["JobId"])
        )


@pytest.fixture(scope="module")
def project(slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> OnSlurm:
    made = OnSlurm.make(tmp_path_factory.mktemp("project") / "project", augmentations=["k0"], peft=["lora"])
    made.config["personal"] |= {"epochs": 6}  # long enough to be killed in the middle
    made.variables = slurm
    return made


def wait(what: Callable[[], object], run: subprocess.Popen[str], seconds: float = 120) -> object:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)
    return found


@pytest.mark.parametrize("slurm", ["plain"], indirect=True, scope="module")
def test_a_job_above_its_memory_gets_more(project: OnSlurm) -> None:
    """The base needs more than it asks for first, and less than it asks for last."""
    project.variables |= {"OPPU_SLURM_MEM_MB": str(FIRST)}
    project.run(*ONE_THREAD, "--", "results/LaMP_2N/k0/base/base.json")
    jobs = project.jobs("base")
    assert [job["JobState"] for job in jobs] == ["FAILED"] * (len(jobs) - 1) + ["COMPLETED"] and len(jobs) > 1
    assert [job["MinMemoryNode"] for job in jobs] == [f"{FIRST * n}M" for n in range(1, len(jobs) + 1)]
    log = next((project.folder / ".snakemake/slurm_logs/rule_base").rglob(f"{jobs[0]['JobId']}.log"))
    assert "exceeded memory limit" in log.read_text()
    del project.variables["OPPU_SLURM_MEM_MB"]


@pytest.mark.parametrize("slurm", ["plain", "accounting"], indirect=True, scope="module")
def test_a_cancelled_job_and_one_whose_node_died_are_run_again(project: OnSlurm) -> None:
    project.variables |= {"OPPU_SLURM_PARTITION": "small", "OPPU_SLURM_GPU_PARTITION": "gpus"}
    project.forget_logs()
    run = project.start(*ONE_THREAD)

    def seen() -> list[str]:
        "The GPUs that the jobs of rule cells were shown."
        logs = (project.folder / SETTING.replace("results/", "results/logs/")).glob("0*.log")
        return [gpu for path in logs for gpu in re.findall(r"GPUs of this job: (\S+)", path.read_text())]

    def running() -> list[dict[str, str]]:
        "The two jobs of rule cells, once both are about to train."
        if len(seen()) < 2:
            return []
        return [job for job in project.jobs("cells") if job["JobState"] == "RUNNING"]

    cancelled, lost = wait(lambda: jobs if len(jobs := running()) == 2 else [], run)
    assert (cancelled["NodeList"], cancelled["GRES"]) != (lost["NodeList"], lost["GRES"]), "a GPU for each"
    assert set(seen()) <= {"0", "1"}, "one, as Slurm numbers a node's"
    call("scancel", cancelled["JobId"], **project.variables)
    die(lost, Path(project.variables["SLURM_CONF"]).parent)
    text, _ = run.communicate(timeout=300)
    assert run.returncode == 0, text + project.logs()
    states = {job["JobId"]: job for job in project.jobs("cells")}
    assert states[cancelled["JobId"]]["JobState"] == "CANCELLED"
    assert states[lost["JobId"]]["JobState"] == "NODE_FAIL"
    assert f"SLURM-job '{lost['JobId']}' failed due to a node failure" in text
    again = [job for job in states.values() if job["JobState"] == "COMPLETED"]
    assert len(again) == 2 and {job["NodeList"] for job in again} == {"n1", "n2"} - {lost["NodeList"]}
    # They asked for what the profile says, the second time.
    assert {(job["Partition"], job["MinMemoryNode"], job["TimeLimit"]) for job in again} == {
        ("gpus", "62.50G", "1-00:00:00")
    }
    assert {job["Partition"] for job in project.jobs("score")} == {"small"}
    assert len(project.users()) == TEST_USERS and "0 damaged" in project.oppu("verify")
    assert (project.folder / "results/tables/table1.csv").is_file()
    assert "Nothing to be done" in project.run(*ONE_THREAD)


def die(job: dict[str, str], folder: Path) -> None:
    """A job's node dies: its daemon and every process of the job are killed, and the controller is told so."""
    node, number = job["NodeList"], job["JobId"]
    doomed = [int((folder / node / "slurmd.pid").read_text())]
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            step = (process / "cmdline").read_bytes().startswith(f"slurmstepd: [{number}.".encode())
            if step or f"SLURM_JOB_ID={number}".encode() in (process / "environ").read_bytes().split(b"\0"):
                doomed.insert(1 if step else len(doomed), int(process.name))
    for pid in doomed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    call("scontrol", "update", f"nodename={node}", "state=down", "reason=died", SLURM_CONF=str(folder / "slurm.conf"))
