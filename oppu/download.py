"""Fetching LaMP's time-based files into {folder}/{task}/, whole or not at all, and going on where it was cut.

A file gets its name only after every check. Until then it is `{name}.part`; `{name}.part.json` beside it says of which
version of which URL it is the beginning. `sources.json` records where each file is from, and its sha256.
"""

from __future__ import annotations

import logging
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from oppu.files import file_digest, lock, read_json, write_json
from oppu.lamp_values import kind, load
from oppu.records import InputError

log = logging.getLogger(__name__)

SITE = "https://ciir.cs.umass.edu/downloads/LaMP/time"
PLACES = {f"LaMP_{n}": f"LaMP_{n}" for n in (1, 3, 4, 5, 7)} | {"LaMP_2N": "LaMP_2", "LaMP_2M": "LaMP_2/new"}
"""Where the site keeps a task. LaMP_6 needs e-mails that only their publisher gives out; test files have no golds."""
FILES = [f"{part}_{what}.json" for part in ("train", "dev") for what in ("questions", "outputs")]
SOURCES = "sources.json"
TIMEOUT = (30, 60)
"""Seconds to connect, and between two pieces of an answer."""
WAITS = [1, 2, 4, 8]
"""Seconds before each further try, as long as no try brings a new byte."""
CHUNK = 1 << 16
"""Bytes written at once; of what came since the last write, a cut loses less than this."""


def fetch(data: Path, tasks: list[str], site: str = SITE) -> dict[Path, str]:
    """The four files of each task, and their sha256; what is not there is downloaded.

    A file that is there, gzip or not, is taken as it is: it must match its record in sources.json, or, where it has
    none, parse, and is recorded. Raises InputError with the problems of all files: what is finished stays, and of the
    others what has come. Raises RuntimeError when another process is fetching the same task.
    """
    found: dict[Path, str] = {}
    problems: list[str] = []
    for name in tasks:
        if name not in PLACES:
            problems.append(f"{name}: LaMP has no public time-based files of it; there are {', '.join(PLACES)}")
            continue
        try:
            with lock(data / f".{name}.lock", str(data / name)):
                problems += _fetch_task(data / name, f"{site.rstrip('/')}/{PLACES[name]}", found)
        except InputError as error:
            problems += error.problems
        except OSError as error:
            problems.append(f"{data / name}: cannot be read or written: {error}; mend that and run it again")
    if problems:
        raise InputError(problems)
    return found


def run(data: Path, tasks: list[str], site: str | None, stamp: Path | None = None, mended: str = "-") -> None:
    """`fetch`, and then, for the workflow, a stamp that vouches for the files."""
    found = fetch(data, tasks, site or SITE)
    if stamp is not None:
        names = {os.path.relpath(path, stamp.parent): sha256 for path, sha256 in found.items()}
        write_json(stamp, {"files": names, "mended": mended})


def _fetch_task(folder: Path, site: str, found: dict[Path, str]) -> list[str]:
    """Adds a task's files to `found`; what is wrong with the others."""
    problems: list[str] = []
    folder.mkdir(exist_ok=True)
    records = _records(folder / SOURCES)
    for name in FILES:
        try:
            path, sha256 = _fetch_file(folder / name, f"{site}/{name.split('_')[0]}/{name}", records)
            found[path] = sha256
        except InputError as error:
            problems += error.problems
    return problems


def _fetch_file(path: Path, url: str, records: dict[str, Any]) -> tuple[Path, str]:
    """The file as it lies there, plain or gzip, and its sha256; what is new is added to the records."""
    there = [p for p in (path, path.with_name(f"{path.name}.gz")) if p.exists()]
    if len(there) == 2:
        raise InputError([f"{path}: stands beside {there[1].name}; remove one of them"])
    if not there:
        record = _download(url, path)
        if (old := records.get(path.name)) and old["sha256"] != record["sha256"]:
            log.warning("%s: is not what was fetched on %s; the site has changed it", path, old["date"])
    else:
        path = there[0]
        record = records.get(path.name) or _record(path, None)
        if record["sha256"] != (found := file_digest(path)):
            raise InputError([_changed(path, found, record)])
        if path.name not in records:
            try:
                _check(path, path.name)
            except InputError as error:
                raise InputError([f"{path}: {error}"]) from None
    if records.get(path.name) != record:
        records[path.name] = record
        write_json(path.parent / SOURCES, records, mode=0o644)
    return path, record["sha256"]


def _records(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        records = load(path)
    except InputError as error:
        raise InputError([f"{path}: {error}; or remove it: the files are then taken as they are"]) from None
    if not isinstance(records, dict) or not all(isinstance(r, dict) and "sha256" in r for r in records.values()):
        raise InputError([f"{path}: holds no records of files; remove it: the files are then taken as they are"])
    return records


def _record(path: Path, url: str | None, etag: str | None = None) -> dict[str, Any]:
    """What sources.json says of a file; `url` is None where the file was put there by hand."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"url": url, "sha256": file_digest(path), "size": path.stat().st_size, "etag": etag, "date": date}


def _changed(path: Path, found: str, record: dict[str, Any]) -> str:
    return (
        f"{path}: its sha256 is {found[:12]}…, but {SOURCES} recorded {record['sha256'][:12]}…; remove the file to"
        f" have it fetched anew, or, if the change is meant, its entry in {SOURCES}"
    )


def _check(path: Path, name: str) -> None:
    """InputError unless the file is JSON of the shape that LaMP's questions or outputs have."""
    data = load(path)
    if "outputs" in name and isinstance(data, dict):
        data = data.get("golds")
    if not isinstance(data, list):
        raise InputError([f"holds {kind(data)} where a list is needed; is this LaMP's {name}?"])


def _download(url: str, path: Path) -> dict[str, Any]:
    """Fetch, check, and only then give the file its name; its record."""
    part = _Part(path, url)
    _complete(part, path)
    try:
        _check(part.path, path.name)
    except InputError as error:
        part.drop()
        raise InputError([f"{url}: what it answered is no file of LaMP: {error}; {_by_hand(path)}"]) from None
    with part.path.open("rb") as f:
        os.fsync(f.fileno())
    record = _record(part.path, url, part.note["etag"])
    part.path.replace(path)
    part.drop()
    log.info("%s: %d bytes, sha256 %s", path, record["size"], record["sha256"])
    return record


def _by_hand(path: Path) -> str:
    return f"or fetch it by hand and put it at {path}"


def _complete(part: _Part, path: Path) -> None:
    """Ask until the file is whole; InputError when asking again is no use or has been of none too often."""
    failures, most = 0, part.size
    while not part.whole:
        try:
            _receive(part)
            return
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            failures = 0 if part.size > most else failures + 1
            most = max(most, part.size)
            if failures > len(WAITS):
                kept = f"; {part.size} bytes are kept: the same command goes on from there" if part.size else ""
                raise InputError([f"{part.url}: gave up: {error}{kept}; {_by_hand(path)}"]) from None
            wait = WAITS[max(failures - 1, 0)]
            log.warning("%s: %s; %d bytes are there, again in %s s", part.url, error, part.size, wait)
            time.sleep(wait)
        except requests.RequestException as error:
            raise InputError([f"{part.url}: {error}; check the site, {_by_hand(path)}"]) from None


def _receive(part: _Part) -> None:
    """One request: the rest of the part if the server still has that version, otherwise all of it.

    Raises requests.ConnectionError for what another try may mend, and another RequestException for what it may not.
    """
    with requests.get(part.url, headers=part.headers(), stream=True, timeout=TIMEOUT) as answer:
        status = answer.status_code
        if status >= 500 or status in (408, 429):
            raise requests.ConnectionError(f"HTTP {status} {answer.reason}")
        if status not in (200, 206, 416):
            raise requests.HTTPError(f"HTTP {status} {answer.reason}")
        if status == 200:
            part.begin(answer)
        elif not part.goes_on(answer):
            part.drop()
            raise requests.ConnectionError(f"HTTP {status} instead of the rest; from the beginning")
        log.info("%s: %s of %s bytes are there", part.url, part.size, part.note["size"])
        with part.path.open("ab", buffering=0) as f, part.progress() as bar:
            for chunk in answer.iter_content(CHUNK):
                f.write(chunk)
                bar.update(len(chunk))
    if part.note["size"] is not None and not part.whole:
        raise requests.ConnectionError(f"the answer ended after {part.size} of {part.note['size']} bytes")


class _Part:
    """The beginning of a file, and a note of which version of which URL it is; both outlive the process."""

    def __init__(self, path: Path, url: str) -> None:
        self.url = url
        self.path = path.with_name(f"{path.name}.part")
        self._note = path.with_name(f"{path.name}.part.json")
        self.note: dict[str, Any] = {}
        try:
            note = read_json(self._note)
        except (OSError, ValueError):
            note = {}
        if self.path.exists() and isinstance(note, dict) and note.get("url") == url:
            self.note = note
        else:
            self.drop()

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return self.path.stat().st_size if self.path.exists() else 0

    @property
    def whole(self) -> bool:
        """Whether as many bytes are there as the server announced."""
        return bool(self.note) and self.size == self.note["size"]

    def headers(self) -> dict[str, str]:
        """Asks for the rest, unless the version has changed; uncompressed, so that bytes can be counted."""
        headers = {"Accept-Encoding": "identity"}
        if self.size and self.note.get("validator"):
            headers |= {"Range": f"bytes={self.size}-", "If-Range": self.note["validator"]}
        return headers

    def begin(self, answer: requests.Response) -> None:
        """Start anew with this answer. The note is written before the first byte: no byte without its version."""
        self.drop()
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise requests.exceptions.ContentDecodingError("it sends compressed what was asked for as it is")
        length = answer.headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() else None
        etag = answer.headers.get("ETag")
        self.note = {"url": self.url, "size": size, "etag": etag, "validator": _validator(answer)}
        write_json(self._note, self.note)

    def goes_on(self, answer: requests.Response) -> bool:
        """Whether this answer is the rest of the same version, also where the server does not know If-Range."""
        sent = self.size > 0 and answer.headers.get("Content-Range", "").startswith(f"bytes {self.size}-")
        return answer.status_code == 206 and sent and _validator(answer) in (None, self.note.get("validator"))

    def progress(self) -> tqdm:
        """A bar on a terminal, nothing elsewhere."""
        name = f"{self.path.parent.name}/{self.path.stem}"
        return tqdm(
            desc=name, total=self.note["size"], initial=self.size, unit="B", unit_scale=True, disable=None, leave=False
        )

    def drop(self) -> None:
        """Forget what has come."""
        self.path.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
        self.note = {}


def _validator(answer: requests.Response) -> str | None:
    """What tells versions apart to the byte: a strong ETag, or else the date of the last change."""
    etag = answer.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else answer.headers.get("Last-Modified")
