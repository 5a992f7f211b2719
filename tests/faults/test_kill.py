"""SIGKILL anywhere: one documented command goes on, and what comes out is what an uninterrupted run makes.

Ten points in the ordinary tests; `make faults` takes fifty. OPPU_FAULT_SEED repeats a run's points.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from oppu.cells import damage, read_record
from oppu.cohort import context_of
from oppu.examples import history_examples, query_prompts
from oppu.files import TEMPORARY, file_digest, folder_digests, read_json, read_user
from oppu.models import load_tokenizer
from oppu.orphans import is_snakemake
from tests.faults.conftest import SETTING, STAGES, TASK, Reference, make, stage
from tests.workflow.project import TEST_USERS, Project

FIRST = "first adapter"
"""Personal training at the moment when one user is finished and others are not."""
POINTS = ["split", "base", "base", "personal", FIRST, "personal", "prediction", "prediction", "scoring", "report"]
CHAINS = {  # dtype, minutes between checkpoints (0: after every pass; 10: never in so short a run), points
    "ten": [("float32", 0, POINTS)],
    "fifty": [
        ("float32", 0, POINTS),
        ("float32", 10, POINTS),
        ("float64", 0, POINTS),
        ("float64", 10, POINTS),
        ("float32", 10, POINTS),
    ],
}[os.environ.get("OPPU_FAULTS", "ten")]
BOUND = {"float32": 1e-4, "float64": 1e-12}
SEED = int(os.environ.get("OPPU_FAULT_SEED") or random.SystemRandom().randrange(10**6))
hits: Counter[str] = Counter()


def kill(run: subprocess.Popen[Any], all_of_it: bool) -> None:
    """Kill the whole process group, or Snakemake alone, whose jobs then go on as orphans."""
    if all_of_it:
        os.killpg(run.pid, signal.SIGKILL)
    else:
        family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        next(one for one in family if is_snakemake(one.cmdline())).kill()
    run.wait()


def reached(project: Project, wanted: str) -> bool:
    if wanted == FIRST:
        return reached(project, "personal") and any((project.folder / SETTING / "users").glob("u-*/cell.json"))
    return (at := stage(project)) is not None and STAGES.index(at) >= STAGES.index(wanted)


def past(project: Project, wanted: str) -> bool:
    at = stage(project)
    return at is not None and STAGES.index(at) > STAGES.index("personal" if wanted == FIRST else wanted)


def attempt(project: Project, command: list[str], wanted: str, wait: float, all_of_it: bool) -> str | None:
    """Start a run and kill it so many seconds into a stage, or when that ends; the stage it was at, None: it had ended.

    A run that goes on from a checkpoint is at a stage for a shorter time than an uninterrupted one.
    """
    project.forget_logs()
    with (project.folder / "run.log").open("a") as log:
        run = subprocess.Popen(
            command, cwd=project.folder, env=project.environment(), start_new_session=True, stdout=log, stderr=log
        )
    while run.poll() is None and not reached(project, wanted):
        time.sleep(0.01)
    until = time.monotonic() + wait
    while run.poll() is None and time.monotonic() < until and not past(project, wanted):
        time.sleep(0.01)
    if run.poll() is not None:
        return None
    at = stage(project)
    kill(run, all_of_it)
    return at


def whole(project: Project) -> dict[Path, tuple[int, str]]:
    """The files of every artefact that is finished, with mtime and digest."""
    files = []
    for cell in (project.folder / SETTING / "users").glob("u-*"):
        for entry in read_record(cell).get("artefacts", {}).values():
            files += [cell / name for name in entry["files"]] if not damage(cell, {"": entry}) else []
    return {path: (path.stat().st_mtime_ns, file_digest(path)) for path in files}


def prompts(project: Project) -> dict[str, list[Any]]:
    """All that models are asked and taught, as tokens: what split, retrieval and prompts come down to."""
    recipe = read_json(project.folder / SETTING / "recipe.json")
    context = context_of(recipe, load_tokenizer(str(project.folder / recipe["runtime"]["model"]["path"]), None), None)
    found = {}
    for path in sorted((project.folder / f"results/{TASK}/split/histories").glob("*.json")):
        user = read_user(path)
        asked = [tokens for *_, tokens in query_prompts(context, user, None, 8, Counter())]
        found[user.key] = [asked, history_examples(context, user, None, Counter(), None)]
    return found


def split_of(task: Path) -> dict[str, Any]:
    """The bytes of a task's split; of users.json all but whether it was mended."""
    people = read_json(task / "split/users.json")
    return folder_digests(task / "split") | {"users.json": {n: v for n, v in people.items() if n != "mended"}}


def compare(project: Project, other: Project, bound: float) -> tuple[int, int]:
    """Everything that a run makes, against another's. How many adapters and predictions have the very same bytes."""
    one, two = (p.folder / f"results/{TASK}" for p in (project, other))
    assert split_of(one) == split_of(two)
    assert prompts(project) == prompts(other) and len(prompts(other)) == TEST_USERS
    assert read_json(one / "k1/base/manifest.json") == read_json(two / "k1/base/manifest.json")
    same = Counter[str]()
    for user in other.users():
        first, second = (p.folder / SETTING / "users" / user for p in (project, other))
        records = [read_record(cell) for cell in (first, second)]
        keys = [{name: entry["key"] for name, entry in record["artefacts"].items()} for record in records]
        assert keys[0] == keys[1] and set(keys[1]) == {"adapter", "predictions"}
        assert not damage(first, records[0]["artefacts"])
        file = "adapter/adapter_model.safetensors"
        a, b = load_file(first / file), load_file(second / file)
        assert max((a[name] - b[name]).abs().max().item() for name in b) < bound
        same["adapters"] += file_digest(first / file) == file_digest(second / file)
        # Stricter than need be: two answers may be so near that 1e-4 in an adapter decides; none here ever were.
        assert (first / "predictions.jsonl").read_bytes() == (second / "predictions.jsonl").read_bytes()
        same["predictions"] += 1
    for table in ("LaMP_2N/k1/lora/full/scores.json", "tables/scores.csv", "tables/table1.csv"):
        assert (project.folder / "results" / table).read_bytes() == (other.folder / "results" / table).read_bytes()
    return same["adapters"], same["predictions"]


@pytest.mark.parametrize("chain", range(len(CHAINS)))
def test_killed_anywhere_a_run_goes_on_to_what_it_would_have_been(
    references: dict[str, Reference], tmp_path: Path, chain: int
) -> None:
    dtype, minutes, points = CHAINS[chain]
    reference, draw = references[dtype], random.Random(SEED * 100 + chain)
    project = make(tmp_path / "project", dtype)
    for part in ("base", "personal"):
        project.config[part]["checkpoint_minutes"] = minutes
    command, resume = project.command(), ["make", "-s", "resume"]
    kept: dict[Path, tuple[int, str]] = {}
    print(f"\nchain {chain} ({dtype}, checkpoints every {minutes} minutes), OPPU_FAULT_SEED={SEED}")
    for number, wanted in enumerate(points):
        # Training begins with seconds of imports. The other stages are over in a second: early, so that each is hit.
        share = draw.uniform(0.3, 0.95) if wanted in ("base", "personal") else draw.uniform(0, 0.5)
        wait, all_of_it = share * reference.seconds.get(wanted, 0.0), number % 2 == 0
        at = attempt(project, command, wanted, wait, all_of_it)
        now = whole(project)
        what = "group" if all_of_it else "Snakemake"
        print(f"  {what} killed {wait:.2f} s into {wanted}: at {at}, {len(now)} files finished")
        assert at is not None, "it had ended before"
        assert kept.items() <= now.items(), "a finished file was touched"
        kept, command = now, resume
        hits[at] += 1
    project.forget_logs()
    done = subprocess.run(
        resume, cwd=project.folder, env=project.environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr + project.logs()
    assert kept.items() <= whole(project).items(), "a finished file was touched"
    adapters, predictions = compare(project, reference.project, BOUND[dtype])
    ended = (project.folder / "run.log").read_text().count("outlived its run") + done.stderr.count("outlived its run")
    print(f"  {ended} orphans ended; same bytes: {adapters} of {TEST_USERS} adapters, {predictions} users' predictions")
    assert adapters == TEST_USERS or minutes, "from checkpoints: the same bytes"
    assert not [path for path in project.folder.glob("results/**/*") if TEMPORARY.fullmatch(path.name)]
    assert not list(project.folder.glob("results/**/*.checkpoint")), "adapters are left nowhere else"
    if hits.total() == sum(len(points) for *_, points in CHAINS):
        print(f"points by stage: {dict(hits)}")
        assert len(CHAINS) == 1 or set(hits) == set(STAGES), "no stage was left out"
