"""Keys: sha256 over everything that determines an artefact, and nothing else (DESIGN: cells are keyed by content).

Without pydantic: a check that nothing is stale computes them, and must take well under a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from oppu.files import canonical, digest, digest_of
from oppu.records import User

VERSIONS = {"split": 1, "retrieval": 1, "prompts": 1, "profiles": 1, "examples": 1, "training": 1, "generation": 1}
"""Recipe versions, one number per step. Raise one when a step's results change; golden tests notice if you forget.

`split` and `profiles` are in no cell's key: a history and a profile are there as they are.
"""
SCORING = 1
"""The version of what `oppu.metrics` makes of predictions and golds."""

NOT_IN_PROMPTS = {"kind", "labels", "history", "output_tokens", "profile"}
"""Fields of a task that no prompt and no training sees (longest answers and profiles are in keys by themselves)."""


def versions(retrieves: bool, *steps: str) -> dict[str, int]:
    """Versions of the steps that stand behind an artefact."""
    wanted = {"prompts", "examples", *steps} | ({"retrieval"} if retrieves else set())
    return {name: number for name, number in VERSIONS.items() if name in wanted}


def profile_key(recipe: dict[str, Any], model_files: dict[str, str] | None, user: User, own: str | None) -> str:
    """Key of a profile: recipe, the writing model's files, that user's history, and the user's own text if any."""
    known = {k: v for k, v in recipe.items() if k != "runtime"}
    history = user.as_json(golds=False)["history"]
    return digest({"recipe": known, "model": model_files, "user": user.key, "history": history, "own": own})


def base_key(
    recipe: dict[str, Any], model_files: dict[str, str], users_digest: str, profiles: dict[str, str] | None
) -> str:
    """Key of a base: recipe, the model's files, all base users' histories and queries, and their profiles' texts."""
    known = _known(recipe, {"runtime"})
    return digest({"recipe": known, "model": model_files, "users": users_digest, "profiles": profiles})


def base_digest(manifest: dict[str, Any]) -> str:
    """What a base is, to its cells: its key and its bytes."""
    return digest({"key": manifest["key"], "files": manifest["files"], "model": manifest["model"]})


@dataclass(frozen=True)
class Person:
    """A user as keys see one: history and queries as canonical JSON."""

    key: str
    history: str
    queries: str

    @staticmethod
    def of(data: dict[str, Any]) -> Person:
        """From `User.as_json(golds=False)`, which is what histories/{key}.json holds."""
        return Person(data["key"], canonical(data["history"]), canonical(data["queries"]))


class Keys:
    """The keys of a setting's cells; what they share is written out once (9,100 cells are checked in two seconds)."""

    def __init__(self, recipe: dict[str, Any], manifest: dict[str, Any]) -> None:
        learned = _known(recipe, {"runtime", "generation", "start"}, without="generation")
        asked = _known(recipe, {"runtime", "training", "start"}, without="training")
        if recipe["generation"].get("labels") == "score":
            asked["labels"] = recipe["task"]["labels"]
        self.learned, self.asked = canonical(learned), canonical(asked)
        self.base = canonical(base_digest(manifest))
        self.reads_history = recipe["augmentation"] not in {"k0", "profile-k0"}

    def adapter(self, user: Person, profile: str | None, pool: str | None) -> str:
        """Key of a personal adapter that began at its initial parameters; oppu/warm.py makes the others' from it."""
        return digest_of(
            {
                "recipe": self.learned,
                "base": self.base,
                "user": canonical(user.key),
                "history": user.history,
                "profile": canonical(profile),
                "pool": canonical(pool),
            }
        )

    def predictions(self, user: Person, profile: str | None, pool: str | None, adapter: str | None) -> str:
        """Key of a user's predictions: their queries, what their prompts carry, the adapter, how answers are made."""
        return digest_of(
            {
                "recipe": self.asked,
                "base": self.base,
                "user": canonical(user.key),
                "adapter": canonical(adapter),
                "queries": user.queries,
                "history": user.history if self.reads_history else "null",
                "profile": canonical(profile),
                "pool": canonical(pool),
            }
        )


def adapter_key(
    recipe: dict[str, Any], manifest: dict[str, Any], user: User, profile: str | None, pool: str | None
) -> str:
    """`Keys.adapter` of one user."""
    return Keys(recipe, manifest).adapter(Person.of(user.as_json(golds=False)), profile, pool)


def predictions_key(
    recipe: dict[str, Any],
    manifest: dict[str, Any],
    user: User,
    profile: str | None,
    pool: str | None,
    adapter: str | None,
) -> str:
    """`Keys.predictions` of one user."""
    return Keys(recipe, manifest).predictions(Person.of(user.as_json(golds=False)), profile, pool, adapter)


def scores_key(recipe: dict[str, Any], queries_digest: str, artefacts: dict[str, Any]) -> str:
    """Key of a setting's scores: how they are counted, the queries with golds, each user's predictions as recorded."""
    task = {name: recipe["task"][name] for name in ("name", "kind", "labels")}
    return digest({"version": SCORING, "task": task, "queries": queries_digest, "predictions": artefacts})


def _known(recipe: dict[str, Any], parts: set[str], without: str | None = None) -> dict[str, Any]:
    """A recipe less these parts, the fields of the task that decide nothing, and the version of one step."""
    known = {name: value for name, value in recipe.items() if name not in parts}
    known["task"] = {name: value for name, value in recipe["task"].items() if name not in NOT_IN_PROMPTS}
    known["versions"] = {name: number for name, number in recipe["versions"].items() if name != without}
    return known
