"""Checkpoints within a training: a long one that was cut off goes on where it was, and makes the same bytes.

A checkpoint is a folder of private files: per adapter under way a safetensors file (the adapter, AdamW's moments and
count of steps), and state.json. The place in the schedule and in the plan of steps follows from the count. An adapter
is known by its key, the digest of everything that it is made from, so a stale checkpoint is never used. Nothing here
imports torch before there is something to train.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oppu.files import file_digest, folder_digests, new_folder, read_json, write_json

if TYPE_CHECKING:
    from torch.optim import AdamW

    from oppu.bank import Bank
    from oppu.budget import Budget

log = logging.getLogger(__name__)

FORMAT = 1
"""Raise it when what a checkpoint holds is read in another way: older ones are then not used."""
STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def checkpoint_of(stamp: Path) -> Path:
    """Where the checkpoints of the job that writes `stamp` lie: beside it, outside of all that DVC ships."""
    return stamp.with_suffix(".checkpoint")


def kept(path: Path) -> dict[int, tuple[Path, dict[str, Any]]]:
    """Each rank's newest checkpoint below a path: its folder and what its state.json says."""
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for folder in sorted(path.glob("[0-9]*-[0-9]*")):  # numbers have so many digits that the newest is the last
        try:
            state = read_json(folder / STATE)
        except (OSError, ValueError):
            continue
        if state.get("format") == FORMAT:
            found[int(folder.name.split("-")[0])] = folder, state
    return found


def kept_keys(path: Path) -> dict[str, int]:
    """The adapters that checkpoints below a path go on with, by key, and the rank of each."""
    return {key: rank for rank, (_, state) in kept(path).items() for key in state["done"]}


@dataclass
class Checkpoint:
    """The checkpoint of one training. `keys` are those of the bank's rows; None: a row that is never kept.

    A rank reads its own, and those of ranks that there are no more.
    """

    path: Path
    keys: Sequence[str | None]
    rank: int = 0
    world: int = 1
    _written: float = field(default_factory=time.monotonic)
    _number: int = 0

    def resume(self, bank: Bank, optimisers: Sequence[AdamW], budget: Budget | None) -> list[int]:
        """Put rows and optimisers where they were; the steps done of each row. `budget`: pack as then, too."""
        done = [0] * len(bank)
        for rank, (folder, state) in kept(self.path).items():
            if rank != self.rank and rank < self.world:
                continue
            for row, key in enumerate(self.keys):
                steps = state["done"].get(key)
                if key and steps and self._load(folder, state, key, row, bank, optimisers):
                    done[row] = steps
            if rank == self.rank:
                self._number = int(folder.name.split("-")[1])
                if budget is not None and set(state["done"]) & set(self.keys):
                    budget.tokens = state["tokens"]
        if any(done):
            log.info(
                "%s: %d of %d adapters go on, after %d steps", self.path, sum(map(bool, done)), len(done), sum(done)
            )
        return done

    def _load(
        self, folder: Path, state: dict[str, Any], key: str, row: int, bank: Bank, optimisers: Sequence[AdamW]
    ) -> bool:
        from safetensors.torch import load_file

        path = folder / f"{key}.safetensors"
        if not path.is_file() or file_digest(path) != state["files"].get(path.name):
            log.warning("%s is missing or not what was written: this adapter begins anew", path)
            return False
        tensors = load_file(path)
        weights = tensors["weights"]
        if weights.shape != bank.weights[row].shape or weights.dtype != bank.weights.dtype:
            return False
        bank.weights[row] = weights.to(bank.weights.device)
        (parameter,) = optimisers[row].param_groups[0]["params"]
        moments = {name: tensors[name].to(parameter.device) for name in MOMENTS[:2]}
        optimisers[row].state[parameter] = moments | {"step": tensors["step"]}
        return True

    def keep(
        self,
        minutes: float | None,
        bank: Bank,
        optimisers: Sequence[AdamW],
        done: Sequence[int],
        rows: Iterable[int],
        budget: Budget,
    ) -> None:
        """Write these unfinished rows, if the last time was so many minutes ago. A full disk is only warned of."""
        from safetensors import SafetensorError

        if minutes is None or time.monotonic() - self._written < 60 * minutes:
            return
        names = {row: key for row in sorted(rows) if (key := self.keys[row]) is not None}
        if not names:
            return
        try:
            self._write(names, bank, optimisers, done, budget)
        except (OSError, SafetensorError) as error:
            log.warning("no checkpoint was written, training goes on: %s", error)
        self._written = time.monotonic()

    def _write(
        self, names: dict[int, str], bank: Bank, optimisers: Sequence[AdamW], done: Sequence[int], budget: Budget
    ) -> None:
        from safetensors.torch import save_file

        self._number += 1
        name = f"{self.rank}-{self._number:09d}"
        with new_folder(self.path / name) as folder:
            for row, key in names.items():
                if done[row]:
                    state = optimisers[row].state[optimisers[row].param_groups[0]["params"][0]]
                    tensors = {part: state[part].cpu() for part in MOMENTS} | {"weights": bank.weights[row].cpu()}
                    save_file(
                        {part: tensor.contiguous() for part, tensor in tensors.items()}, folder / f"{key}.safetensors"
                    )
            files = folder_digests(folder)
            steps = {key: done[row] for row, key in names.items()}
            write_json(folder / STATE, {"format": FORMAT, "tokens": budget.tokens, "done": steps, "files": files})
        self._forget(but=name)

    def delete(self) -> None:
        """Delete this rank's checkpoints, and the folder with the last of them."""
        self._forget()
        with suppress(OSError):  # other ranks' may be there, or there never were any
            self.path.rmdir()

    def _forget(self, but: str = "") -> None:
        """Delete this rank's other checkpoints, half-written ones of a killed run too."""
        for path in [*self.path.glob(f"{self.rank}-*"), *self.path.glob(f".{self.rank}-*")]:
            if path.name != but:
                shutil.rmtree(path)
