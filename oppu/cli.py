"""The command line: what the workflow's rules call, and what a person asks of a results folder.

Heavy modules are imported inside the commands that need them: `oppu cells` with nothing stale never imports torch.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from oppu.records import InputError

app = typer.Typer(
    help="One PEFT Per User. The workflow (`snakemake --cores all`) calls these commands; each runs by itself too.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

log = logging.getLogger("oppu")

TaskName = Annotated[str, typer.Option("--task", help="name of the task, e.g. LaMP_2N")]
BaseUsers = Annotated[Path, typer.Option("--base-users", help="base users' histories and queries: split/base.jsonl")]
Recipe = Annotated[Path, typer.Option("--recipe", help="recipe.json: every setting that decides the result")]
Mended = Annotated[str, typer.Option("--mended", help="kept in the output for Snakemake; changes nothing")]
Histories = Annotated[list[Path], typer.Argument(help="the users: split/histories/u-….json")]


@app.callback()
def _setup(verbose: Annotated[bool, typer.Option("--verbose", "-v", help="more log lines")] = False) -> None:
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    for name in ("httpx", "filelock", "fsspec", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="folder with LaMP's files: {task}/{train,dev}_questions.json[.gz] …")],
    task: Annotated[list[str], typer.Argument(help="tasks to check")],
) -> None:
    """Read and validate LaMP files; list every problem with file, record, finding and fix."""
    from oppu import lamp
    from oppu.tasks import task as record

    problems: list[str] = []
    for name in task:
        try:
            questions = lamp.read(data, record(name))
            typer.echo(f"{name}: {len(questions)} questions of {len({q.user_id for q in questions})} users")
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)


@app.command()
def split(
    data: Annotated[Path, typer.Argument(help="folder with LaMP's files")],
    task: Annotated[str, typer.Argument(help="name of the task")],
    out: Annotated[Path, typer.Argument(help="users.json; histories/, base.jsonl and queries.parquet stand beside it")],
    settings: Annotated[str, typer.Option(help="the `split` part of the config, as JSON")] = "{}",
    mended: Mended = "-",
) -> None:
    """Decide who is a test user and who trains the base (section 4 of the paper)."""
    from oppu import split as splitting
    from oppu.config import Split

    splitting.run(data, task, Split(**json.loads(settings)), out, mended)


@app.command()
def users(folder: Annotated[Path, typer.Argument(help="results folder of a task, e.g. results/LaMP_2N")]) -> None:
    """List a task's test users: key, LaMP's own id, history items, queries."""
    from oppu.files import read_user, read_users

    for key in read_users(folder / "split" / "users.json"):
        user = read_user(folder / "split" / "histories" / f"{key}.json")
        typer.echo(f"{key}\t{user.id!r}\t{len(user.history)} items\t{len(user.queries)} queries")


@app.command()
def base(
    out: Annotated[Path, typer.Argument(help="base.json; adapter/ and manifest.json stand beside it")],
    recipe: Recipe,
    base_users: BaseUsers,
    mended: Mended = "-",
) -> None:
    """Adapt the model to a task on base users, unless that was done already (section 2.2)."""
    from oppu import base as bases

    bases.run(out, recipe, base_users, mended)


@app.command()
def cells(
    stamp: Annotated[Path, typer.Argument(help="written last, and only if every user succeeded")],
    histories: Histories,
    recipe: Recipe,
    base: Annotated[Path, typer.Option("--base", help="base.json of the setting's base")],
    base_users: BaseUsers,
    mended: Mended = "-",
) -> None:
    """Train and predict those of these users whose cells are not fresh, together (section 3)."""
    from oppu import cells as cohort_of_cells

    cohort_of_cells.run(stamp, recipe, base, histories, base_users, mended)


@app.command()
def score(
    out: Annotated[Path, typer.Argument(help="scores.json; its folder holds the setting's users/")],
    task: TaskName,
    users: Annotated[Path, typer.Option(help="users.json")],
    queries: Annotated[Path, typer.Option(help="queries.parquet: users' queries and golds")],
    scored: Annotated[Path, typer.Option(help="table of every query with its prediction")],
    submission: Annotated[Path, typer.Option(help="predictions in LaMP's own submission format")],
) -> None:
    """Score a setting as LaMP does; refuses missing and damaged cells."""
    from oppu import results

    results.score(out, scored, submission, task, users, queries)


@app.command()
def references(
    out: Annotated[Path, typer.Argument(help="references.json")],
    histories: Histories,
    task: TaskName,
    base_users: BaseUsers,
) -> None:
    """Predict every query without any model: the reference lines."""
    from oppu import results

    results.references(out, task, base_users, histories)


@app.command()
def tables(
    folder: Annotated[Path, typer.Argument(help="results folder")],
    tasks: Annotated[str, typer.Option(help="tasks, with spaces between them")],
    settings: Annotated[str, typer.Option(help="augmentation/peft/history, with spaces between them")],
    bootstrap: Annotated[int, typer.Option(help="resamples of users behind each interval")] = 2000,
    seed: Annotated[int, typer.Option(help="seed of the resampling")] = 0,
) -> None:
    """Write tables/ and figures/ from all scored settings."""
    from oppu import results

    results.tables_of(folder, tasks.split(), settings.split(), bootstrap, seed)


@app.command()
def show(folder: Annotated[Path, typer.Argument(help="results folder")] = Path("results")) -> None:
    """Print the results table."""
    typer.echo((folder / "tables" / "results.txt").read_text(encoding="utf-8"), nl=False)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="results folder")] = Path("results")) -> None:
    """Check every file of every cell against its sha256; name what is damaged."""
    from oppu.cells import verify as check_cells

    count, bad = check_cells(folder)
    for line in bad:
        typer.echo(line)
    typer.echo(f"{count} cells, {len(bad)} damaged")
    if bad:
        typer.echo("`snakemake --cores all -R cells` mends exactly these")
        raise typer.Exit(1)


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="base.json of a base, e.g. results/LaMP_2N/k0/base/base.json")],
    out: Annotated[Path, typer.Argument(help="folder to write the merged model to")],
) -> None:
    """Write a base with its task LoRA merged in, as a model folder that PEFT loads personal adapters onto."""
    from oppu import base as bases

    typer.echo(f"{bases.merge(base, out)} written to {out}")


@app.command()
def fixtures(
    out: Annotated[Path, typer.Argument(help="folder to write {task}/{train,dev}_{questions,outputs}.json to")],
    task: Annotated[list[str], typer.Argument(help="LaMP_1, LaMP_2M, LaMP_3, LaMP_7")],
    seed: Annotated[int, typer.Option(help="seed")] = 0,
) -> None:
    """Write made-up users with known preferences, in LaMP's format."""
    from oppu import fixtures as made_up

    for name in task:
        made_up.write(out, name, seed=seed)


@app.command(name="tiny-lm")
def tiny_lm(
    corpus: Annotated[Path, typer.Argument(help="corpus.jsonl.gz")],
    data: Annotated[Path, typer.Argument(help="folder with the sample in LaMP's format")],
    out: Annotated[Path, typer.Argument(help="model folder to write")],
    steps: Annotated[int | None, typer.Option(help="optimiser steps; default: those of the shipped model")] = None,
    seed: Annotated[int, typer.Option(help="seed")] = 0,
) -> None:
    """Pre-train the tiny Llama that the demo runs on."""
    from oppu.tiny_lm import train_tiny_lm

    train_tiny_lm(corpus, data, out, steps=steps, seed=seed)


@app.command()
def tune(
    out: Annotated[Path, typer.Argument(help="tune.csv")],
    histories: Histories,
    recipe: Recipe,
    base: Annotated[Path, typer.Option("--base", help="base.json of the setting's base")],
    base_users: BaseUsers,
    queries: Annotated[Path, typer.Option(help="queries.parquet")],
    lr: Annotated[str, typer.Option(help="learning rates, with spaces between them")],
    epochs: Annotated[str, typer.Option(help="epochs, with spaces between them")],
) -> None:
    """Score personal learning rates and epochs on held-out base users."""
    from oppu import tune as tuning

    rates, counts = [float(x) for x in lr.split()], [int(x) for x in epochs.split()]
    tuning.run(out, recipe, base, base_users, queries, histories, rates, counts)


@app.command()
def schema(
    readme: Annotated[bool, typer.Option("--readme", help="print config/README.md instead")] = False,
) -> None:
    """Print the JSON schema of the configuration (workflow/schemas/config.schema.json)."""
    from oppu import config

    typer.echo(
        config.describe() if readme else json.dumps(config.schema(), indent=1, ensure_ascii=False) + "\n", nl=False
    )


def main() -> None:
    """Run a command; bad input and failed users end with a message and exit code 1, never with a traceback."""
    try:
        app()
    except (InputError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error) is not RuntimeError:
            raise
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
