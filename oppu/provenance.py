"""What ran: provenance.json beside the tables, and the line below the text, markdown and HTML tables.

Two kinds of facts, kept apart. `made_from` decides the tables' bytes: configuration, data, model, recipe versions.
`run` only tells who wrote them: git commit, command, packages. That part is no input of any job, so another commit or
command makes nothing stale; and the file is written again only when `made_from` or a table changed, so that `run` is
the run that first gave these very bytes.
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oppu.files import digest, file_digest, read_json, read_users, sweep, write_json
from oppu.keys import VERSIONS

if TYPE_CHECKING:  # polars: the workflow imports this module at every start
    from oppu.boards import Bootstrap

log = logging.getLogger(__name__)

PACKAGES = (
    *("oppu", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "snakemake", "numpy"),
    *("polars", "scipy", "scikit-learn", "rank-bm25", "rouge-score"),
)
RUN = "run.json"
"""In the results folder: what Snakemake was last started with there."""


def note_run(results: str | Path, project: str | Path, command: Sequence[str], config: dict[str, Any]) -> None:
    """Write run.json: the command, the commit of `project` and the whole configuration, of a run that begins."""
    name = Path(command[0]).name
    shown = ["snakemake" if name in ("__main__.py", "snakemake") else name, *command[1:]]
    sweep(Path(results) / RUN)
    write_json(Path(results) / RUN, {"command": shown, "commit": commit(project), "config": config})


def commit(project: str | Path) -> str | None:
    """The git commit of a folder, with `-dirty` behind it where files differ from it; None outside of git.

    Where git refuses to tell (the folder is somebody else's, say), a warning says why, and it is None too.
    """
    command = ["git", "-C", str(project), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, env=os.environ | {"LC_ALL": "C"}, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    if done.returncode and "not a git repository" not in done.stderr:
        log.warning("the results will not say which commit made them: %s", done.stderr.strip())
    return done.stdout.strip() or None


def packages() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on; of those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def made_from(folder: Path, tasks: Sequence[str], settings: Sequence[str], how: Bootstrap) -> dict[str, Any]:
    """What the tables of a results folder are made from.

    `config` is the digest of every recipe behind them and of how intervals are drawn; what changes no result
    (users_per_job, tokens_per_batch, where a model lies) is not in it. `data` is the digest of each task's split, golds
    included; `model` that of each base's model files, or the hub id with its commit.
    """
    augmentations = sorted({setting.split("/")[0] for setting in settings})
    settled, models, where = [digest(vars(how))], {}, []
    for task in tasks:
        for name in [*settings, *(f"{augmentation}/base" for augmentation in augmentations)]:
            recipe = read_json(folder / task / name / "recipe.json")
            settled.append(digest({key: value for key, value in recipe.items() if key != "runtime"}))
            where.append(recipe["runtime"]["model"])
    for task, augmentation in itertools.product(tasks, augmentations):
        manifest = read_json(folder / task / augmentation / "base/base.json")
        models[f"{task}/{augmentation}"] = manifest["model"]
    return {
        "config": digest(settled),
        "data": {task: data_of(folder / task / "split") for task in tasks},
        "model": {"name": Path(where[0]["path"]).name, "revision": where[0]["revision"], "files": digest(models)},
        "recipe_versions": VERSIONS,
    }


def data_of(split: Path) -> str:
    """The digest of a task's split: who is tested, with which history and golds, and who trains the base."""
    users = read_users(split / "users.json")
    files = [split / "base.jsonl", split / "queries.jsonl", *(split / f"histories/{user}.json" for user in users)]
    return digest([file_digest(file) for file in files])


def line_of(made: dict[str, Any], path: Path) -> str:
    """What stands below a table: what it was made from, in short, and the file that says the rest."""
    parts = [f"config {made['config'][:12]}"] if "config" in made else []
    parts.append(f"data {digest(made['data'])[:12]}")
    if model := made.get("model"):
        parts.append(f"model {model['name']} ({model['revision'] or 'sha256 ' + model['files'][:12]})")
    if found := made.get("recipe_versions"):
        same = len(set(found.values())) == 1
        parts.append(f"recipe versions {next(iter(found.values())) if same else digest(found)[:12]}")
    return f"Made from {', '.join(parts)}; more in {path.name}."


def write(path: Path, made: dict[str, Any], tables: Sequence[Path], results: Path) -> None:
    """Write what these tables were made from and who ran it; a file that tells of these very bytes already is kept."""
    now = {"made_from": made, "tables": {file.name: file_digest(file) for file in tables}}
    known = _read(path)
    if {name: known.get(name) for name in now} == now:
        path.touch()  # Snakemake takes it for an output of this job
        return
    write_json(path, now | {"run": _read(results / RUN) | {"packages": packages()}}, mode=0o644)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
