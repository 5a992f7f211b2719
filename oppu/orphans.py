"""Jobs that a killed run left at work: Snakemake's SIGKILL reaches Snakemake alone, and what it started goes on."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

RUN = "OPPU_RUN"
"""The variable in which the Snakefile tells every job the process id of its Snakemake."""


def end(folder: Path) -> int:
    """End the orphans at work in a folder; how many there were. RuntimeError where a run is still at work there.

    Jobs on other machines are not seen: a scheduler's own command ends those.
    """
    runs, orphans = _at_work(folder.resolve())
    if runs:
        raise RuntimeError(f"a run is at work in {folder} (process {runs[0].pid}); wait for it or stop it")
    for process in orphans:
        log.info("process %d outlived its run; ended", process.pid)
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(orphans, timeout=60)
    if alive := [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]:
        raise RuntimeError(f"process {alive[0].pid} cannot be ended")
    return len(orphans)


def _at_work(folder: Path) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """Runs of Snakemake in a folder, and jobs there whose run has ended."""
    runs, orphans = [], []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE or process.cwd() != str(folder):
                continue
            if is_snakemake(process.cmdline()):
                runs.append(process)
            elif (run := process.environ().get(RUN, "")).isdigit() and not _runs(int(run), process.create_time()):
                orphans.append(process)
        except psutil.Error:  # it has ended, or is another person's
            continue
    return runs, orphans


def is_snakemake(arguments: Sequence[str]) -> bool:
    """Whether these are the arguments of a Snakemake."""
    return "snakemake" in [Path(argument).name for argument in arguments[:2]] or arguments[1:3] == ["-m", "snakemake"]


def _runs(pid: int, since: float) -> bool:
    """Whether the process that had this number at that time still runs: numbers come again."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return process.create_time() <= since and process.status() != psutil.STATUS_ZOMBIE
    return False
