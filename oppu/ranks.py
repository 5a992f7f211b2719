"""Several processes of one machine share out a cohort's stale users; each works on its own as if there were no others.

Users are independent (section 2.3), so nothing is exchanged while they train: rank 0 tells each other rank its users,
and is told at the end which of them failed, as lines of JSON over a Unix socket. torch.distributed would only add
trouble: this way no rank imports torch before it has a user to train, none waits in a collective that times out while
another one trains, and a rank that dies is noticed because its socket closes.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oppu import devices
from oppu.files import digest
from oppu.records import InputError

if TYPE_CHECKING:  # imported where they are used: a check starts no process
    import socket
    import subprocess

log = logging.getLogger(__name__)

STARTING = 600.0
"""Seconds that ranks wait for each other to start."""
SOCKET_PATH = 104
"""Bytes that a socket's path may have, with the zero at its end (macOS; Linux has 108)."""


def here() -> tuple[int, int]:
    """This process's rank and how many there are, as accelerate launch and torchrun say; a process alone is 0 of 1.

    Raises InputError for ranks on several machines: they could not reach each other.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if int(os.environ.get("LOCAL_WORLD_SIZE", world)) != world:
        raise InputError(["ranks are on several machines; launch one machine's only, and give others other cohorts"])
    return (rank, world) if world > 1 else (0, 1)


def share_out(costs: Mapping[str, float], ranks: int, homes: Mapping[str, int] | None = None) -> list[list[str]]:
    """Users by rank: the costliest first, each to the rank with least to do so far (longest processing time first).

    Those who have a rank already, in `homes`, come before all others and go there.
    """
    shares: list[list[str]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    fixed = {user: rank for user, rank in (homes or {}).items() if rank < ranks}
    for user in sorted(costs, key=lambda u: (u not in fixed, -costs[u], u)):
        least = fixed.get(user, loads.index(min(loads)))
        shares[least].append(user)
        loads[least] += costs[user]
    return shares


def settle(rank: int, world: int) -> None:
    """Make this process a single one to torch and accelerate, with a GPU of its own where there are several."""
    if world == 1:
        return
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    import torch
    from accelerate.utils import parse_flag_from_env

    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        number = rank % torch.cuda.device_count()
        torch.cuda.set_device(number)
        os.environ["ACCELERATE_TORCH_DEVICE"] = f"cuda:{number}"


class Line:
    """JSON values over a socket, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.reader = connection.makefile("rb")

    def send(self, value: Any) -> None:
        """Send one value."""
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self) -> Any:
        """Wait for the next value; None when the other side has ended."""
        try:
            line = self.reader.readline()
        except OSError:
            return None
        return json.loads(line) if line.endswith(b"\n") else None


class Lead:
    """Rank 0: shares users out, and gathers what failed."""

    def __init__(self, server: socket.socket | None, path: Path, name: str, world: int, spawns: bool) -> None:
        self.server, self.path, self.name, self.world, self.spawns = server, path, name, world, spawns
        self.lines: dict[int, Line] = {}
        self.children: dict[int, subprocess.Popen[bytes]] = {}

    def share(self, costs: Mapping[str, float], homes: Mapping[str, int] | None = None) -> list[str]:
        """Tell every other rank its users; returns rank 0's own. Ranks that have none are told so, or never started."""
        shares = share_out(costs, self.world, homes)
        if self.spawns:
            self._spawn([rank for rank, users in enumerate(shares) if rank and users])
        if self.server is not None:
            self._accept(list(self.children) if self.spawns else list(range(1, self.world)))
            self.path.unlink(missing_ok=True)  # all are there: so a kill from now on leaves no file behind
        for rank, line in sorted(self.lines.items()):
            log.info("rank %d of %d: %d users", rank, self.world, len(shares[rank]))
            line.send(shares[rank])
        return shares[0]

    def failures(self) -> dict[str, str]:
        """Wait for the other ranks; why each failed user of theirs failed. Of a rank that died, only that is logged."""
        failed: dict[str, str] = {}
        for rank in sorted(self.lines.keys() | self.children.keys()):
            report = self.lines[rank].receive() if rank in self.lines else None
            if report is None:
                log.error("rank %d of %d ended before its users were done", rank, self.world)
            failed |= report or {}
        return failed

    def _spawn(self, ranks: list[int]) -> None:
        import subprocess

        if not ranks:
            return
        threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1) // (len(ranks) + 1)
        os.environ["OMP_NUM_THREADS"] = str(max(threads, 1))  # rank 0's too: it has not imported torch yet
        world = {"WORLD_SIZE": str(self.world), "LOCAL_WORLD_SIZE": str(self.world), "OPPU_RANKS": self.name}
        command = [sys.executable, *sys.orig_argv[1:]]
        for rank in ranks:
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.children[rank] = subprocess.Popen(command, env=os.environ | world | own, pass_fds=devices.held())

    def _accept(self, ranks: list[int]) -> None:
        """Wait until these ranks are there, or have ended already."""
        assert self.server is not None
        deadline = time.monotonic() + STARTING
        self.server.settimeout(0.5)
        while missing := [rank for rank in ranks if rank not in self.lines]:
            try:
                connection, _ = self.server.accept()
            except TimeoutError:
                if all(rank in self.children and self.children[rank].poll() is not None for rank in missing):
                    return
                if time.monotonic() > deadline:
                    raise RuntimeError(f"ranks {missing} of {self.world} did not start") from None
                continue
            connection.settimeout(None)
            line = Line(connection)
            self.lines[line.receive()] = line


@contextmanager
def leading(stamp: Path, processes: int) -> Iterator[Lead]:
    """What rank 0 shares users out with, for the command that writes `stamp`.

    Without a launcher, rank 0 starts up to `processes` - 1 further ranks itself, and only once there is work for them.
    """
    _, world = here()
    spawns = world == 1 and processes > 1
    if world == 1 and not spawns:
        yield Lead(None, Path(), "", 1, False)
        return
    import socket

    name = f"process {os.getpid()}" if spawns else _name()
    path = _socket(stamp, name)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        path.chmod(0o600)
        server.listen(max(world, processes))
        lead = Lead(server, path, name, max(world, processes) if spawns else world, spawns)
        try:
            yield lead
        finally:
            path.unlink(missing_ok=True)
            for line in lead.lines.values():
                with suppress(OSError):  # it may have ended
                    line.connection.shutdown(socket.SHUT_RDWR)
            for child in lead.children.values():
                child.wait()


def follow(stamp: Path, work: Callable[[list[str]], dict[str, str]]) -> None:
    """Any other rank: do the work on the users that rank 0 gives, and report why those that failed did.

    The process ends with rank 0, which holds the users against other runs.
    """
    rank, _ = here()
    with _connected(_socket(stamp, _name())) as connection:
        line = Line(connection)
        line.send(rank)
        users = line.receive()
        if users is None:
            raise RuntimeError(f"rank 0 ended before it gave rank {rank} any users")
        done = threading.Event()

        def watch() -> None:
            line.receive()  # nothing more is sent: this returns when rank 0 has ended
            if not done.is_set():
                log.error("rank 0 ended, so rank %d does too", rank)
                os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
        failed = work(users) if users else {}
        done.set()
        line.send(failed)


def _name() -> str:
    """What the ranks of one launch have in common, and no other launch at the same time."""
    launch = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return os.environ.get("OPPU_RANKS") or ":".join(launch)


def _socket(stamp: Path, name: str) -> Path:
    """Where rank 0 is reached: in the temporary folder, or in /tmp where that one's path is too long for a socket's."""
    file = f"oppu-{digest([str(stamp.resolve()), name])[:24]}"
    path = Path(tempfile.gettempdir()) / file
    return path if len(os.fsencode(path)) < SOCKET_PATH else Path("/tmp") / file


@contextmanager
def _connected(path: Path) -> Iterator[socket.socket]:
    import socket

    deadline = time.monotonic() + STARTING
    while True:
        with socket.socket(socket.AF_UNIX) as connection:
            try:
                if path.stat().st_uid != os.getuid():
                    raise RuntimeError(f"{path} belongs to another user")
                connection.connect(str(path))
            except OSError:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"rank 0 is not to be found at {path}") from None
                time.sleep(0.05)
                continue
            yield connection
            return
