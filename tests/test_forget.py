"""`oppu forget`: a person's records and files go, nobody else's change."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from oppu.config import Config, load
from oppu.forget import forget
from oppu.lamp import read
from oppu.records import InputError
from oppu.split import user_key
from oppu.tasks import task
from tests.workflow.project import slice_of_sample


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    slice_of_sample(Path("data/raw"), "LaMP_2N")
    return load({"data": "data/raw", "tasks": ["LaMP_2N"], "augmentations": ["k0"], "split": {"test_users": 4}})


def made(key: str) -> list[Path]:
    """A few of the files that a run leaves of a user, one of them in a setting that the config does not name."""
    names = [
        f"split/histories/{key}.json",
        f"k0/lora/full/users/{key}/cell.json",
        f"k4/lora/full/users/{key}/cell.json",
    ]
    paths = [Path("results/LaMP_2N", name) for name in names] + [Path(f"data/profiles/LaMP_2N/{key}.txt")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    Path("results/LaMP_2N/split/users.json").write_text('{"users": ["u-000000000001"]}')
    for recipe in ("k0/base", "k0/lora/full", "k4/base", "k4/lora/full"):
        Path("results/LaMP_2N", recipe).mkdir(parents=True, exist_ok=True)
        Path("results/LaMP_2N", recipe, "recipe.json").write_text("{}")
    return paths


def test_a_person_goes_and_the_others_stay_as_they_are(config: Config) -> None:
    before = read(Path("data/raw"), task("LaMP_2N"))
    user, other = sorted({q.user_id for q in before if q.source == "dev"})[:2]
    key = user_key(user)
    own, kept = made(key), made(user_key(other))
    unfinished = Path("results/LaMP_2N/k0/lora/full/cohorts/000.checkpoint/0-000000001/some-key.safetensors")
    unfinished.parent.mkdir(parents=True)
    unfinished.write_text("{}")
    found = forget(config, {key})
    after = read(Path("data/raw"), task("LaMP_2N"))
    assert after == [q for q in before if q.user_id != user], "golds are there and fit, or reading them would fail"
    assert found.questions == {"data/raw/LaMP_2N/dev_questions.json": len(before) - len(after)}
    assert not any(path.exists() for path in own) and all(path.exists() for path in kept)
    assert not unfinished.parents[1].exists(), "an adapter under way"
    assert key not in " ".join(str(path) for path in Path().rglob("*"))
    assert found.moved == {"LaMP_2N": 1}, "the fifth user would be tested"
    assert found.left == [Path("results/LaMP_2N/k4/base"), Path("results/LaMP_2N/k4/lora/full")]


def test_compressed_lists_keep_their_form_and_their_records_are_taken_anew(config: Config) -> None:
    folder = Path("data/raw/LaMP_2N")
    golds = json.loads((folder / "dev_outputs.json").read_text())["golds"]
    (folder / "dev_outputs.json").unlink()
    (folder / "dev_outputs.json.gz").write_bytes(gzip.compress(json.dumps(golds).encode()))
    (folder / "sources.json").write_text(json.dumps({n: {"sha256": "0"} for n in ("dev_outputs.json.gz", "other")}))
    user = json.loads((folder / "dev_questions.json").read_text())[0]["user_id"]
    forget(config, {user_key(user)})
    left = json.loads(gzip.decompress((folder / "dev_outputs.json.gz").read_bytes()))
    assert isinstance(left, list) and 0 < len(left) < len(golds)
    assert set(json.loads((folder / "sources.json").read_text())) == {"other"}


def test_strangers_are_refused_and_nothing_is_changed(config: Config) -> None:
    path = Path("data/raw/LaMP_2N/dev_questions.json")
    before = path.read_bytes()
    user = user_key(json.loads(before)[0]["user_id"])
    with pytest.raises(InputError, match="u-000000000000: has no record"):
        forget(config, {user, "u-000000000000"})
    with pytest.raises(InputError, match="is no user key"):
        forget(config, {user, "*"})
    assert path.read_bytes() == before
