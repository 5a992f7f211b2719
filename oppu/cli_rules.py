"""The commands that the workflow's rules call; each runs by itself too.

Heavy modules are imported inside the commands that need them: `oppu cells` with nothing stale never imports torch.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Annotated, Literal

import typer

rules = typer.Typer()
PANEL = "What the workflow calls"

TaskName = Annotated[str, typer.Option("--task", help="name of the task, e.g. LaMP_2N")]
BaseUsers = Annotated[Path, typer.Option("--base-users", help="base users' histories and queries: split/base.jsonl")]
Base = Annotated[Path, typer.Option("--base", help="base.json of the setting's base")]
Recipe = Annotated[Path, typer.Option("--recipe", help="recipe.json: every setting that decides the result")]
Mended = Annotated[str, typer.Option("--mended", help="kept in the output for Snakemake; changes nothing")]
Profiles = Annotated[
    Path | None, typer.Option("--profiles", help="results/{task}/profiles; needed by profile-k0, profile-k1, …")
]
Histories = Annotated[list[Path], typer.Argument(help="the users: split/histories/u-….json")]


@rules.command(rich_help_panel=PANEL)
def split(
    data: Annotated[Path, typer.Argument(help="folder with LaMP's files")],
    task: Annotated[str, typer.Argument(help="name of the task")],
    out: Annotated[Path, typer.Argument(help="users.json; histories/, base.jsonl and queries.jsonl stand beside it")],
    settings: Annotated[str, typer.Option(help="the `split` part of the config, as JSON")] = "{}",
    mended: Mended = "-",
) -> None:
    """Decide who is a test user and who trains the base (section 4 of the paper)."""
    from oppu import split as splitting
    from oppu.config import Split

    splitting.run(data, task, Split(**json.loads(settings)), out, mended)


@rules.command(rich_help_panel=PANEL)
def profiles(
    stamp: Annotated[Path, typer.Argument(help="written last, and only if every user succeeded")],
    histories: Histories,
    recipe: Annotated[Path, typer.Option("--recipe", help="results/{task}/profiles/recipe.json; users/ is beside it")],
    own: Annotated[Path, typer.Option("--own", help="folder of profiles that users wrote themselves: {user key}.txt")],
    mended: Mended = "-",
) -> None:
    """Write the profiles of test users that are not fresh, each from that user's own history (App. J).

    A user's profile is users/{user key}.json beside the recipe: user, task, key, source (extractive, llm or own), text.
    To read one, open it. To replace one, do not edit it (an edited record is refused): write your text into
    {own}/{user key}.txt and run again; it goes before the generated one, which comes back when you delete the text.
    """
    from oppu import profile_records

    profile_records.run(stamp, recipe, histories, own, mended)


@rules.command(rich_help_panel=PANEL, name="base-profiles")
def base_profiles(
    out: Annotated[Path, typer.Argument(help="base.json; base.jsonl, one record per base user, stands beside it")],
    recipe: Annotated[Path, typer.Option("--recipe", help="results/{task}/profiles/recipe.json")],
    base_users: BaseUsers,
    mended: Mended = "-",
) -> None:
    """Write the profiles of base users that are not fresh (App. J); what a killed run has written is kept."""
    from oppu import profile_records

    profile_records.run_base(out, recipe, base_users, mended)


@rules.command(rich_help_panel=PANEL)
def base(
    out: Annotated[Path, typer.Argument(help="base.json; adapter/ and manifest.json stand beside it")],
    recipe: Recipe,
    base_users: BaseUsers,
    mended: Mended = "-",
    profiles: Profiles = None,
) -> None:
    """Adapt the model to a task on base users, unless that was done already (section 2.2)."""
    from oppu import base as bases

    bases.run(out, recipe, base_users, mended, profiles)


@rules.command(rich_help_panel=PANEL)
def cells(
    stamp: Annotated[Path, typer.Argument(help="written last, and only if every user succeeded")],
    histories: Histories,
    recipe: Recipe,
    base: Base,
    base_users: BaseUsers,
    mended: Mended = "-",
    profiles: Profiles = None,
    users: Annotated[Path | None, typer.Option(help="users.json: all test users; `swapped` needs them")] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="share the users to train or predict out over so many processes")
    ] = 1,
) -> None:
    """Train and predict those of these users whose cells are not fresh, together (section 3).

    Several processes share them out by what they will cost: those of --processes, started only when there is work, or
    those of a launcher, `accelerate launch --multi_gpu --num_processes 2 -m oppu.cli cells …` (--multi_gpu on CPUs
    too, or it starts a single one). Each has a GPU of its own where there are several.
    """
    from oppu import job

    job.run(stamp, recipe, base, histories, base_users, mended, profiles, users, processes)


@rules.command(rich_help_panel=PANEL)
def pooled(
    out: Annotated[Path, typer.Argument(help="pooled.json; adapter/ and cell.json stand beside it")],
    histories: Histories,
    recipe: Recipe,
    base: Base,
    mended: Mended = "-",
    profiles: Profiles = None,
) -> None:
    """Train one adapter on all these users' histories together: a control that mixes users, for benchmarks only."""
    from oppu import pooled as control

    control.run(out, recipe, base, histories, mended, profiles)


@rules.command(rich_help_panel=PANEL, name="score-setting")
def score_setting(
    out: Annotated[Path, typer.Argument(help="scores.json; its folder holds the setting's users/")],
    users: Annotated[Path, typer.Option(help="users.json")],
    queries: Annotated[Path, typer.Option(help="queries.jsonl: users' queries and golds")],
    scored: Annotated[Path, typer.Option(help="scored.jsonl: every query with its prediction and what it counts")],
    submission: Annotated[Path, typer.Option(help="predictions in LaMP's own submission format")],
) -> None:
    """Score a setting as LaMP does; refuses missing and damaged cells."""
    from oppu import score_job

    score_job.run(out, scored, submission, users, queries)


@rules.command(rich_help_panel=PANEL)
def references(
    out: Annotated[Path, typer.Argument(help="references.jsonl")],
    histories: Histories,
    task: TaskName,
    base_users: BaseUsers,
    queries: Annotated[Path, typer.Option(help="queries.jsonl: users' queries and golds")],
) -> None:
    """Predict every query without any model, and score it: the reference lines."""
    from oppu import references as answering

    answering.run(out, task, base_users, queries, histories)


@rules.command(rich_help_panel=PANEL)
def tables(
    folder: Annotated[Path, typer.Argument(help="results folder")],
    tasks: Annotated[str, typer.Option(help="tasks, with spaces between them")],
    settings: Annotated[str, typer.Option(help="augmentation/peft/history, with spaces between them")],
    bootstrap: Annotated[int, typer.Option(help="resamples of users behind each interval")] = 2000,
    seed: Annotated[int, typer.Option(help="seed of the resampling")] = 0,
    significance: Annotated[
        Literal["bootstrap", "permutation"], typer.Option(help="the paired test over users behind p and stars")
    ] = "bootstrap",
    paper: Annotated[Path | None, typer.Option(help="the paper's own table1.csv, to stand beside")] = None,
) -> None:
    """Write tables/ and figures/ from all scored settings."""
    gc.disable()  # to import matplotlib takes a tenth longer with it
    from oppu import results
    from oppu.boards import Bootstrap

    how = Bootstrap(bootstrap, seed, significance)
    results.tables_of(folder, tasks.split(), settings.split(), how, paper)


@rules.command(rich_help_panel=PANEL)
def statistics(
    out: Annotated[Path, typer.Argument(help="statistics.json")],
    histories: Histories,
    task: TaskName,
    base_users: BaseUsers,
    queries: Annotated[Path, typer.Option(help="queries.jsonl")],
    model: Annotated[str, typer.Option(help="model whose tokens are counted: hub id or folder")],
    revision: Annotated[str | None, typer.Option(help="commit of the model on the hub")] = None,
) -> None:
    """Count a task's queries, history items and lengths: its row of Table 5 (appendix B)."""
    from oppu import statistics as counting

    counting.run(out, task, base_users, queries, histories, model, revision)


@rules.command(rich_help_panel=PANEL)
def table5(
    out: Annotated[Path, typer.Argument(help="table5.csv; table5.md stands beside it")],
    statistics: Annotated[list[Path], typer.Argument(help="statistics.json of each task")],
    paper: Annotated[Path | None, typer.Option(help="the paper's own table5.csv, to stand beside")] = None,
) -> None:
    """Write Table 5 from every task's statistics."""
    from oppu.statistics import run_table5
    from oppu.tables import read_csv

    run_table5(out, statistics, read_csv(paper) if paper else None)


@rules.command(rich_help_panel=PANEL)
def tune(
    out: Annotated[Path, typer.Argument(help="tune.csv")],
    histories: Histories,
    recipe: Recipe,
    base: Base,
    base_users: BaseUsers,
    queries: Annotated[Path, typer.Option(help="queries.jsonl")],
    lr: Annotated[str, typer.Option(help="learning rates, with spaces between them")],
    epochs: Annotated[str, typer.Option(help="epochs, with spaces between them")],
    profiles: Profiles = None,
) -> None:
    """Score personal learning rates and epochs on held-out base users."""
    from oppu import tune as tuning

    rates, counts = [float(x) for x in lr.split()], [int(x) for x in epochs.split()]
    tuning.run(out, recipe, base, base_users, queries, histories, rates, counts, profiles)
