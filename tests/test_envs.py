"""envs/: the pins of requirements.lock, whole, and enough for the rules that name them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.workflow.project import Project

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
ENVS = {"light": ROOT / "envs/light.yaml", "oppu": ROOT / "envs/oppu.yaml"}
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"not in the environment: {{name}}", name=name)
sys.meta_path.insert(0, Block())
"""


def pins(lines: list[str]) -> dict[str, str]:
    found = [
        re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line.strip()) for line in lines if line.strip()[:1] not in ("#", "")
    ]
    assert all(found), lines
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def environment(name: str) -> dict[str, str]:
    (pip,) = (part["pip"] for part in yaml.safe_load(ENVS[name].read_text())["dependencies"] if isinstance(part, dict))
    return pins(pip)


@pytest.mark.parametrize("name", ENVS)
def test_an_environment_has_the_pins_of_the_lock_and_all_that_they_require(name: str) -> None:
    lock, own = pins(LOCK.read_text().splitlines()), environment(name)
    assert own == {package: lock[package] for package in own}
    needed = {
        canonicalize_name(requirement.name)
        for package in own
        for requirement in map(Requirement, requires(package) or [])
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    # What torch brings for CUDA differs from machine to machine, and is in no lock.
    assert needed & lock.keys() <= own.keys()


def test_the_light_environment_has_no_torch_and_lies_in_the_other() -> None:
    light, whole = environment("light"), environment("oppu")
    assert "torch" not in light and "torch" in whole
    assert light.items() <= whole.items()


def test_the_light_rules_run_with_what_their_environment_has(tmp_path: Path) -> None:
    """Everything else is blocked, in the jobs only: Snakemake itself is not part of the environments."""
    environment_of = re.compile(r"^(?:rule|checkpoint) (\w+):.*?envs/(\w+)\.yaml", re.M | re.S)
    rules = [
        pair for path in (ROOT / "workflow/rules").glob("*.smk") for pair in environment_of.findall(path.read_text())
    ]
    light = {rule for rule, name in rules if name == "light"}
    assert {"split", "score", "tables", "statistics"} <= light and not {"cells", "base", "tune"} & light
    project = Project.make(tmp_path / "project", augmentations=["k0"], peft=["none"])
    own = environment("light")
    others = [
        m for m, dists in packages_distributions().items() if not {canonicalize_name(d) for d in dists} & own.keys()
    ]
    blocked = sorted({*others} - {"oppu", "_distutils_hack", "distutils-precedence", "setuptools", "pkg_resources"})
    assert {"torch", "transformers", "snakemake", "dvc"} <= set(blocked)
    block = tmp_path / "block"
    block.mkdir()
    (block / "sitecustomize.py").write_text(BLOCK.format(names=set(blocked)))
    shim = block / "oppu"
    path = f"{block}{os.pathsep}{project.environment()['PYTHONPATH']}"
    # A job of the light rules runs with the block, any other without.
    heavy = "|".join(["*' cells '*", "*' base '*"])
    shim.write_text(
        f"#!/bin/sh\ncase \" $* \" in {heavy.replace(chr(39), chr(34))}) ;; *) export PYTHONPATH='{path}' ;; esac\n"
        f"exec '{sys.executable}' -m oppu.cli \"$@\"\n"
    )
    shim.chmod(0o755)
    done = subprocess.run(
        project.command(),
        cwd=project.folder,
        env=project.environment() | {"PATH": f"{block}{os.pathsep}{project.environment()['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr + project.logs()
    assert (project.folder / "results/tables/table5.csv").is_file()
    trap = [sys.executable, "-c", "import torch"]
    trapped = subprocess.run(trap, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert "not in the environment: torch" in trapped.stderr, "the block works"
