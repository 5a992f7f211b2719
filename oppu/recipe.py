"""Recipes: everything that a base or a cell depends on besides data and base; oppu/keys.py makes keys from them.

A recipe is plain JSON that Snakemake writes into the tree. `runtime` in it says how to run, not what comes out: it is
no part of any key.
"""

from __future__ import annotations

from typing import Any

from oppu.config import Config
from oppu.keys import VERSIONS, versions
from oppu.setting import CONTROLS, parse_augmentation, seeded
from oppu.tasks import Task, tasks
from oppu.training_settings import TRAININGS, Lora, Training

RUNTIME = {"tokens_per_batch", "checkpoint_minutes"}
START = {"start", "replay"}
"""Where personal training begins: no part of a recipe's `training`, nor of the key of what began at the start."""


def _split_runtime(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return (
        {k: v for k, v in values.items() if k not in RUNTIME},
        {k: v for k, v in values.items() if k in RUNTIME},
    )


def _common(config: Config, task: Task, name: str, *steps: str) -> dict[str, Any]:
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
        "versions": versions(what.k > 0, *steps),
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
    return _common(config, tasks()[task], augmentation, "training") | {
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
    return _common(config, tasks()[task], augmentation, "training", "generation") | {
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


def training_of(recipe: dict[str, Any]) -> Training:
    """The training settings of a recipe's own kind."""
    kind = TRAININGS.get(recipe.get("peft", "lora"))
    return kind(**recipe["training"] | recipe["runtime"]["training"]) if kind else lora_of(recipe)


def lora_of(recipe: dict[str, Any]) -> Lora:
    """A recipe's settings of LoRA, alpha resolved to a number (default: the rank, a scale of 1)."""
    values = recipe["training"] | recipe["runtime"]["training"]
    return Lora(**values | {"alpha": values["alpha"] or float(values["rank"])})
