"""Recipes: everything that a base or a cell depends on besides data and base, and the keys made from them.

A recipe is plain JSON that Snakemake writes into the tree. `runtime` in it says how to run, not what comes out: it is
no part of any key. Nothing here imports torch: a check that nothing is stale must take well under a second.
"""

from __future__ import annotations

from typing import Any

from oppu.config import CONTROLS, TRAININGS, Config, Lora, Training, parse_augmentation
from oppu.files import digest
from oppu.records import User
from oppu.tasks import Task, tasks

VERSIONS = {"split": 1, "retrieval": 1, "prompts": 1, "profiles": 1, "examples": 1, "training": 1, "generation": 1}
"""Recipe versions, one number per step. Raise one when a step's results change; golden tests notice if you forget."""

RUNTIME = {"tokens_per_batch", "checkpoint_minutes"}
START = {"start", "replay"}
"""Where personal training begins: no part of a recipe's `training`, nor of the key of what began at the start."""


def _split_runtime(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {k: v for k, v in values.items() if k not in RUNTIME},
        {k: v for k, v in values.items() if k in RUNTIME},
    )


def seeded(name: str) -> tuple[str, int]:
    """A setting's augmentation and number of training seed: `k0` -> k0, 0; `k0-s2` -> k0, 2."""
    augmentation, _, number = name.partition("-s")
    return augmentation, int(number or 0)


def _common(config: Config, task: Task, name: str) -> dict[str, Any]:
    augmentation, repeat = seeded(name)
    what = parse_augmentation(augmentation)
    found = what.k > 0 and not what.random
    return {
        "task": task.model_dump(exclude={"title", "personal", "profile_prompt"}),
        "augmentation": augmentation,
        "seed": config.seed + repeat,
        "model": config.model.model_dump(include={"dtype", "max_length", "quantization"}),
        "random": config.retrieval.random if what.random else None,
        "query": config.retrieval.query if found and what.retriever != "recency" else None,
        "versions": VERSIONS,
    }


def _where(config: Config, name: str) -> dict[str, Any]:
    """Where models lie: what they are is told by their files, in the base's manifest."""
    dense = parse_augmentation(seeded(name)[0]).retriever == "dense"
    model = config.model.model_dump(include={"path", "revision", "convert"})
    return {"model": model, "encoder": config.retrieval.encoder if dense else None}


def base_recipe(config: Config, task: str, augmentation: str) -> dict[str, Any]:
    """What the base model of (task, augmentation) depends on besides data: section 2.2."""
    lora = config.base_lora(task)
    training, runtime = _split_runtime(lora.model_dump(exclude={"examples"}))
    return _common(config, tasks()[task], augmentation) | {
        "examples": lora.examples,
        "training": training,
        "runtime": {"training": runtime} | _where(config, augmentation),
    }


def cell_recipe(config: Config, task: str, augmentation: str, peft: str, history: str) -> dict[str, Any]:
    """What the cells of one setting depend on besides data and base: section 3."""
    training, train_runtime = _split_runtime(config.training(peft, task).model_dump(exclude=START))
    generation, generate_runtime = _split_runtime(config.generation.model_dump())
    generation["max_new_tokens"] = generation["max_new_tokens"] or tasks()[task].output_tokens
    if generation.pop("labels") == "score" and tasks()[task].labels:
        generation = {"labels": "score", "max_new_tokens": generation["max_new_tokens"]}
    elif not generation["sample"]:
        generation = {"sample": False, "max_new_tokens": generation["max_new_tokens"]}
    return _common(config, tasks()[task], augmentation) | {
        "peft": peft,
        "history": history,
        "training": training if peft != "none" else None,
        "generation": generation,
        "runtime": {"training": train_runtime, "generation": generate_runtime} | _where(config, augmentation),
        **_start(config, task, peft),
    }


def _start(config: Config, task: str, peft: str) -> dict[str, Any]:
    """Where a setting's personal adapters begin; nothing for `initial`, nor where none is trained."""
    lora = config.lora(task)
    if lora.start == "pooled" and peft == "lora":
        return {"start": {"from": "pooled"}}
    if lora.start == "previous" and peft not in ("none", *CONTROLS):
        return {"start": {"from": "previous", "replay": lora.replay}}
    return {}


def profile_recipe(config: Config, task: str) -> dict[str, Any]:
    """What the profiles of a task depend on besides histories and own texts: appendix J."""
    record, settings = tasks()[task], config.profiles
    where = {"path", "revision", "convert"}
    asked, runtime = _split_runtime(settings.model_dump(exclude={"own", "backend", *where}))
    llm = settings.backend == "llm"
    return {
        "task": record.model_dump(include={"name", "item", "profile_prompt"} if llm else {"name", "profile"}),
        "backend": settings.backend,
        "settings": asked if llm else None,
        "seed": config.seed if llm else None,
        "version": VERSIONS["profiles"],
        "runtime": runtime | {"model": settings.model_dump(include=where)},
    }


def profile_key(recipe: dict[str, Any], model_files: dict[str, str] | None, user: User, own: str | None) -> str:
    """Key of a profile: recipe, the writing model's files, that user's history, and the user's own text if any."""
    known = {k: v for k, v in recipe.items() if k != "runtime"}
    history = user.as_json(golds=False)["history"]
    return digest({"recipe": known, "model": model_files, "user": user.key, "history": history, "own": own})


def training_of(recipe: dict[str, Any]) -> Training:
    """The training settings of a recipe's own kind."""
    kind = TRAININGS.get(recipe.get("peft", "lora"))
    return kind(**recipe["training"] | recipe["runtime"]["training"]) if kind else lora_of(recipe)


def lora_of(recipe: dict[str, Any]) -> Lora:
    """A recipe's settings of LoRA, alpha resolved to a number (default: the rank, a scale of 1)."""
    values = recipe["training"] | recipe["runtime"]["training"]
    return Lora(**values | {"alpha": values["alpha"] or float(values["rank"])})


def base_key(
    recipe: dict[str, Any], model_files: dict[str, str], users_digest: str, profiles: dict[str, str] | None
) -> str:
    """Key of a base: recipe, the model's files, all base users' histories and queries, and their profiles' texts."""
    known = {k: v for k, v in recipe.items() if k != "runtime"}
    return digest({"recipe": known, "model": model_files, "users": users_digest, "profiles": profiles})


def base_digest(manifest: dict[str, Any]) -> str:
    """What a base is, to its cells: its key and its bytes."""
    return digest({"key": manifest["key"], "files": manifest["files"], "model": manifest["model"]})


def adapter_key(
    recipe: dict[str, Any], manifest: dict[str, Any], user: User, profile: str | None, pool: str | None
) -> str:
    """Key of a personal adapter: everything that determines it (DESIGN: cells are keyed by content).

    It is that of an adapter which began at its initial parameters; oppu/warm.py makes the others' from it.
    """
    known = {k: v for k, v in recipe.items() if k not in {"runtime", "generation", "start"}}
    return digest(
        {
            "recipe": known,
            "base": base_digest(manifest),
            "user": user.key,
            "history": user.as_json(golds=False)["history"],
            "profile": profile,
            "pool": pool,
        }
    )


def predictions_key(
    recipe: dict[str, Any],
    manifest: dict[str, Any],
    user: User,
    profile: str | None,
    pool: str | None,
    adapter: str | None,
) -> str:
    """Key of a user's predictions: their queries, what their prompts carry, the adapter, and how answers are made."""
    known = {k: v for k, v in recipe.items() if k not in {"runtime", "training", "start"}}
    data = user.as_json(golds=False)
    return digest(
        {
            "recipe": known,
            "base": base_digest(manifest),
            "user": user.key,
            "adapter": adapter,
            "queries": data["queries"],
            "history": data["history"] if recipe["augmentation"] not in {"k0", "profile-k0"} else None,
            "profile": profile,
            "pool": pool,
        }
    )
