"""Downloads against a real local server that misbehaves in the ways that servers and networks do."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from oppu import download
from oppu.download import CHUNK
from oppu.records import InputError
from tests.http_server import Site, lamp_site

TASK, NAME, URL = "LaMP_2N", "train_questions.json", "/LaMP_2/train/train_questions.json"


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(download, "WAITS", [0, 0, 0])
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def site():
    with Site(lamp_site(TASK)) as site:
        yield site


def fetch(site: Site, folder: Path) -> dict[Path, str]:
    return download.fetch(folder, [TASK], site.url)


def refused(site: Site, folder: Path) -> list[str]:
    with pytest.raises(InputError) as error:
        fetch(site, folder)
    return error.value.problems


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / TASK).iterdir()}


WHOLE = {*download.FILES, "sources.json"}


def assert_whole(site: Site, folder: Path) -> None:
    """Every file is the site's to the byte, recorded, and nothing else lies there."""
    assert names(folder) == WHOLE
    records = json.loads((folder / TASK / "sources.json").read_text())
    for url, body in site.files.items():
        name = url.rsplit("/")[-1]
        assert (folder / TASK / name).read_bytes() == body
        assert records[name]["sha256"] == hashlib.sha256(body).hexdigest()
        assert (records[name]["url"], records[name]["size"]) == (site.url + url, len(body))


def test_all_files_are_fetched_recorded_and_not_asked_for_again(site, tmp_path):
    found = fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert found == {tmp_path / TASK / n: r["sha256"] for n, r in json.loads(sources(tmp_path)).items()}
    before, site.asked = sources(tmp_path), []
    assert fetch(site, tmp_path) == found
    assert site.asked == [] and sources(tmp_path) == before


def sources(folder: Path) -> str:
    return (folder / TASK / "sources.json").read_text()


def test_each_task_is_asked_for_where_the_site_keeps_it(tmp_path):
    with Site({}) as site:
        with pytest.raises(InputError) as error:
            download.fetch(tmp_path, [*download.PLACES, "LaMP_6"], site.url + "/")
        asked = {url for url, _ in site.asked}
    assert len(asked) == 7 * 4 and len(error.value.problems) == 7 * 4 + 1
    assert {
        "/LaMP_2/new/dev/dev_outputs.json",
        "/LaMP_2/train/train_outputs.json",
        "/LaMP_7/dev/dev_questions.json",
    } < asked
    assert "LaMP_6: LaMP has no public time-based files" in error.value.problems[-1]
    assert download.SITE == "https://ciir.cs.umass.edu/downloads/LaMP/time"


@pytest.mark.parametrize("how", [{}, {"etag": False}, {"etag": "weak"}])
def test_a_cut_connection_goes_on_where_it_was_cut(site, tmp_path, how):
    site.set(**how)
    site.cut(URL, 2 * CHUNK, CHUNK)
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert site.ranges(URL) == [None, f"bytes={2 * CHUNK}-", f"bytes={3 * CHUNK}-"]
    assert site.sent[URL] == len(site.files[URL]), "no byte was sent twice"


def test_without_a_validator_it_starts_again(site, tmp_path):
    site.set(etag=False, modified=False)
    site.cut(URL, 2 * CHUNK)
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert site.ranges(URL) == [None, None]


@pytest.mark.parametrize("how", [{"range": False}, {"etag": "new"}, {"etag": "new", "if_range": False}, {"range": 416}])
def test_it_starts_again_when_the_rest_cannot_be_had(site, tmp_path, how):
    """The server ignores Range; the file has changed; it has, and the server ignores If-Range; the range is refused."""
    old = site.files[URL]
    site.cut(URL, 2 * CHUNK)

    def change():
        site.set(**how)
        if "etag" in how:
            site.files[URL] = old.replace(b"t", b"T")

    site.then(URL, change)
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert site.ranges(URL)[:2] == [None, f"bytes={2 * CHUNK}-"]


def test_a_chunked_answer_without_length_is_cut_too(site, tmp_path):
    site.set(chunked=True)
    site.cut(URL, 2 * CHUNK)
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert site.ranges(URL) == [None, f"bytes={2 * CHUNK}-"]


def test_a_busy_server_is_asked_again(site, tmp_path):
    site.fail(URL, 503, 429, 500)
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert len(site.ranges(URL)) == 4


def test_a_server_that_stays_down_is_given_up(site, tmp_path):
    site.fail(URL, *[503] * 20)
    (problem,) = refused(site, tmp_path)
    assert site.url + URL in problem and "503" in problem and f"put it at {tmp_path / TASK / NAME}" in problem
    assert len(site.ranges(URL)) == 4
    assert names(tmp_path) == WHOLE - {NAME}, "what is finished stays"


def test_tries_that_bring_bytes_are_not_counted(site, tmp_path):
    cuts = len(site.files[URL]) // CHUNK
    site.cut(URL, *[CHUNK] * cuts)
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert len(site.ranges(URL)) == cuts + 1 > len(download.WAITS) + 1


@pytest.mark.parametrize("status", [403, 404])
def test_what_is_not_there_is_refused_at_once_with_all_the_rest(site, tmp_path, status):
    for url in list(site.files)[:2]:
        site.fail(url, *[status] * 9)
    problems = refused(site, tmp_path)
    assert len(problems) == 2 and all(f"HTTP {status}" in p and "by hand and put it at" in p for p in problems)
    assert [p.split(": ")[0] for p in problems] == [site.url + url for url in list(site.files)[:2]]
    assert len(site.asked) == 4, "no second try"


def test_nobody_answers(tmp_path):
    with Site({}) as site:
        url = site.url
    with pytest.raises(InputError, match="refused") as error:
        download.fetch(tmp_path, [TASK], url)
    assert len(error.value.problems) == 4


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (b"<!DOCTYPE html><html>Please log in</html>", "is not JSON"),
        (b'{"error": "please log in"}', "holds missing or null where a list is needed"),
        (b"", "is not JSON"),
    ],
)
def test_what_is_no_file_of_lamp_is_refused_and_not_kept(site, tmp_path, body, found):
    url = "/LaMP_2/dev/dev_outputs.json"
    good, site.files[url] = site.files[url], body
    (problem,) = refused(site, tmp_path)
    assert site.url + url in problem and found in problem
    assert names(tmp_path) == WHOLE - {"dev_outputs.json"}
    site.files[url] = good
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)


def test_a_length_that_is_too_short_is_found(site, tmp_path):
    site.set(length=-1000)
    assert len(refused(site, tmp_path)) == 4
    assert names(tmp_path) == set()


def test_a_length_that_is_too_long_is_found(site, tmp_path):
    site.set(length=1000)
    problems = refused(site, tmp_path)
    assert len(problems) == 4 and all("gave up" in problem for problem in problems)
    assert not names(tmp_path) & WHOLE


def test_what_comes_compressed_unasked_is_refused(site, tmp_path):
    site.set(encoding="gzip")
    assert all("compressed" in problem for problem in refused(site, tmp_path))
    assert not names(tmp_path) & WHOLE


def test_a_kill_leaves_no_file_and_the_next_run_goes_on(site, tmp_path):
    site.stall(URL, 2 * CHUNK)
    command = [sys.executable, "-m", "oppu.cli", "lamp", str(tmp_path), TASK]
    run = subprocess.Popen(command, env=os.environ | {"OPPU_LAMP_SITE": site.url}, stderr=subprocess.PIPE)
    part = tmp_path / TASK / f"{NAME}.part"
    wait_for(lambda: part.exists() and part.stat().st_size == 2 * CHUNK)
    with pytest.raises(RuntimeError, match="another run"):
        fetch(site, tmp_path)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert names(tmp_path) == {f"{NAME}.part", f"{NAME}.part.json"}
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert site.ranges(URL) == [None, f"bytes={2 * CHUNK}-"]


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_interrupt_after_the_last_byte_needs_no_byte_again(site, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download, "_check", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(site, tmp_path)
    assert names(tmp_path) == {f"{NAME}.part", f"{NAME}.part.json"}
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert site.ranges(URL) == [None]


@pytest.mark.parametrize("damage", ["note", "other"])
def test_a_part_whose_version_is_not_known_is_not_used(site, tmp_path, damage):
    (tmp_path / TASK).mkdir()
    (tmp_path / TASK / f"{NAME}.part").write_bytes(b"[" * CHUNK)
    note = {"url": "http://elsewhere/", "size": 9, "etag": None, "validator": '"v1"'}
    (tmp_path / TASK / f"{NAME}.part.json").write_text("{" if damage == "note" else json.dumps(note))
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert site.ranges(URL) == [None]


def put(site: Site, folder: Path, zipped: bool) -> None:
    (folder / TASK).mkdir()
    for url, body in site.files.items():
        name = url.rsplit("/")[-1] + (".gz" if zipped else "")
        (folder / TASK / name).write_bytes(gzip.compress(body) if zipped else body)


@pytest.mark.parametrize("zipped", [False, True])
def test_files_that_are_there_are_taken_as_they_are_and_recorded(site, tmp_path, zipped):
    put(site, tmp_path, zipped)
    before = {path: path.read_bytes() for path in (tmp_path / TASK).iterdir()}
    found = fetch(site, tmp_path)
    assert site.asked == []
    assert found == {path: hashlib.sha256(data).hexdigest() for path, data in before.items()}
    records = json.loads(sources(tmp_path))
    assert {n: (r["url"], r["sha256"]) for n, r in records.items()} == {p.name: (None, h) for p, h in found.items()}


def test_a_file_that_differs_from_its_record_is_refused(site, tmp_path):
    fetch(site, tmp_path)
    path = tmp_path / TASK / NAME
    path.write_bytes(path.read_bytes().replace(b"t", b"T"))
    (problem,) = refused(site, tmp_path)
    assert str(path) in problem and "remove the file" in problem
    path.unlink()
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)


def test_a_file_put_there_that_does_not_parse_is_refused(site, tmp_path):
    put(site, tmp_path, zipped=True)
    path = tmp_path / TASK / f"{NAME}.gz"
    path.write_bytes(path.read_bytes()[:-100])
    (problem,) = refused(site, tmp_path)
    assert str(path) in problem and "cut short or damaged" in problem
    assert path.name not in json.loads(sources(tmp_path))


def test_plain_and_gzip_side_by_side_are_refused(site, tmp_path):
    put(site, tmp_path, zipped=True)
    (tmp_path / TASK / NAME).write_bytes(site.files[URL])
    (problem,) = refused(site, tmp_path)
    assert "stands beside train_questions.json.gz; remove one" in problem


@pytest.mark.parametrize("text", ["{", "[]", '{"train_questions.json": 1}'])
def test_damaged_records_are_refused_with_the_fix(site, tmp_path, text):
    put(site, tmp_path, zipped=False)
    (tmp_path / TASK / "sources.json").write_text(text)
    problems = refused(site, tmp_path)
    assert len(problems) == 1 and "sources.json" in problems[0] and "remove it" in problems[0]


def test_a_new_version_on_the_site_is_told(site, tmp_path, caplog):
    fetch(site, tmp_path)
    (tmp_path / TASK / NAME).unlink()
    site.files[URL] = b"[]"
    fetch(site, tmp_path)
    assert_whole(site, tmp_path)
    assert "the site has changed it" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(site, tmp_path):
    (tmp_path / TASK).write_text("a file stands where the folder should be")
    (problem,) = refused(site, tmp_path)
    assert str(tmp_path / TASK) in problem
