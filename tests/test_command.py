"""The lean start of the command reads what the full command line reads, and leaves everything else to it."""

from __future__ import annotations

import os

import pytest
import typer

from oppu import command
from oppu.cli import app


@pytest.mark.parametrize("name", command.LEAN)
def test_the_lean_start_has_the_arguments_of_the_full_command_line(name: str) -> None:
    lean, _ = command.LEAN[name]()
    full = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    ours = {(action.dest, tuple(action.option_strings), action.required) for action in lean._actions}
    theirs = {
        (p.name, tuple(p.opts) if p.param_type_name == "option" else (), p.required)
        for p in full.params
        if p.name != "help"
    }
    assert ours == theirs


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["verify"], ["cells", "--help"], ["cells", "stamp"], ["score-setting", "out", "--surplus", "1"]],
)
def test_what_it_cannot_read_is_left_to_the_full_command_line(arguments: list[str]) -> None:
    assert command.read(arguments) is None


def test_it_reads_what_the_rules_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPPU_GPUS", "0")
    line = (
        "--gpus 3 cells s.json --recipe r --base b --base-users u --users e --profiles p --mended - --processes 2 h1 h2"
    )
    found = command.read(line.split())
    assert found is not None and os.environ["OPPU_GPUS"] == "3"
    values = {name: value for name, value in found[1].items() if name in ("mended", "processes")}
    assert values == {"mended": "-", "processes": 2}
    assert [str(path) for path in found[1]["histories"]] == ["h1", "h2"]
