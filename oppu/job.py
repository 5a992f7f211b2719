"""The command of rule `cells`: a cohort's stale cells are made together, in this process or shared out over several.

Everything up to there is done before torch is imported: a check that nothing is stale takes well under a second.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from oppu import devices, ranks
from oppu.cells import Cell, borrowed, open_cell, pool_of, source_of, start_of
from oppu.checkpoints import Checkpoint, checkpoint_of, kept_keys
from oppu.failures import UsersFailed, recorded
from oppu.files import (
    digest,
    file_digest,
    held,
    jsonl,
    new_folder,
    read_json,
    read_user,
    read_users,
    sweep,
    write_bytes,
    write_json,
)
from oppu.records import Item
from oppu.setting import CONTROLS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What the cells of a setting are made from, besides each user's own history."""

    setting: Path
    recipe: dict[str, Any]
    manifest: dict[str, Any]
    base: Path
    pool: list[Item] | None
    everyone: Sequence[str]
    profiles: Path | None
    checkpoint: Path

    def open(self, histories: Iterable[Path]) -> tuple[list[Cell], dict[str, str]]:
        """These users' cells; and why those failed that could not be opened."""
        cells: list[Cell] = []
        failed: dict[str, str] = {}
        pool = digest([item.fields for item in self.pool]) if self.pool else None
        lend = cache(borrowed)  # pooled: one adapter for all
        for path in histories:
            try:
                source = source_of(self.setting, self.recipe["peft"], path.stem, self.everyone)
                other = source if self.recipe["peft"] in CONTROLS else start_of(self.setting, self.recipe)
                lent = lend(other) if other else None
                folder = self.setting / "users" / path.stem
                user = read_user(path)
                cells.append(open_cell(folder, user, self.recipe, self.manifest, pool, source, lent, self.profiles))
            except (OSError, ValueError, KeyError, TypeError) as error:
                failed[path.stem] = f"{path}: {error or type(error).__name__}"
        return cells, failed

    def cost(self, cell: Cell) -> float:
        """About what a stale cell costs: the characters that are read, forward and backward in each epoch."""
        learned = 0
        if "adapter" in cell.stale and cell.lesson is not None:
            items = (cell.user.history[place].fields for place in cell.lesson.items)
            learned = sum(len(text) for fields in items for text in fields.values()) * self.recipe["training"]["epochs"]
        return 1.0 + 2 * learned + sum(len(query.input) for query in cell.user.queries)

    def along(self, cells: Sequence[Cell]) -> list[Cell]:
        """Cells that were finished after the checkpoint from which others of them go on.

        They are trained along once more, so that all is packed as it was, to the same bytes; what they have is kept.
        """
        if not (saved := kept_keys(self.checkpoint)):
            return []
        rank_of = {cell.user.key: saved.get(cell.keys.get("adapter", "")) for cell in cells}
        waiting = {rank_of[cell.user.key] for cell in cells if "adapter" in cell.stale} - {None}
        done = [cell for cell in cells if rank_of[cell.user.key] in waiting and cell.fresh("adapter")]
        return [cell for cell in done if cell.lesson and cell.lesson.items]

    def make(self, cells: Sequence[Cell], rank: int = 0, world: int = 1) -> dict[str, str]:
        """Train and predict these cells in one process; returns why each failed user failed."""
        from oppu.cohort import Cohort  # torch and transformers: seconds, so only when something is stale

        along = {cell.user.key: cell for cell in self.along(cells)}
        stale = [cell for cell in cells if cell.stale]
        people = [(c.user, c.profile, c.counts) for c in cells if c.stale or c.user.key in along]
        cohort = Cohort(self.recipe, self.manifest, self.base, self.pool, people)
        failed: dict[str, str] = {}
        todo = {cell.user.key: cell for cell in stale if "adapter" in cell.keys and not cell.fresh("adapter")}
        lessons = {key: cell.lesson for key, cell in (todo | along).items() if cell.lesson is not None}
        if self.recipe["peft"] != "none":
            for source, key in {cell.source: cell.user.key for cell in stale if cell.user.key not in lessons}.items():
                cohort.load(key, source / "adapter")
        for key, lesson in lessons.items():
            start = todo[key].folder if lesson.warm else start_of(self.setting, self.recipe)
            if start is not None:
                cohort.load(key, start / "adapter")

        def finished(key: str) -> None:
            if key in along:
                return
            with new_folder(todo[key].folder / "adapter") as folder:
                cohort.save(key, folder)
            todo[key].note("adapter")

        for cell in stale:
            sweep(cell.folder / "*")
        if todo:
            keys = {cell.user.key: cell.keys["adapter"] for cell in (todo | along).values()}
            checkpoint = Checkpoint(self.checkpoint, [keys.get(name) for name in cohort.adapters], rank, world)
            found = cohort.train([key for key in cohort.users if key in lessons], finished, lessons, checkpoint)
            failed |= {key: why for key, why in found.items() if key in todo}
            checkpoint.delete()
            for key, cell in along.items():
                cohort.load(key, cell.folder / "adapter")
        waiting = [cell for cell in stale if cell.user.key not in failed and not cell.fresh("predictions")]
        places = {cell.user.key: cell for cell in waiting}

        def answered(key: str, answers: list[dict[str, Any]]) -> None:
            write_bytes(places[key].folder / "predictions.jsonl", jsonl(answers))
            places[key].note("predictions")

        return failed | cohort.predict(list(places), answered)


def run(
    stamp: Path,
    recipe: Path,
    base: Path,
    histories: Sequence[Path],
    base_users: Path,
    mended: str = "-",
    profiles: Path | None = None,
    users: Path | None = None,
    processes: int = 1,
) -> None:
    """Bring the cells of these users up to date, then write the stamp; the command of rule `cells`.

    `profiles` is the task's folder of profiles, read where the augmentation carries one; `users` is users.json, which
    `swapped` needs to know all test users. Stale users are shared out over the ranks of a launcher (accelerate launch,
    torchrun) or, without one, over up to `processes` that are started for it. Raises InputError at the end when users
    failed; the others' cells are kept, and there is no stamp.
    """
    values, names = read_json(recipe), [path.stem for path in histories]
    everyone = read_users(users) if users else names
    pool = pool_of(base_users, values)
    checkpoint = checkpoint_of(stamp)
    job = Job(recipe.parent, values, read_json(base), base.parent, pool, everyone, profiles, checkpoint)
    rank, launched = ranks.here()
    if rank:
        ranks.follow(stamp, lambda given: _given(job, [path for path in histories if path.stem in given]))
        return
    with ranks.leading(stamp, processes) as lead, held(job.setting, names), recorded(job.setting, names):
        cells, failed = job.open(histories)
        stale = [cell for cell in cells if cell.stale]
        trained = sum("adapter" in cell.stale for cell in stale)
        asked = sum("predictions" in cell.stale for cell in stale)
        log.info("%s: %d users, %d to train, %d to predict", job.setting, len(names), trained, asked)
        _tell_warm(stale)
        if stale and launched == 1:  # a launcher has shared its GPUs out already
            devices.take()
        working = {cell.user.key: cell for cell in [*stale, *job.along(cells)]}
        saved = kept_keys(checkpoint)
        homes = {key: saved[known] for key, c in working.items() if (known := c.keys.get("adapter")) in saved}
        own = lead.share({key: job.cost(cell) for key, cell in working.items()}, homes)
        if own:
            ranks.settle(rank, lead.world)
            failed |= job.make([cell for cell in cells if cell.user.key in own], rank, lead.world)
        failed |= lead.failures()
        if lead.lines and stale:
            cells, more = job.open(path for path in histories if path.stem not in failed)  # as other ranks left them
            failed |= more
        failed = _unmade(cells, {cell.user.key for cell in stale}) | failed
        _finish(stamp, names, cells, failed, job.setting, mended)


def _given(job: Job, histories: Sequence[Path]) -> dict[str, str]:
    """What a further rank does with the users that it was given."""
    rank, world = ranks.here()
    cells, failed = job.open(histories)
    ranks.settle(rank, world)
    return failed | (job.make(cells, rank, world) if any(cell.stale for cell in cells) else {})


def _tell_warm(stale: Sequence[Cell]) -> None:
    lessons = [cell.lesson for cell in stale if "adapter" in cell.stale and cell.lesson and cell.lesson.warm]
    if lessons:
        learned = sum(len(lesson.items) for lesson in lessons)
        again = sum(lesson.links[-1]["replayed"] for lesson in lessons)
        log.info("%d go on from their adapters: %d new items, %d old ones again", len(lessons), learned - again, again)


def _unmade(cells: Sequence[Cell], asked: set[str]) -> dict[str, str]:
    """Of the users whose cells were stale, those whose cells still are; fresh ones are not read again."""
    return {c.user.key: f"not made: {', '.join(left)}" for c in cells if c.user.key in asked and (left := c.stale)}


def _finish(
    stamp: Path, names: Sequence[str], cells: Sequence[Cell], failed: dict[str, str], setting: Path, mended: str
) -> None:
    """Write the stamp if no user failed; UsersFailed otherwise."""
    if failed:
        lines = [f"{setting}: user {user}: {why}" for user, why in sorted(failed.items())]
        raise UsersFailed([*lines, f"{len(failed)} of {len(names)} users failed; the others are kept"], failed)
    shutil.rmtree(checkpoint_of(stamp), ignore_errors=True)
    sweep(stamp)
    files: dict[str, str | None] = {
        f"../users/{c.user.key}/{name}": None
        for c in cells
        for e in c.record["artefacts"].values()
        for name in e["files"]
    }
    # A record's sha256 tells when another version's cells were put there (dvc checkout).
    files |= {f"../users/{c.user.key}/cell.json": file_digest(c.folder / "cell.json") for c in cells}
    write_json(stamp, {"users": sorted(names), "files": files, "mended": mended})
