"""Hands a machine's GPUs out to the jobs that run on it: each sees its own only.

Snakemake counts GPUs (`resources: gpu`) but does not say which one a job has, so jobs take theirs by a lock on a file
per device. The kernel lets go of a lock when the last process that holds it ends, however it ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import re
import time
from contextlib import suppress
from pathlib import Path

from oppu.records import InputError

log = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
LOCKS = Path("/tmp")
"""The same for all runs of a machine, whatever their temporary folder is."""
_held: list[int] = []


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA names them: those of CUDA_VISIBLE_DEVICES, else nvidia-smi's."""
    given = os.environ.get(VISIBLE)
    if given is None:
        return _installed()
    names = [name.strip() for name in given.split(",")]
    stop = next((place for place, name in enumerate(names) if not name or name.startswith("-")), len(names))
    return names[:stop]  # CUDA reads no further than the first that is none


def take(number: int | None = None) -> None:
    """Wait for so many of the visible GPUs and hide the others, until this process and those it starts have ended.

    Call it before CUDA starts. Without a number that of `oppu --gpus` goes; 0 leaves everything as it is, and so does a
    machine without GPUs. Where there are fewer, all are taken. InputError for an OPPU_GPUS that is no number.
    """
    if number is None:
        given = os.environ.get("OPPU_GPUS") or "0"
        if not given.isdecimal():
            raise InputError([f"OPPU_GPUS is {given!r}, which is no number of GPUs; 0 leaves all to be seen"])
        number = int(given)
    there = visible() if number else []
    if not there or _held:
        return
    if number > len(there):
        log.warning("%d GPUs were asked for, and %d are visible: %s", number, len(there), ",".join(there))
        number = len(there)
    unique = dict(zip(there, _identities(there), strict=True))
    waiting = False
    while len(taken := _try(unique, number)) < number:
        if not waiting:
            log.info("waiting for %d of the GPUs %s", number, ",".join(there))
        waiting = True
        time.sleep(random.uniform(0.1, 0.5))
    os.environ[VISIBLE] = ",".join(taken)
    log.info("GPUs of this job: %s", os.environ[VISIBLE])


def held() -> tuple[int, ...]:
    """File descriptors of the locks; processes that use the devices too inherit them (`pass_fds`)."""
    return tuple(_held)


def _try(unique: dict[str, str], number: int) -> list[str]:
    """So many free GPUs, or none: who holds some while it waits for more could wait forever."""
    taken = []
    for name, identity in unique.items():
        lock = os.open(LOCKS / f"oppu-gpu-{os.getuid()}-{identity}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        _held.append(lock)
        taken.append(name)
        if len(taken) == number:
            return taken
    while _held:
        os.close(_held.pop())
    return []


def _identities(names: list[str]) -> list[str]:
    """What tells these devices apart on the whole machine: UUIDs where nvidia-smi knows them, in PCI order."""
    installed = _installed()
    found = []
    for name in names:
        number = int(name) if name.isdigit() else len(installed)
        full = installed[number] if number < len(installed) else name
        # CUDA takes the beginning of a UUID too.
        full = next((uuid for uuid in installed if not full.isdigit() and uuid.startswith(full)), full)
        found.append(re.sub(r"[^A-Za-z0-9-]", "-", full))
    return found


def _installed() -> list[str]:
    """UUIDs of all GPUs as nvidia-smi lists them; of a GPU that is partitioned, those of its parts."""
    import subprocess

    text = ""
    with suppress(OSError, subprocess.CalledProcessError):
        text = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    found: list[list[str]] = []
    for uuid in re.findall(r"\(UUID: ([^)]+)\)", text):
        if uuid.startswith("MIG") and found:
            found[-1].append(uuid)
        else:
            found.append([uuid])
    return [uuid for gpu in found for uuid in (gpu[1:] or gpu)]
