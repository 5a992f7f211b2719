"""The command `oppu`: what the workflow calls for every cohort and setting starts lean, all else goes to oppu/cli.py.

A check that nothing is stale takes a tenth of a second; typer, pydantic and the tables would triple that.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from oppu.records import InputError


class Lean(argparse.ArgumentParser):
    """The same arguments as in oppu/cli_rules.py; what it cannot read (--help too) is left to that one."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Refuse quietly."""
        raise ValueError(message)


def cells() -> tuple[Lean, Callable[..., None]]:
    """Arguments and function of `oppu cells`."""
    from oppu.job import run

    lean = Lean()
    lean.add_argument("stamp", type=Path)
    lean.add_argument("histories", type=Path, nargs="+")
    for name in ("--recipe", "--base", "--base-users"):
        lean.add_argument(name, type=Path, required=True)
    for name in ("--profiles", "--users"):
        lean.add_argument(name, type=Path)
    lean.add_argument("--mended", default="-")
    lean.add_argument("--processes", type=int, default=1, choices=range(1, 1025))
    return lean, run


def score_setting() -> tuple[Lean, Callable[..., None]]:
    """Arguments and function of `oppu score-setting`."""
    from oppu.score_job import run

    lean = Lean()
    lean.add_argument("out", type=Path)
    for name in ("--users", "--queries", "--scored", "--submission"):
        lean.add_argument(name, type=Path, required=True)
    return lean, run


LEAN: dict[str, Callable[[], tuple[Lean, Callable[..., None]]]] = {"cells": cells, "score-setting": score_setting}


def log_to_stderr(level: int = logging.INFO) -> None:
    """Log lines with time and level."""
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    for name in ("httpx", "filelock", "fsspec", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Bad input and failed users end with a message and exit code 1, never with a traceback."""
    try:
        yield
    except (InputError, RuntimeError, OSError, MemoryError) as error:
        if (told := _told(error)) is None:
            raise
        sys.stderr.write(f"error: {told}\n")
        raise SystemExit(1) from None


def _told(error: Exception) -> str | None:
    """What to say of an error whose cause is known; None: a traceback says more."""
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return f"{error}: make room and run again; what is finished is kept" if full else None
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory: {error}; run again with fewer jobs at once; what is finished is kept"
    return str(error) if isinstance(error, InputError) or type(error) is RuntimeError else None


def read(arguments: list[str]) -> tuple[Callable[..., None], dict[str, Any]] | None:
    """The function and its values that a lean command line names; None where it is for oppu/cli.py."""
    if arguments[:1] == ["--gpus"] and arguments[1:2] and arguments[1].isdigit():
        os.environ["OPPU_GPUS"], arguments = arguments[1], arguments[2:]
    if not arguments or arguments[0] not in LEAN:
        return None
    lean, function = LEAN[arguments[0]]()
    try:
        return function, vars(lean.parse_args(arguments[1:]))
    except ValueError:
        return None


def main() -> None:
    """Run a command."""
    found = read(sys.argv[1:])
    if found is None:
        from oppu.cli import main as full

        return full()
    function, values = found
    log_to_stderr()
    with plain_errors():
        function(**values)


if __name__ == "__main__":
    main()
