"""Jobs that run at once on one machine see GPUs of their own. The GPUs are made up: a nvidia-smi that lists them."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from oppu import devices
from oppu.records import InputError
from tests.workflow.project import TEST_USERS, Project

ROOT = Path(__file__).resolve().parents[1]
JOB = """
import json, os, sys, time
from oppu import devices
devices.take(int(sys.argv[1]))
begin = time.monotonic()
print(json.dumps([os.environ.get("CUDA_VISIBLE_DEVICES"), begin]), flush=True)
time.sleep(float(sys.argv[2]))
print(json.dumps(time.monotonic()), flush=True)
"""


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two made-up GPUs; their names are new, so that nobody else's job waits for them."""
    names = [f"GPU-{uuid.uuid4()}" for _ in range(2)]
    lines = [f"GPU {n}: NVIDIA H100 80GB HBM3 (UUID: {name})" for n, name in enumerate(names)]
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\ncat << 'END'\n" + "\n".join(lines) + "\nEND\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return names


def job(number: int, seconds: float, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", JOB, str(number), str(seconds)]
    whole = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(command, env=whole, stdout=subprocess.PIPE, text=True)


def first_line(process: subprocess.Popen[str]) -> tuple[str | None, float]:
    assert process.stdout is not None
    name, begin = json.loads(process.stdout.readline())
    return name, begin


def uses(processes: list[subprocess.Popen[str]]) -> list[tuple[str | None, float, float]]:
    """What each process saw, and from when until when."""
    found = []
    for process in processes:
        name, begin = first_line(process)
        assert process.stdout is not None
        found.append((name, begin, json.loads(process.stdout.readline())))
        assert process.wait(60) == 0
    return found


def assert_alone(found: list[tuple[str | None, float, float]]) -> None:
    for name in {name for name, *_ in found}:
        times = sorted((begin, end) for other, begin, end in found if other == name)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(times)), (name, times)


def test_four_jobs_at_once_see_one_of_two_gpus_each_and_never_the_same(gpus: list[str]) -> None:
    found = uses([job(1, 0.5) for _ in range(4)])
    assert {name for name, *_ in found} == set(gpus)
    assert_alone(found)


def test_a_killed_job_lets_go_of_its_gpu(gpus: list[str]) -> None:
    long = [job(1, 600) for _ in range(2)]
    held = [first_line(process)[0] for process in long]
    assert sorted(map(str, held)) == sorted(gpus)
    waiting = job(1, 0)
    time.sleep(1)
    killed = time.monotonic()
    os.kill(long[0].pid, signal.SIGKILL)
    name, begin = first_line(waiting)
    assert name == held[0] and killed < begin < killed + 30
    long[1].kill()
    assert [waiting.wait(60), *(process.wait(60) for process in long)] == [0, -9, -9]


def test_a_gpu_is_free_only_when_the_processes_that_inherited_it_have_ended(gpus: list[str]) -> None:
    parent = (
        "import subprocess, sys; from oppu import devices; devices.take(2); "
        "child = subprocess.Popen(['sleep', '600'], stdout=subprocess.DEVNULL, pass_fds=devices.held()); "
        "print(child.pid, flush=True)"
    )
    done = subprocess.run([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, check=True)
    waiting = job(1, 0)
    time.sleep(1)
    assert waiting.poll() is None
    os.kill(int(done.stdout), signal.SIGKILL)
    assert first_line(waiting)[0] in gpus and waiting.wait(60) == 0


def test_jobs_of_two_gpus_do_not_block_each_other(gpus: list[str]) -> None:
    found = uses([job(2, 0.2), job(1, 0.2), job(2, 0.2), job(1, 0.2)])
    both = ",".join(gpus)
    assert sorted(str(name) for name, *_ in found if name not in gpus) == [both, both]
    assert_alone([(name, begin, end) for seen, begin, end in found for name in str(seen).split(",")])


@pytest.mark.parametrize("given", ["1", "GPU"])
def test_what_a_scheduler_has_narrowed_is_kept_and_shared_with_nobody(gpus: list[str], given: str) -> None:
    """By number or by UUID it is one and the same GPU."""
    narrowed = given if given == "1" else gpus[1]
    found = uses([job(1, 0.3, CUDA_VISIBLE_DEVICES=narrowed), job(2, 0.3)])
    assert sorted(str(name) for name, *_ in found) == sorted([narrowed, ",".join(gpus)])
    (_, *one), (_, *other) = found
    assert one[1] <= other[0] or other[1] <= one[0]


def test_more_than_there_are_none_and_no_gpus(gpus: list[str]) -> None:
    asked = {"five of one": (5, {"CUDA_VISIBLE_DEVICES": "0"}), "none": (0, {}), "no GPUs": (1, {"PATH": ""})}
    asked["hidden"] = (1, {"CUDA_VISIBLE_DEVICES": "-1"})
    seen = {name: uses([job(number, 0, **environment)])[0][0] for name, (number, environment) in asked.items()}
    assert seen == {"five of one": "0", "none": None, "no GPUs": None, "hidden": "-1"}


def test_the_parts_of_a_partitioned_gpu_are_gpus(tmp_path: Path, gpus: list[str]) -> None:
    parts = [f"MIG-{uuid.uuid4()}" for _ in range(2)]
    lines = [f"GPU 0: NVIDIA H100 (UUID: {gpus[0]})"]
    lines += [f"  MIG 1g.10gb Device {n}: (UUID: {name})" for n, name in enumerate(parts)]
    lines += [f"GPU 1: NVIDIA H100 (UUID: {gpus[1]})"]
    (tmp_path / "bin/nvidia-smi").write_text("#!/bin/sh\ncat << 'END'\n" + "\n".join(lines) + "\nEND\n")
    (found,) = uses([job(3, 0)])
    assert found[0] == ",".join([*parts, gpus[1]])


def test_a_workflow_runs_as_many_jobs_at_once_as_there_are_gpus(tmp_path: Path, gpus: list[str]) -> None:
    """Cohorts of one user: four jobs of training, two GPUs; then one job with both GPUs, a process on each."""
    setting = "results/LaMP_2N/k0/lora/full"
    project = Project.make(tmp_path / "project", augmentations=["k0"], peft=["lora"], users_per_job=1)
    project.run("--cores", "4", "--", *[f"{setting}/cohorts/{number:03d}.json" for number in range(TEST_USERS)])
    logs = [path.read_text() for path in (project.folder / "results/logs/LaMP_2N/k0/lora/full").glob("0*.log")]
    taken = [re.findall(r"GPUs of this job: (\S+)", text) for text in logs]
    assert len(taken) == TEST_USERS and {tuple(names) for names in taken} == {(name,) for name in gpus}, taken
    assert not any("waiting for" in text for text in logs), "Snakemake starts no job that has no GPU"
    project.config |= {"users_per_job": TEST_USERS, "seed": 1}
    project.forget_logs()
    project.run("--set-resources", "cells:gpu=2", "cells:processes=2", "--", f"{setting}/cohorts/000.json")
    assert f"GPUs of this job: {','.join(gpus)}" in project.logs() and "rank 1 of 2: 2 users" in project.logs()


@pytest.mark.parametrize("given", ["-1", "two"])
def test_a_number_of_gpus_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("OPPU_GPUS", given)
    with pytest.raises(InputError, match=f"OPPU_GPUS is '{given}'"):
        devices.take()
