"""The command line: what a person asks; what the workflow's rules call stands in cli_rules.py. It begins in command.py.

Heavy modules are imported inside the commands that need them: `oppu cells` with nothing stale never imports torch.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from oppu.cli_rules import RULES, Rule
from oppu.command import log_to_stderr, plain_errors
from oppu.records import InputError

app = typer.Typer(
    help="One PEFT Per User. The workflow (`snakemake --cores all`) calls these commands; each runs by itself too.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

log = logging.getLogger("oppu")

TaskName = Annotated[str, typer.Option("--task", help="name of the task, e.g. LaMP_2N")]
ConfigFiles = Annotated[
    list[Path] | None, typer.Option("--config", "--configfile", help="config file; default: config/config.yaml")
]
MoreFiles = Annotated[list[Path] | None, typer.Argument(help="further config files, laid over it as Snakemake does")]


def _configs(config: list[Path] | None, more: list[Path] | None) -> list[Path]:
    return [*(config or ([] if more else [Path("config/config.yaml")])), *(more or [])]


@app.callback()
def _setup(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="more log lines")] = False,
    gpus: Annotated[
        int, typer.Option(min=0, envvar="OPPU_GPUS", help="take so many free GPUs and hide the others; 0: see all")
    ] = 0,
) -> None:
    os.environ["OPPU_GPUS"] = str(gpus)
    log_to_stderr(logging.DEBUG if verbose else logging.INFO)


@app.command()
def check(
    folder: Annotated[
        list[Path], typer.Argument(help="folders of tasks, e.g. data/raw/LaMP_2N: {train,dev}_questions.json[.gz] …")
    ],
) -> None:
    """Read and validate LaMP files; list every problem with file, record, finding and fix."""
    from oppu import lamp
    from oppu.tasks import task as record

    problems: list[str] = []
    for path in folder:
        name = path.name
        try:
            questions = lamp.read(path.parent, record(name))
            typer.echo(f"{name}: {len(questions)} questions of {len({q.user_id for q in questions})} users")
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)


@app.command()
def lamp(
    data: Annotated[Path, typer.Argument(help="folder for LaMP's files: {task}/{train,dev}_questions.json …")],
    task: Annotated[list[str], typer.Argument(help="tasks to fetch, e.g. LaMP_2N")],
    site: Annotated[
        str | None, typer.Option(envvar="OPPU_LAMP_SITE", help="where the files are; default: LaMP's own site")
    ] = None,
    stamp: Annotated[Path | None, typer.Option(help="written last, and only if every file is there")] = None,
    mended: Annotated[str, typer.Option(help="kept in the stamp for Snakemake; changes nothing")] = "-",
) -> None:
    """Download LaMP's time-based files, or check those that are there; goes on where it was cut."""
    from oppu import download

    download.run(data, task, site, stamp, mended)


@app.command()
def users(folder: Annotated[Path, typer.Argument(help="results folder of a task, e.g. results/LaMP_2N")]) -> None:
    """List a task's test users: key, LaMP's own id, history items, queries."""
    from oppu.files import read_user, read_users

    for key in read_users(folder / "split" / "users.json"):
        user = read_user(folder / "split" / "histories" / f"{key}.json")
        typer.echo(f"{key}\t{user.id!r}\t{len(user.history)} items\t{len(user.queries)} queries")


@app.command()
def score(
    predictions: Annotated[Path, typer.Argument(exists=True, help="LaMP's submission format, a list, or JSON lines")],
    outputs: Annotated[Path, typer.Argument(exists=True, help="golds: LaMP's …_outputs.json[.gz], or queries.jsonl")],
    task: TaskName,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Score any predictions against any golds as LaMP does; refuses missing, surplus and doubled ids."""
    from oppu.submissions import score_files
    from oppu.tasks import task as record

    metrics = score_files(predictions, outputs, record(task))
    lines = [f"{name}\t{round(value, 6)}" for name, value in metrics.items()]
    typer.echo(json.dumps(metrics) if as_json else "\n".join(lines))


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


@app.command(name="end-orphans")
def end_orphans(folder: Annotated[Path, typer.Argument(help="where the workflow ran")] = Path()) -> None:
    """End jobs that outlived a killed run in this folder (`make resume` begins with it); refused while a run is on."""
    from oppu import orphans

    orphans.end(folder)


@app.command()
def gc(
    folder: Annotated[Path | None, typer.Argument(help="results folder; default: the config's, or results")] = None,
    config: Annotated[
        list[Path] | None,
        typer.Option("--config", "--configfile", help="also settings and bases that these config files do not name"),
    ] = None,
    delete: Annotated[bool, typer.Option("--delete", help="delete what is listed; otherwise nothing is")] = False,
) -> None:
    """List what users who are no longer tested have left behind, cells above all; delete it only on request.

    Settings that are no longer in the config are kept, and their cells are fresh when they come back; --config lists
    them too.
    """
    from oppu import garbage
    from oppu.config_files import read_config

    settings = read_config(config) if config else None
    folder = folder or Path(settings.results if settings else "results")
    found = garbage.of_removed_users(folder)
    if settings:
        others = garbage.of_other_settings(folder, settings)
        found = [path for path in found if not any(path.is_relative_to(other) for other in others)] + others
    sizes = [garbage.size(path) for path in found]
    for path, size in zip(found, sizes, strict=True):
        typer.echo(f"{path}\t{size} bytes")
    if delete:
        garbage.delete(folder, found)
    fate = "deleted" if delete else "--delete deletes them"
    typer.echo(f"{len(found)} files and folders, {sum(sizes)} bytes" + (f"; {fate}" if found else ""))


@app.command()
def forget(
    user: Annotated[list[str], typer.Argument(help="keys of the people to take out: u-…, see `oppu users`")],
    config: ConfigFiles = None,
) -> None:
    """Take people out of the data and the results: their records in LaMP's files, and every file named after them.

    What others were made from together with them, a base or a table, is made anew by the next `snakemake --cores all`.
    Git and DVC keep older versions: docs/dvc.md says how to take a person out there.
    """
    from oppu.config_files import read_config
    from oppu.forget import forget as forget_users

    found = forget_users(read_config(_configs(config, None)), set(user))
    for file, count in found.questions.items():
        typer.echo(f"{file}: {count} questions taken out")
    for path in found.paths:
        typer.echo(f"{path}: deleted")
    for task, count in found.moved.items():
        typer.echo(f"{task}: lower split.test_users by {count}, or {count} others move up and everything is made anew")
    for path in found.left:
        typer.echo(f"{path}: the config does not name it, so it is not made anew; delete it if it may know them")


@app.command()
def status(
    config: ConfigFiles = None,
    more: MoreFiles = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Count the fresh, stale, failed and missing cells of a configuration, by task and setting; nothing runs.

    By keys and by whether the files are there; their bytes are not read (`oppu verify` does). Changed raw data count
    once `split` has read them.
    """
    import gc as garbage

    from oppu import status as states
    from oppu.config_files import read_config

    garbage.disable()  # thousands of records, all of them kept: looking for garbage among them takes time
    found = states.status(read_config(_configs(config, more)))
    typer.echo(json.dumps(states.as_json(found), indent=1) if as_json else states.text_of(found))


@app.command()
def watch(folder: Annotated[Path, typer.Argument(help="results folder")] = Path("results")) -> None:
    """Show what the jobs that run have done: users, steps, tokens per second, time left. Ctrl-C ends it.

    Without a terminal it is printed once.
    """
    from oppu import progress

    if sys.stdout.isatty():
        progress.watch(folder)
    else:
        typer.echo(progress.text_of(progress.running(folder)))


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
def plan(
    config: ConfigFiles = None,
    more: MoreFiles = None,
    gpu: Annotated[str, typer.Option(help="the GPU to give hours for; --list-gpus names them")] = "H100",
    utilisation: Annotated[float, typer.Option(help="share of the GPU's peak that is reached")] = 0.4,
    examples: Annotated[
        int, typer.Option(min=1, help="examples of a step to count; the rest is taken to be alike")
    ] = 200,
    list_gpus: Annotated[bool, typer.Option("--list-gpus", help="print the GPUs and their figures")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print every step and setting as JSON")] = False,
) -> None:
    """Say what a configuration will cost before anything runs: jobs, tokens, FLOPs, GPU hours, disk and memory."""
    from oppu import plan as planning
    from oppu.config_files import read_config
    from oppu.plan_text import text_of
    from oppu.shape import known

    if list_gpus:
        for name, values in known()["gpus"].items():
            typer.echo(f"{name:10}" + ", ".join(f"{key} {value:g}" for key, value in values.items()))
        typer.echo("half, single: dense TFLOP/s in 16 and 32 bits; bandwidth: GB/s; memory: GB")
        return
    settings = read_config(_configs(config, more))
    found = planning.make_plan(settings, planning.gpu_named(gpu, utilisation, settings.model.dtype), examples)
    typer.echo(json.dumps(found.as_json(), indent=1) if as_json else text_of(found).rstrip())


@app.command()
def schema(
    readme: Annotated[bool, typer.Option("--readme", help="print config/README.md instead")] = False,
) -> None:
    """Print the JSON schema of the configuration (workflow/schemas/config.schema.json)."""
    from oppu import config
    from oppu.config_page import describe

    typer.echo(describe() if readme else json.dumps(config.schema(), indent=1, ensure_ascii=False) + "\n", nl=False)


def _add(rule: Rule) -> None:
    """List a command that the workflow calls; it reads its arguments itself, `--help` too."""

    @app.command(
        rule.name,
        help=rule.help,
        rich_help_panel="What the workflow calls",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    def _(arguments: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        rule.run(arguments or [])


for _rule in RULES.values():
    _add(_rule)


def main() -> None:
    """Run a command."""
    with plain_errors():
        app()


if __name__ == "__main__":
    main()
