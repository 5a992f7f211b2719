"""The commands that the rules call are read with argparse; all else, and the list of all commands, is typer's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from oppu import cli_rules, command
from oppu.cli import app
from oppu.cli_rules import RULES, Rule

CELLS = "cells s.json --recipe r --base b --base-users u --users e --profiles p --mended - --processes 2 h1 h2"


@pytest.fixture
def obeyed(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The values that `oppu cells` was called with."""
    found: list[dict] = []
    rule = Rule("cells", RULES["cells"].arguments, lambda **values: found.append(values))
    monkeypatch.setitem(cli_rules.RULES, "cells", rule)
    monkeypatch.setenv("OPPU_GPUS", "0")
    return found


def test_it_reads_what_the_rules_write(obeyed: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["oppu", "--gpus", "3", *CELLS.split()])
    command.main()
    assert os.environ["OPPU_GPUS"] == "3"
    assert obeyed == [
        {
            "stamp": Path("s.json"),
            "histories": [Path("h1"), Path("h2")],
            **{"recipe": Path("r"), "base": Path("b"), "base_users": Path("u"), "users": Path("e")},
            **{"profiles": Path("p"), "mended": "-", "processes": 2},
        }
    ]


def oppu(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "oppu.command", *arguments], capture_output=True, text=True, check=False
    )


def test_other_options_may_come_before_such_a_command() -> None:
    done = oppu("-v", "--gpus", "2", "score-setting", "out", "--users", "u", "--queries", "-q", "--", "more")
    assert done.returncode == 2 and "error: argument --queries: expected one argument" in done.stderr


@pytest.mark.parametrize("name", RULES)
def test_help_names_every_argument(name: str) -> None:
    done = oppu(name, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert all(argument in done.stdout for argument, _ in RULES[name].arguments)
    assert RULES[name].help.split("\n")[0].split()[0] in done.stdout


def test_all_commands_are_listed() -> None:
    listed = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    assert all(f" {name} " in listed for name in (*RULES, "status", "verify"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["cells", "stamp"], "arguments are required: histories, --recipe, --base, --base-users"),
        (["score-setting", "out", "--surplus", "1"], "arguments are required"),
        (["tables", "r", "--tasks", "t", "--settings", "s", "--significance", "t-test"], "invalid choice: 't-test'"),
        (CELLS.replace("--processes 2", "--processes 0").split(), "argument --processes: 0 is less than 1"),
        (CELLS.replace("--recipe", "--rec").split(), "arguments are required: --recipe"),
        (["no-such-command"], "No such command"),
    ],
)
def test_what_cannot_be_read_is_refused(arguments: list[str], told: str) -> None:
    done = oppu(*arguments)
    assert done.returncode == 2 and told in done.stderr
