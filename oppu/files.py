"""Files at the edge: digests, atomic writes, private modes, locks."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oppu.records import InputError, User

log = logging.getLogger(__name__)


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical(value: Any) -> str:
    """A value's canonical JSON: sorted keys, no spaces."""
    return "null" if value is None else _ENCODER.encode(value)  # keys have many nulls, which the encoder is slow at


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


def digest_of(parts: dict[str, str]) -> str:
    """`digest` of a dictionary whose values are canonical JSON already: what many share is written out once."""
    text = ",".join(f'"{name}":{parts[name]}' for name in sorted(parts))
    return hashlib.sha256(f"{{{text}}}".encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, by relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): file_digest(p) for p in files}


def _fsync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_bytes(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file whole or not at all: temporary sibling, fsync, rename. Private (0600) unless told otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _fsync_folder(path.parent)


def write_json(path: Path, value: Any, mode: int = 0o600) -> None:
    """Write JSON whole or not at all, with sorted keys, so that equal values are equal bytes."""
    write_bytes(path, (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode(), mode)


def write_if_changed(path: Path, data: bytes) -> bool:
    """Write only when the bytes differ, so that an unchanged file keeps its mtime. Returns whether it wrote."""
    if path.is_file() and path.read_bytes() == data:
        return False
    write_bytes(path, data)
    return True


def jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Records as JSON lines; ValueError where a number is none that JSON has (nan, inf)."""
    lines = (json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    return b"".join(line.encode() for line in lines)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of JSON lines. Only a line feed ends a line: texts may hold what str.splitlines takes for one."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def read_json(path: Path) -> Any:
    """JSON of a file; InputError where it holds none, as after a crash of the machine."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError([f"{path}: is not whole JSON ({error}); delete it and run again"]) from None


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of `path` when the block ends well, and vanishes otherwise.

    Files in it become private (0600) and are synced before the rename. An old folder is moved away first: a crash
    between the two renames leaves no folder, never a half one. What a killed writer left is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in (p for p in temporary.rglob("*") if p.is_file()):
            file.chmod(0o600)
            with file.open("rb") as f:
                os.fsync(f.fileno())
        _fsync_folder(temporary)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.")) / "old"
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old.parent)
        else:
            temporary.rename(path)
        _fsync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}")
"""What `write_bytes` and `new_folder` call what is not whole yet."""


def sweep(*paths: Path) -> None:
    """Delete what killed writers of these files and folders left half-written; for their only writer.

    `folder / "*"` stands for all in a folder: only where nobody else may be writing another of its files.
    """
    asked = set(paths)
    for folder in {path.parent for path in paths}:
        for path in folder.glob(".*"):
            if (found := TEMPORARY.fullmatch(path.name)) and {folder / found[1], folder / "*"} & asked:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def lock(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock; when another process holds it, wait for it, or raise RuntimeError at once.

    The lock goes with the process, however it ends; the file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise RuntimeError(
                f"{what} is being written by another run (lock {path}); wait for it or stop it"
            ) from None
        yield


@contextmanager
def held(folder: Path, users: Sequence[str]) -> Iterator[None]:
    """Hold these users' places in a folder against other runs, waiting for whoever has them.

    Snakemake's lock does not cover folders it does not know. Byte ranges of one file, taken in order, so that two
    runs cannot wait for each other; they go with the process, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as f:
        for place in sorted(int(user[2:], 16) for user in users):
            try:
                fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
            except OSError:
                log.warning("another run holds users of %s; waiting for it", folder)
                fcntl.lockf(f, fcntl.LOCK_EX, 1, place)
        yield


def read_users(path: Path) -> list[str]:
    """The keys of the test users, from users.json."""
    return list(read_json(path)["users"])


def read_user(path: Path) -> User:
    """A test user, without golds, from histories/{key}.json."""
    return User.from_json(read_json(path))


def read_base(path: Path) -> list[User]:
    """The base users, with golds, from base.jsonl."""
    return [User.from_json(json.loads(line)) for line in path.read_bytes().split(b"\n") if line]
