"""Choose personal hyperparameters on base users held out for it (`split.heldout_queries`), never on test users."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from oppu import devices
from oppu.cells import pool_of
from oppu.files import read_json, read_jsonl, read_user, sweep, write_bytes
from oppu.metrics import METRICS
from oppu.profiles import profile_of
from oppu.scores import score
from oppu.tasks import tasks

log = logging.getLogger(__name__)


def run(
    out: Path,
    recipe: Path,
    base: Path,
    base_users: Path,
    queries: Path,
    histories: Sequence[Path],
    lrs: Sequence[float],
    epochs: Sequence[int],
    profiles: Path | None = None,
) -> None:
    """Train the users anew at every point of the grid and score them; one row per point and metric.

    `profiles` is the task's folder of profiles, read where the augmentation carries one.
    The row with no epochs is the base alone. Nothing but the table is kept.
    """
    values, manifest = read_json(recipe), read_json(base)
    task = tasks()[values["task"]["name"]]
    users = [read_user(path) for path in histories]
    people = [(user, profile_of(values, user, profiles), Counter[str]()) for user in users]
    golds, pool = read_jsonl(queries), pool_of(base_users, values)
    rows: list[dict[str, Any]] = []
    devices.take()
    for lr, count in [(0.0, 0), *itertools.product(lrs, epochs)]:
        from oppu.cohort import Cohort

        point = values | {"training": values["training"] | {"lr": lr or 1.0, "epochs": count or 1}}
        cohort = Cohort(point, manifest, base.parent, pool, people)
        failed = cohort.train([user.key for user in users], lambda key: None) if count else {}
        predictions: dict[str, list[dict[str, Any]]] = {}
        more = cohort.predict([user.key for user in users], predictions.__setitem__)
        if failed | more:
            log.warning("lr %g, %d epochs: %d users failed, so this point is left out", lr, count, len(failed | more))
            continue
        metrics = score(task, golds, predictions).metrics
        log.info("lr %g, %d epochs: %s", lr, count, metrics)
        rows += [
            {"task": task.name, "augmentation": values["augmentation"], "lr": lr, "epochs": count}
            | {"metric": name, "value": metrics[name], "rank": point["training"].get("rank"), "peft": values["peft"]}
            for name in METRICS[task.kind]
        ]
    sweep(out)
    write_bytes(out, pl.DataFrame(rows).write_csv().encode(), mode=0o644)
