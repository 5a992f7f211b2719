"""The bar appears on a terminal, log lines without; a record is there while a stage runs, and gone with its process."""

from __future__ import annotations

import json
import os
import pty
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from oppu import progress
from oppu.progress import Stage, running, text_of
from tests.workflow.project import ROOT

STAGE = """
import logging, pathlib, sys, time
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
from oppu.progress import Stage
with Stage("LaMP_2N/k0/lora/full training", None, 4) as stage:
    for done in range(1, 21):
        time.sleep(0.02)
        if done % 5 == 0:
            stage.user_done()
        stage(done, 20, 1000 * done)
"""


def on_terminal(*command: str, until: bytes = b"") -> str:
    """What a command writes to a terminal; it is ended by SIGINT once it wrote `until`."""
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 120))
    run = subprocess.Popen(command, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    written = b""
    try:
        while chunk := os.read(leader, 65536):
            written += chunk
            if until and until in written and run.poll() is None:
                run.send_signal(2)
                until = b""
    except OSError:  # the last writer has closed the terminal
        pass
    os.close(leader)
    assert run.wait(timeout=30) == 0, written.decode()
    return written.decode()


def test_a_bar_on_a_terminal() -> None:
    text = on_terminal(sys.executable, "-c", STAGE)
    assert "LaMP_2N/k0/lora/full training:" in text and "%|" in text and "\r" in text
    assert "/20" in text and "4/4 users" in text and "tokens/s" in text
    assert "s left" not in text, "no log lines beside the bar"


def test_a_line_in_a_log_and_no_bar() -> None:
    done = subprocess.run([sys.executable, "-c", STAGE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("LaMP_2N/k0/lora/full training: 20 of 20 steps, ") and line.endswith(" tokens/s, 0 s left")


def test_a_record_says_users_speed_and_time_left_while_the_stage_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Stage("LaMP_4/k1/lora/full training", tmp_path, 3) as stage:
        now[0] += 10.0
        stage(100, 400, 5000)
        (record,) = running(tmp_path)
        assert (record["users_done"], record["tokens_per_second"], record["seconds_left"]) == (0, 500, 30.0)
        (path,) = (tmp_path / "progress").iterdir()
        assert path.stat().st_mode & 0o077 == 0
        stage.user_done()
        line = "LaMP_4/k1/lora/full training: 1 of 3 users, 100 of 400 steps, 500 tokens/s, 0:00:30 left"
        assert text_of(running(tmp_path)) == line
        now[0] += 0.5
        stage(200, 400, 9000)
        assert running(tmp_path)[0]["done"] == 100, "once a second is enough"
    assert running(tmp_path) == [] and not list((tmp_path / "progress").iterdir())


def test_a_killed_job_is_not_shown(tmp_path: Path) -> None:
    code = STAGE.replace("None, 4", f"pathlib.Path({str(tmp_path)!r}), 4").replace(
        "stage(done", "time.sleep(99);stage(done"
    )
    code = code.replace("if done % 5 == 0", "if True")
    job = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not running(tmp_path):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    job.kill()
    job.wait()
    assert running(tmp_path) == [] and not list((tmp_path / "progress").iterdir())


def test_records_of_other_machines_count_as_long_as_there_is_news(tmp_path: Path) -> None:
    (tmp_path / "progress").mkdir()
    record = {"host": socket.gethostname() + "-other", "pid": 1, "what": "x"}
    for name, seconds in (("new", 5), ("old", progress.SILENT + 5)):
        (tmp_path / f"progress/{name}.json").write_text(
            json.dumps(record | {"time": time.time() - seconds, "what": name})
        )
    (tmp_path / "progress/cut.json").write_text("{")
    assert [found["what"] for found in running(tmp_path)] == ["new"]


def test_a_full_disk_stops_no_training(tmp_path: Path) -> None:
    (tmp_path / "progress").write_text("a file where the folder should be")
    with Stage("x", tmp_path) as stage:
        stage(1, 2, 3)
        assert running(tmp_path) == []


def test_watch_follows_on_a_terminal_and_prints_once_without(tmp_path: Path) -> None:
    with Stage("LaMP_4/k1/lora/full training", tmp_path, 3) as stage:
        stage(100, 400, 5000)
        command = [sys.executable, "-m", "oppu.cli", "watch", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert (
            done.stdout.startswith("LaMP_4/k1/lora/full training: 0 of 3 users, 100 of 400 steps")
            and "\x1b" not in done.stdout
        )
        assert "0 of 3 users" in on_terminal(*command, until=b"0 of 3 users")
