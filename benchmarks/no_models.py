"""The command `oppu` without models: benchmarks/workflow.py puts it first on the PATH.

Loading a model, training and generating do nothing: an adapter is always the same small file and an answer always the
same text. Everything else (split, keys, cells, stamps, profiles, scores, tables) is the product's own. torch is never
imported, as it is not where nothing is stale.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

COMMAND = """#!{python}
import sys
sys.path[:0] = {paths}
from no_models import main
main()
"""


def install(folder: Path, root: Path) -> None:
    """Write a command `oppu` into a folder that is to stand first on the PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(root), str(Path(__file__).parent)]
    (folder / "oppu").write_text(COMMAND.format(python=sys.executable, paths=paths), encoding="utf-8")
    (folder / "oppu").chmod(0o755)


def write_adapter(folder: Path) -> None:
    """Two small files by PEFT's names."""
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}\n', encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(bytes(4096))


class Cohort:
    """oppu.cohort.Cohort, without a model."""

    def __init__(
        self, recipe: dict[str, Any], manifest: object, base: Path, pool: object, users: Sequence[Any]
    ) -> None:
        self.answer = (recipe["task"]["labels"] or ["an answer"])[0]
        self.users = {user.key: user for user, *_ in users}
        self.adapters = ["pooled"] if recipe["peft"] == "pooled" else list(self.users)

    def load(self, key: str, folder: Path) -> None:
        pass

    def save(self, adapter: str, folder: Path) -> None:
        write_adapter(folder)

    def train(
        self, keys: Sequence[str], finished: Callable[[str], None], lessons: object = None, checkpoint: object = None
    ) -> dict[str, str]:
        for key in keys:
            finished(key)
        return {}

    def predict(self, keys: Sequence[str], finished: Callable[[str, list[dict[str, Any]]], None]) -> dict[str, str]:
        made = {"prediction": self.answer, "prompt_tokens": 1, "cut_query": False, "cut_history": 0}
        for key in keys:
            finished(key, [{"id": query.id, **made} for query in self.users[key].queries])
        return {}


def train_base(folder: Path, *_: object) -> dict[str, Any]:
    """oppu.base._train, without a model."""
    from oppu.files import new_folder

    with new_folder(folder / "adapter") as new:
        write_adapter(new)
    return {"users": 0, "examples": 0, "steps": 0, "counts": {}}


def main() -> None:
    """Run the product's command line."""
    cohort = ModuleType("oppu.cohort")
    cohort.Cohort = Cohort  # type: ignore[attr-defined]
    sys.modules["oppu.cohort"] = cohort
    if "base" in sys.argv[1:4]:  # oppu [--gpus N] base
        from oppu import base

        base._train = train_base
    from oppu.command import main as run

    run()
