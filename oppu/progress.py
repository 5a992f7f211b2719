"""How far a job is: a bar where somebody watches, log lines where nobody does, and a small record for `oppu watch`.

A record is results/progress/{host}-{process}.json, there while a stage runs. It counts users, steps and tokens and
holds nothing of what users wrote. Nothing depends on it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from oppu.files import read_json

log = logging.getLogger(__name__)

FOLDER = "progress"
RECORD, LOG, SILENT = 1.0, 30.0, 600.0
"""Seconds between records, between log lines, and after which a record of another machine counts as left behind."""


class Stage:
    """One stage of a job, e.g. its training. Called with (steps done, steps in all, tokens so far).

    `results` is the results folder; None: no record. `users` is how many users the stage serves, where it is known.
    """

    def __init__(self, what: str, results: Path | None = None, users: int | None = None, unit: str = "steps") -> None:
        self.what, self.users, self.users_done, self.unit = what, users, 0, unit
        self.path = results / FOLDER / f"{socket.gethostname()}-{os.getpid()}.json" if results else None
        self.start = time.monotonic()
        self.logged, self.recorded = self.start, 0.0
        self.last = (0, 0, 0)
        self.bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(desc=what, unit=unit, leave=False, dynamic_ncols=True)

    def __enter__(self) -> Stage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)

    def user_done(self) -> None:
        """One more user is done."""
        self.users_done += 1
        self.record(*self.last)

    def __call__(self, done: int, total: int, tokens: int) -> None:
        """Tell how far the stage is."""
        self.last = (done, total, tokens)
        now = time.monotonic()
        self.record(done, total, tokens, seldom=True)
        if self.bar is not None:
            self.bar.total = total
            users = f"{self.users_done}/{self.users} users, " if self.users else ""
            self.bar.set_postfix_str(f"{users}{self._speed(tokens):,.0f} tokens/s", refresh=False)
            self.bar.update(done - self.bar.n)
        elif now - self.logged >= LOG or done >= total:
            self.logged = now
            speed, left = self._speed(tokens), self._left(done, total)
            shown = f"{left:.0f} s left" if left is not None else "time left unknown"
            log.info("%s: %d of %d %s, %.0f tokens/s, %s", self.what, done, total, self.unit, speed, shown)

    def record(self, done: int, total: int, tokens: int, seldom: bool = False) -> None:
        """Write the record; `seldom`: once a second at most. A full disk is no reason to stop a training."""
        now = time.monotonic()
        if self.path is None or (seldom and now - self.recorded < RECORD):
            return
        self.recorded = now
        values = {
            "what": self.what,
            **{"users": self.users, "users_done": self.users_done, "unit": self.unit, "done": done, "total": total},
            **{"tokens_per_second": round(self._speed(tokens)), "seconds_left": self._left(done, total)},
            **{"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()},
        }
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            new.write_text(json.dumps(values), encoding="utf-8")
            new.chmod(0o600)
            new.replace(self.path)

    def _speed(self, tokens: int) -> float:
        return tokens / max(time.monotonic() - self.start, 1e-9)

    def _left(self, done: int, total: int) -> float | None:
        spent = time.monotonic() - self.start
        return round(spent / done * (total - done), 1) if done else None


def running(results: Path) -> list[dict[str, Any]]:
    """The records of the jobs that run; those that a killed job left on this machine are removed."""
    found = []
    for path in sorted((results / FOLDER).glob("*.json")):
        try:
            record = read_json(path)
            if record["host"] == socket.gethostname() and not _alive(record["pid"]):
                path.unlink(missing_ok=True)
            elif record["host"] == socket.gethostname() or time.time() - record["time"] < SILENT:
                found.append(record)
        except (OSError, ValueError, KeyError, TypeError):  # just removed, or not a record
            continue
    return found


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def text_of(records: list[dict[str, Any]]) -> str:
    """A line per job."""
    lines = []
    for record in records:
        parts = [f"{record['users_done']} of {record['users']} users"] if record["users"] else []
        parts.append(f"{record['done']:,} of {record['total']:,} {record['unit']}")
        parts.append(f"{record['tokens_per_second']:,} tokens/s")
        if record["seconds_left"] is not None:
            minutes, seconds = divmod(round(record["seconds_left"]), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left")
        lines.append(f"{record['what']}: {', '.join(parts)}")
    return "\n".join(lines) or "no job trains or predicts now"


def watch(results: Path, seconds: float = 2.0) -> None:
    """Show the running jobs until interrupted."""
    from rich.live import Live
    from rich.text import Text

    with suppress(KeyboardInterrupt), Live(Text(text_of(running(results))), auto_refresh=False) as live:
        while True:
            time.sleep(seconds)
            live.update(Text(text_of(running(results))), refresh=True)
