"""The command `oppu`: what the workflow calls is read at once (oppu/cli_rules.py), all else goes to oppu/cli.py.

A check that nothing is stale takes a tenth of a second; typer and pydantic would triple that.
"""

from __future__ import annotations

import atexit
import errno
import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from oppu.records import InputError


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


def main() -> None:
    """Run a command."""
    # Little of what is imported is garbage: it is looked for less often, and not once more at the end. A check that
    # nothing is stale takes a seventh less time.
    gc.set_threshold(100_000, 20, 100)
    atexit.register(gc.freeze)
    from oppu.cli_rules import RULES

    arguments = sys.argv[1:]
    if arguments[:1] == ["--gpus"] and arguments[1:2] and arguments[1].isdigit():
        os.environ["OPPU_GPUS"], arguments = arguments[1], arguments[2:]
    if not arguments or arguments[0] not in RULES:
        from oppu.cli import main as full

        return full()
    log_to_stderr()
    with plain_errors():
        RULES[arguments[0]].run(arguments[1:])


if __name__ == "__main__":
    main()
