"""The commands that the workflow's rules call; each runs by itself too.

Read with argparse, which starts three times as fast as what a person's commands are read with (oppu/cli.py): a check
that nothing is stale takes a tenth of a second. Heavy modules are imported inside the commands that need them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Argument = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Rule:
    """A command: what it is called, its arguments, as argparse takes them, and the function that gets their values."""

    name: str
    arguments: tuple[Argument, ...]
    function: Callable[..., None]

    @property
    def help(self) -> str:
        """What the function's docstring says."""
        return self.function.__doc__ or ""

    def parser(self) -> argparse.ArgumentParser:
        """What reads the arguments."""
        parser = argparse.ArgumentParser(f"oppu {self.name}", description=self.help, allow_abbrev=False)
        for name, options in self.arguments:
            parser.add_argument(name, **options)
        return parser

    def run(self, arguments: Sequence[str]) -> None:
        """Read a command line and obey it; what cannot be read ends with usage and exit code 2."""
        self.function(**vars(self.parser().parse_args(arguments)))


RULES: dict[str, Rule] = {}


def _argument(name: str, help: str, **options: Any) -> Argument:
    return name, {"help": help, "type": Path, **options}


def _rule(*arguments: Argument) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def keep(function: Callable[..., None]) -> Callable[..., None]:
        name = function.__name__.replace("_", "-")
        RULES[name] = Rule(name, arguments, function)
        return function

    return keep


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


TASK = _argument("--task", "name of the task, e.g. LaMP_2N", type=str, required=True)
BASE_USERS = _argument("--base-users", "base users' histories and queries: split/base.jsonl", required=True)
BASE = _argument("--base", "base.json of the setting's base", required=True)
RECIPE = _argument("--recipe", "recipe.json: every setting that decides the result", required=True)
PROFILE_RECIPE = _argument("--recipe", "results/{task}/profiles/recipe.json; users/ is beside it", required=True)
MENDED = _argument("--mended", "kept in the output for Snakemake; changes nothing", type=str, default="-")
PROFILES = _argument("--profiles", "results/{task}/profiles; needed by profile-k0, profile-k1, …")
HISTORIES = _argument("histories", "the users: split/histories/u-….json", nargs="+")
QUERIES = _argument("--queries", "queries.jsonl: users' queries and golds", required=True)
STAMP = _argument("stamp", "written last, and only if every user succeeded")


@_rule(
    _argument("data", "folder with LaMP's files"),
    _argument("task", "name of the task", type=str),
    _argument("out", "users.json; histories/, base.jsonl and queries.jsonl stand beside it"),
    _argument("--settings", "the `split` part of the config, as JSON", type=str, default="{}"),
    MENDED,
)
def split(data: Path, task: str, out: Path, settings: str, mended: str) -> None:
    """Decide who is a test user and who trains the base (section 4 of the paper)."""
    from oppu import split as splitting
    from oppu.config import Split

    splitting.run(data, task, Split(**json.loads(settings)), out, mended)


@_rule(
    STAMP,
    HISTORIES,
    PROFILE_RECIPE,
    _argument("--own", "folder of profiles that users wrote themselves: {user key}.txt", required=True),
    MENDED,
)
def profiles(stamp: Path, histories: list[Path], recipe: Path, own: Path, mended: str) -> None:
    """Write the profiles of test users that are not fresh, each from that user's own history (App. J).

    A user's profile is users/{user key}.json beside the recipe: user, task, key, source (extractive, llm or own), text.
    To read one, open it. To replace one, do not edit it (an edited record is refused): write your text into
    {own}/{user key}.txt and run again; it goes before the generated one, which comes back when you delete the text.
    """
    from oppu import profile_records

    profile_records.run(stamp, recipe, histories, own, mended)


@_rule(
    _argument("out", "base.json; base.jsonl, one record per base user, stands beside it"),
    PROFILE_RECIPE,
    BASE_USERS,
    MENDED,
)
def base_profiles(out: Path, recipe: Path, base_users: Path, mended: str) -> None:
    """Write the profiles of base users that are not fresh (App. J); what a killed run has written is kept."""
    from oppu import profile_records

    profile_records.run_base(out, recipe, base_users, mended)


@_rule(_argument("out", "base.json; adapter/ and manifest.json stand beside it"), RECIPE, BASE_USERS, MENDED, PROFILES)
def base(out: Path, recipe: Path, base_users: Path, mended: str, profiles: Path | None) -> None:
    """Adapt the model to a task on base users, unless that was done already (section 2.2)."""
    from oppu import base as bases

    bases.run(out, recipe, base_users, mended, profiles)


@_rule(
    STAMP,
    HISTORIES,
    RECIPE,
    BASE,
    BASE_USERS,
    MENDED,
    PROFILES,
    _argument("--users", "users.json: all test users; `swapped` needs them"),
    _argument(
        "--processes", "share the users to train or predict out over so many processes (1)", type=_count, default=1
    ),
)
def cells(
    stamp: Path,
    histories: list[Path],
    recipe: Path,
    base: Path,
    base_users: Path,
    mended: str,
    profiles: Path | None,
    users: Path | None,
    processes: int,
) -> None:
    """Train and predict those of these users whose cells are not fresh, together (section 3).

    Several processes share them out by what they will cost: those of --processes, started only when there is work, or
    those of a launcher, `accelerate launch --multi_gpu --num_processes 2 -m oppu.cli cells …` (--multi_gpu on CPUs
    too, or it starts a single one). Each has a GPU of its own where there are several.
    """
    from oppu import job

    job.run(stamp, recipe, base, histories, base_users, mended, profiles, users, processes)


@_rule(
    _argument("out", "pooled.json; adapter/ and cell.json stand beside it"), HISTORIES, RECIPE, BASE, MENDED, PROFILES
)
def pooled(out: Path, histories: list[Path], recipe: Path, base: Path, mended: str, profiles: Path | None) -> None:
    """Train one adapter on all these users' histories together: a control that mixes users, for benchmarks only."""
    from oppu import pooled as control

    control.run(out, recipe, base, histories, mended, profiles)


@_rule(
    _argument("out", "scores.json; its folder holds the setting's users/"),
    _argument("--users", "users.json", required=True),
    QUERIES,
    _argument("--scored", "scored.jsonl: every query with its prediction and what it counts", required=True),
    _argument("--submission", "predictions in LaMP's own submission format", required=True),
)
def score_setting(out: Path, users: Path, queries: Path, scored: Path, submission: Path) -> None:
    """Score a setting as LaMP does; refuses missing and damaged cells."""
    from oppu import score_job

    score_job.run(out, scored, submission, users, queries)


@_rule(_argument("out", "references.jsonl"), HISTORIES, TASK, BASE_USERS, QUERIES)
def references(out: Path, histories: list[Path], task: str, base_users: Path, queries: Path) -> None:
    """Predict every query without any model, and score it: the reference lines."""
    from oppu import references as answering

    answering.run(out, task, base_users, queries, histories)


@_rule(
    _argument("folder", "results folder"),
    _argument("--tasks", "tasks, with spaces between them", type=str, required=True),
    _argument("--settings", "augmentation/peft/history, with spaces between them", type=str, required=True),
    _argument("--bootstrap", "resamples of users behind each interval (2000)", type=int, default=2000),
    _argument("--seed", "seed of the resampling (0)", type=int, default=0),
    _argument(
        "--significance",
        "the paired test over users behind p and stars (bootstrap)",
        type=str,
        choices=("bootstrap", "permutation"),
        default="bootstrap",
    ),
    _argument("--paper", "the paper's own table1.csv, to stand beside"),
)
def tables(
    folder: Path,
    tasks: str,
    settings: str,
    bootstrap: int,
    seed: int,
    significance: Literal["bootstrap", "permutation"],
    paper: Path | None,
) -> None:
    """Write tables/ and figures/ from all scored settings."""
    from oppu import results
    from oppu.boards import Bootstrap

    how = Bootstrap(bootstrap, seed, significance)
    results.tables_of(folder, tasks.split(), settings.split(), how, paper)


@_rule(
    _argument("out", "statistics.json"),
    HISTORIES,
    TASK,
    BASE_USERS,
    QUERIES,
    _argument("--model", "model whose tokens are counted: hub id or folder", type=str, required=True),
    _argument("--revision", "commit of the model on the hub", type=str),
)
def statistics(
    out: Path, histories: list[Path], task: str, base_users: Path, queries: Path, model: str, revision: str | None
) -> None:
    """Count a task's queries, history items and lengths: its row of Table 5 (appendix B)."""
    from oppu import statistics as counting

    counting.run(out, task, base_users, queries, histories, model, revision)


@_rule(
    _argument("out", "table5.csv; table5.md stands beside it"),
    _argument("statistics", "statistics.json of each task", nargs="+"),
    _argument("--paper", "the paper's own table5.csv, to stand beside"),
)
def table5(out: Path, statistics: list[Path], paper: Path | None) -> None:
    """Write Table 5 from every task's statistics."""
    from oppu.statistics import run_table5
    from oppu.tables import read_csv

    run_table5(out, statistics, read_csv(paper) if paper else None)


@_rule(
    _argument("out", "tune.csv"),
    HISTORIES,
    RECIPE,
    BASE,
    BASE_USERS,
    QUERIES,
    _argument("--lr", "learning rates, with spaces between them", type=str, required=True),
    _argument("--epochs", "epochs, with spaces between them", type=str, required=True),
    PROFILES,
)
def tune(
    out: Path,
    histories: list[Path],
    recipe: Path,
    base: Path,
    base_users: Path,
    queries: Path,
    lr: str,
    epochs: str,
    profiles: Path | None,
) -> None:
    """Score personal learning rates and epochs on held-out base users."""
    from oppu import tune as tuning

    rates, counts = [float(x) for x in lr.split()], [int(x) for x in epochs.split()]
    tuning.run(out, recipe, base, base_users, queries, histories, rates, counts, profiles)
