"""The base model of (task, augmentation): a task LoRA, trained on base users and merged when loaded (section 2.2)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oppu import devices
from oppu.cells import pool_of
from oppu.checkpoints import Checkpoint, checkpoint_of
from oppu.files import file_digest, folder_digests, lock, new_folder, read_base, read_json, sweep, write_json
from oppu.keys import base_key
from oppu.profiles import base_profiles_of
from oppu.progress import Stage
from oppu.recipe import lora_of
from oppu.records import InputError, User
from oppu.seeds import seed_of, seed_text

log = logging.getLogger(__name__)

MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")


def model_files(path: str, revision: str | None, convert: bool = False) -> dict[str, str]:
    """What identifies the model: sha256 of a local folder's files, or a hub id with its revision.

    Raises InputError for a folder without safetensors, unless it has .bin files to convert.
    """
    folder = Path(path)
    if not folder.is_dir():
        return {path: revision or "unpinned"}
    files = sorted({file for pattern in MODEL_FILES for file in folder.glob(pattern)})
    if not any(file.suffix == ".safetensors" for file in files):
        pickled = sorted(folder.glob("pytorch_model*.bin"))
        if pickled and not convert:
            raise InputError(
                [f"{folder}: weights only as .bin; model.convert: true rewrites them, once (or profiles.convert)"]
            )
        if not pickled:
            raise InputError([f"{folder}: no safetensors weights; model.path needs a Hugging Face model folder"])
        files += pickled
    return {file.name: file_digest(file) for file in files}


def models_of(recipe: dict[str, Any]) -> dict[str, str]:
    """`model_files` of a recipe's model, and of its encoder where it retrieves with one."""
    files = model_files(**recipe["runtime"]["model"])
    if encoder := recipe["runtime"]["encoder"]:
        files |= {f"encoder/{name}": known for name, known in model_files(encoder, None).items()}
    return files


def run(out: Path, recipe: Path, base_users: Path, mended: str = "-", profiles: Path | None = None) -> None:
    """Bring a base up to date, then write `out`, a copy of its manifest; the command of rule `base`.

    `profiles` is the task's folder of profiles, read where the augmentation carries one.

    Beside `out`: `adapter/`, the task LoRA as a PEFT folder, and `manifest.json`. Neither is declared to Snakemake,
    which deletes what is declared; they are remade only when their key no longer matches or a file is not whole.
    """
    values = read_json(recipe)
    folder = out.parent
    with lock(folder / ".lock", f"base {folder}"):
        sweep(folder / "*")
        model = models_of(values)
        texts = base_profiles_of(values, profiles)
        key = base_key(values, model, file_digest(base_users), texts)
        manifest = _manifest(folder)
        if manifest is None or manifest["key"] != key:
            checkpoint = Checkpoint(checkpoint_of(folder), [key])  # beside the folder, which DVC may ship
            trained = _train(folder, values, base_users, texts, checkpoint)
            files = {f"adapter/{name}": known for name, known in folder_digests(folder / "adapter").items()}
            manifest = {"key": key, "model": model, "files": files, **trained}
            write_json(folder / "manifest.json", manifest)
            checkpoint.delete()
        else:
            log.info("%s is fresh", folder)
        write_json(out, manifest | {"mended": mended})


def merge(base: Path, out: Path) -> str:
    """Write the base as a model folder with its task LoRA merged in; returns the name personal adapters call it by.

    It is never written quantized: who loads it may quantize it again in the same way.
    """
    from oppu.cohort import base_name
    from oppu.models import load_base, load_tokenizer

    manifest, recipe = read_json(base), read_json(base.parent / "recipe.json")
    source = recipe["runtime"]["model"]
    with new_folder(out) as folder:
        model = load_base(**source, dtype=recipe["model"]["dtype"], task_adapter=base.parent / "adapter")
        model.save_pretrained(folder)
        load_tokenizer(source["path"], source["revision"]).save_pretrained(folder)
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


def _train(
    folder: Path,
    recipe: dict[str, Any],
    base_users: Path,
    profiles: dict[str, str] | None,
    checkpoint: Checkpoint,
) -> dict[str, Any]:
    """Train the task LoRA: the same trainer as for personal adapters, with the base as its only user."""
    devices.take()
    from accelerate import Accelerator  # torch: seconds, so only when something is stale

    from oppu.bank import LoraBank, save_adapter
    from oppu.cohort import context_of, loading_of, log_memory
    from oppu.models import load_base, load_tokenizer
    from oppu.rows import plan
    from oppu.training import train

    model_id = recipe["runtime"]["model"]
    accelerator = Accelerator()
    tokenizer = load_tokenizer(model_id["path"], model_id["revision"])
    model = load_base(**model_id, **loading_of(recipe), device=accelerator.device)
    users = read_base(base_users)
    counts: Counter[str] = Counter()
    context = context_of(recipe, tokenizer, pool_of(base_users, recipe), accelerator.device)
    examples = _examples(recipe, context, users, counts, profiles)
    lora = lora_of(recipe)
    name = (recipe["seed"], recipe["task"]["name"], recipe["augmentation"])
    bank = LoraBank(model, lora, 1, seed_of(*name, "base", "initial parameters"))
    steps = plan(
        len(examples), int(lora.epochs or 0), int(lora.batch_size or 0), seed_text(*name, "base", "data order")
    )
    log.info("%s: %d examples of %d base users, %d steps", folder, len(examples), len(users), len(steps))
    seeds = [seed_of(*name, "base", "dropout")]
    with Stage(f"{recipe['task']['name']}/{recipe['augmentation']} base", folder.parent.parent.parent) as stage:
        (trained,) = train(
            model, bank, [examples], [steps], lora, accelerator, progress=stage, seeds=seeds, checkpoint=checkpoint
        )
    if trained.error is not None:
        raise InputError([f"{folder}: base training failed: {trained.error}"])
    log_memory()
    with new_folder(folder / "adapter") as new:
        save_adapter(new, bank, 0, model_id["path"])
    return {
        "users": len(users),
        "examples": len(examples),
        "steps": len(steps),
        "counts": dict(sorted((+counts).items())),
    }


def _examples(
    recipe: dict[str, Any],
    context: Any,
    users: Sequence[User],
    counts: Counter[str],
    profiles: dict[str, str] | None,
) -> list[Any]:
    from oppu.examples import history_examples, query_examples

    if profiles is not None and (missing := [user.key for user in users if user.key not in profiles]):
        raise InputError([f"base user {key} has no profile in base.jsonl; make base_profiles anew" for key in missing])
    examples = []
    for user in users:
        profile = profiles[user.key] if profiles is not None else None
        examples += query_examples(context, user, profile, counts)
        if recipe["examples"] == "queries+history":
            examples += history_examples(context, user, profile, counts, recipe["training"]["max_items"])
    if not examples:
        raise InputError(["no base user has a query to learn from; give more users, or lower split.test_users"])
    return examples
