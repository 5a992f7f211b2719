"""The base model of (task, augmentation): a task LoRA, trained on base users and merged when loaded (section 2.2)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oppu import recipe as keys
from oppu.cells import pool_of
from oppu.config import parse_augmentation
from oppu.files import file_digest, folder_digests, lock, new_folder, read_base, read_json, write_json
from oppu.profiles import extractive
from oppu.records import InputError, User
from oppu.seeds import seed_of, seed_text
from oppu.tasks import tasks

log = logging.getLogger(__name__)

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def model_files(path: str, revision: str | None) -> dict[str, str]:
    """What identifies the model: sha256 of a local folder's files, or a hub id with its revision."""
    folder = Path(path)
    if not folder.is_dir():
        return {path: revision or "unpinned"}
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files):
        raise InputError([f"{folder}: no safetensors weights; model.path needs a Hugging Face model folder"])
    return {file.name: file_digest(file) for file in files}


def run(out: Path, recipe: Path, base_users: Path, mended: str = "-") -> None:
    """Bring a base up to date, then write `out`, a copy of its manifest; the command of rule `base`.

    Beside `out`: `adapter/`, the task LoRA as a PEFT folder, and `manifest.json`. Neither is declared to Snakemake,
    which deletes what is declared; they are remade only when their key no longer matches or a file is not whole.
    """
    values = read_json(recipe)
    folder = out.parent
    with lock(folder / ".lock", f"base {folder}"):
        model = model_files(values["runtime"]["model"]["path"], values["runtime"]["model"]["revision"])
        key = keys.base_key(values, model, file_digest(base_users))
        manifest = _manifest(folder)
        if manifest is None or manifest["key"] != key:
            trained = _train(folder, values, base_users)
            files = {f"adapter/{name}": known for name, known in folder_digests(folder / "adapter").items()}
            manifest = {"key": key, "model": model, "files": files, **trained}
            write_json(folder / "manifest.json", manifest)
        else:
            log.info("%s is fresh", folder)
        write_json(out, manifest | {"mended": mended})


def merge(base: Path, out: Path) -> str:
    """Write the base as a model folder with its task LoRA merged in; returns the name personal adapters call it by."""
    from oppu.cohort import base_name
    from oppu.models import load_base, load_tokenizer

    manifest, recipe = read_json(base), read_json(base.parent / "recipe.json")
    path, revision = recipe["runtime"]["model"]["path"], recipe["runtime"]["model"]["revision"]
    with new_folder(out) as folder:
        load_base(path, revision, recipe["model"]["dtype"], "cpu", base.parent / "adapter").save_pretrained(folder)
        load_tokenizer(path, revision).save_pretrained(folder)
    return base_name(manifest)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a whole base; None where there is none."""
    path = folder / "manifest.json"
    try:
        manifest = read_json(path)
        whole = all(file_digest(folder / name) == known for name, known in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if whole else None


def _train(folder: Path, recipe: dict[str, Any], base_users: Path) -> dict[str, Any]:
    """Train the task LoRA: the same trainer as for personal adapters, with the base as its only user."""
    from accelerate import Accelerator  # torch: seconds, so only when something is stale

    from oppu.bank import LoraBank, save_adapter
    from oppu.cohort import context_of, progress_log
    from oppu.models import load_base, load_tokenizer
    from oppu.rows import plan
    from oppu.training import train

    model_id = recipe["runtime"]["model"]
    accelerator = Accelerator()
    tokenizer = load_tokenizer(model_id["path"], model_id["revision"])
    model = load_base(model_id["path"], model_id["revision"], recipe["model"]["dtype"], accelerator.device, None)
    users = read_base(base_users)
    counts: Counter[str] = Counter()
    examples = _examples(recipe, context_of(recipe, tokenizer, pool_of(base_users, recipe)), users, counts)
    lora = keys.lora_of(recipe)
    name = (recipe["seed"], recipe["task"]["name"], recipe["augmentation"])
    bank = LoraBank(model, lora, 1, seed_of(*name, "base", "initial parameters"))
    steps = plan(
        len(examples), int(lora.epochs or 0), int(lora.batch_size or 0), seed_text(*name, "base", "data order")
    )
    log.info("%s: %d examples of %d base users, %d steps", folder, len(examples), len(users), len(steps))
    seeds = [seed_of(*name, "base", "dropout")]
    progress = progress_log(f"base {recipe['task']['name']}/{recipe['augmentation']}")
    (trained,) = train(model, bank, [examples], [steps], lora, accelerator, progress=progress, seeds=seeds)
    if trained.error is not None:
        raise InputError([f"{folder}: base training failed: {trained.error}"])
    with new_folder(folder / "adapter") as new:
        save_adapter(new, bank, 0, model_id["path"])
    return {
        "users": len(users),
        "examples": len(examples),
        "steps": len(steps),
        "counts": dict(sorted((+counts).items())),
    }


def _examples(recipe: dict[str, Any], context: Any, users: Sequence[User], counts: Counter[str]) -> list[Any]:
    from oppu.examples import history_examples, query_examples

    profiled = parse_augmentation(recipe["augmentation"]).profile
    examples = []
    for user in users:
        profile = extractive(tasks()[recipe["task"]["name"]], user.history) if profiled else None
        examples += query_examples(context, user, profile, counts)
        if recipe["examples"] == "queries+history":
            examples += history_examples(context, user, profile, counts, recipe["training"]["max_items"])
    if not examples:
        raise InputError(["no base user has a query to learn from; give more users, or lower split.test_users"])
    return examples
