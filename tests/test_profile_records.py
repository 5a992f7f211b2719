"""Profile records: keyed by content, joined by user, kept when fresh, and a person's own text before the generated."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from oppu import keys
from oppu import recipe as recipes
from oppu.config import load
from oppu.files import read_json, write_json
from oppu.profile_records import run, run_base
from oppu.profiles import base_profiles_of, extractive, profile_of
from oppu.records import InputError, User
from oppu.tasks import task
from tests.profile_models import ROOT, recipe_for, save_model, user

AUGMENTED = {"augmentation": "profile-k1", "task": {"name": "LaMP_2N"}}


class Folder:
    """What the commands read and write, as in results/LaMP_2N."""

    def __init__(self, path: Path, recipe: dict) -> None:
        self.path, self.profiles, self.own = path, path / "profiles", path / "own"
        self.stamp, self.base = self.profiles / "cohorts/000.json", self.profiles / "base.json"
        self.own.mkdir()
        self.use(recipe)

    def use(self, recipe: dict) -> None:
        write_json(self.profiles / "recipe.json", recipe)

    def histories(self, users: list[User]) -> list[Path]:
        for person in users:
            write_json(self.path / f"histories/{person.key}.json", person.as_json(golds=False))
        return [self.path / f"histories/{person.key}.json" for person in users]

    def run(self, users: list[User]) -> None:
        run(self.stamp, self.profiles / "recipe.json", self.histories(users), self.own)

    def run_base(self, users: list[User]) -> None:
        rows = [json.dumps(person.as_json(golds=True)) + "\n" for person in users]
        (self.path / "base.jsonl").write_text("".join(rows))
        run_base(self.base, self.profiles / "recipe.json", self.path / "base.jsonl")

    def record(self, person: User) -> dict:
        return read_json(self.profiles / f"users/{person.key}.json")

    def texts(self, users: list[User]) -> dict[str, str | None]:
        return {person.key: profile_of(AUGMENTED, person, self.profiles) for person in users}

    def mtimes(self, users: list[User]) -> dict[str, int]:
        return {p.key: (self.profiles / f"users/{p.key}.json").stat().st_mtime_ns for p in users}


def counted(**profiles: object) -> dict:
    return recipes.profile_recipe(load({"tasks": ["LaMP_2N"], "profiles": profiles}), "LaMP_2N")


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path, counted())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model")


def some_users(count: int = 5) -> list[User]:
    labels = ["crime", "women", "business", "sports", "travel"]
    people = [user(n) for n in range(count)]
    items = [
        [replace(i, fields=i.fields | {"category": labels[n % 5]}) for i in p.history] for n, p in enumerate(people)
    ]
    return [replace(person, history=tuple(own)) for person, own in zip(people, items, strict=True)]


def test_records_are_joined_by_user_however_the_users_come(folder: Folder) -> None:
    users = some_users()
    shuffled = random.Random(1).sample(users, len(users))
    folder.run(shuffled)
    folder.run_base(shuffled)
    expected = {person.key: extractive(task("LaMP_2N"), person.history) for person in users}
    assert folder.texts(users) == expected
    assert base_profiles_of(AUGMENTED, folder.profiles) == expected
    assert len(set(expected.values())) == 5
    assert (folder.profiles / "base.jsonl").stat().st_mode & 0o077 == 0
    assert [row["user"] for row in map(json.loads, (folder.profiles / "base.jsonl").open())] == sorted(expected)
    assert profile_of(AUGMENTED | {"augmentation": "k1"}, users[0], None) is None
    assert base_profiles_of(AUGMENTED | {"augmentation": "k1"}, None) is None


def test_only_stale_records_are_made(folder: Folder) -> None:
    users = some_users()
    folder.run(users)
    before = folder.mtimes(users)
    folder.run(users)
    assert folder.mtimes(users) == before
    users[2] = replace(users[2], history=users[2].history[1:])
    folder.run(users)
    assert {k for k, t in folder.mtimes(users).items() if t != before[k]} == {users[2].key}
    record = folder.record(users[3])
    write_json(folder.profiles / f"users/{users[3].key}.json", record | {"text": "edited by hand"})
    with pytest.raises(InputError, match=r"changed by hand or cut; .*profiles\.own"):
        folder.texts(users)
    folder.run(users)
    assert folder.record(users[3]) == record


def test_a_missing_or_mixed_up_record_is_refused(folder: Folder) -> None:
    users = some_users()
    folder.run(users)
    first, second = (folder.profiles / f"users/{person.key}.json" for person in users[:2])
    first.write_bytes(second.read_bytes())
    with pytest.raises(InputError, match=f"is of {users[1].key} in LaMP_2N, not of {users[0].key}"):
        folder.texts(users)
    first.unlink()
    with pytest.raises(InputError, match=f"no profile of {users[0].key}"):
        folder.texts(users)
    with pytest.raises(InputError, match="give --profiles"):
        profile_of(AUGMENTED, users[0], None)
    with pytest.raises(InputError, match=r"base\.jsonl: no profiles of base users"):
        base_profiles_of(AUGMENTED, folder.profiles)
    folder.run_base(users)
    path = folder.profiles / "base.jsonl"
    path.write_bytes(path.read_bytes().replace(b"sports", b"sportz"))
    with pytest.raises(InputError, match=r"line 4: the profile was changed .* -R base_profiles"):
        base_profiles_of(AUGMENTED, folder.profiles)


def test_ones_own_text_goes_first_and_the_generated_one_comes_back(folder: Folder) -> None:
    users = some_users()
    folder.run(users)
    generated, before = folder.record(users[1]), folder.mtimes(users)
    own = folder.own / f"{users[1].key}.txt"
    own.write_bytes("\ufeff  “Braces {x}” and\nnew lines.\n".encode())
    folder.run(users)
    record = folder.record(users[1])
    assert (record["source"], record["text"]) == ("own", "“Braces {x}” and\nnew lines.")
    own.write_text("Another text.")
    folder.run(users)
    assert folder.texts(users)[users[1].key] == "Another text."
    own.unlink()
    folder.run(users)
    assert folder.record(users[1]) == generated
    assert {k for k, t in folder.mtimes(users).items() if t != before[k]} == {users[1].key}
    own.write_text("x")
    folder.run(users)
    users[1] = replace(users[1], history=users[1].history[:0])
    own.unlink()
    folder.run(users)
    assert folder.record(users[1])["text"] == "", "a kept record of another history is not brought back"


@pytest.mark.parametrize(("data", "why"), [(b" \n", "is empty"), (b"caf\xe9", "byte 3 is not UTF-8")])
def test_a_bad_own_text_is_refused_by_name_and_the_others_are_kept(folder: Folder, data: bytes, why: str) -> None:
    users = some_users()
    (folder.own / f"{users[0].key}.txt").write_bytes(data)
    with pytest.raises(InputError, match=rf"{users[0].key}\.txt: {why}(.|\n)*1 of 5 users failed"):
        folder.run(users)
    assert not folder.stamp.exists()
    assert set(folder.texts(users[1:])) == {person.key for person in users[1:]}
    (folder.own / f"{users[0].key}.txt").unlink()
    folder.run(users)
    assert read_json(folder.stamp)["users"] == sorted(person.key for person in users)


def test_a_damaged_history_fails_its_user_only(folder: Folder) -> None:
    users = some_users()
    folder.run(users)
    paths = folder.histories(users)
    paths[0].write_text('{"key": "u-')
    with pytest.raises(InputError, match=f"user {users[0].key}: .*is not whole JSON(.|\n)*1 of 5 users failed"):
        run(folder.stamp, folder.profiles / "recipe.json", paths, folder.own)


def test_the_key_follows_what_decides_a_profile_and_nothing_else(model: Path) -> None:
    person, files = user(0), {"model.safetensors": "a"}

    def key(recipe: dict, who: User = person, model: dict | None = files, own: str | None = None) -> str:
        return keys.profile_key(recipe, model, who, own)

    first = recipe_for(model)
    assert key(first) == key(recipe_for(Path("elsewhere"), tokens_per_batch=1, convert=True))
    changes: list[dict] = [{"seed": 1}, {"history_tokens": 61}, {"items": 3}, {"item_words": 3}, {"dtype": "bfloat16"}]
    changes += [{"max_new_tokens": 9}, {"chat_template": "{prompt}"}, {"name": "LaMP_4"}]
    different = [key(recipe_for(model, **change)) for change in changes]
    different += [
        key(counted()),
        key(first, user(1)),
        key(first, model={"model.safetensors": "b"}),
        key(first, own="x"),
    ]
    different.append(key(first, replace(person, history=person.history[1:])))
    assert len({key(first), *different}) == 1 + len(different)


def test_a_base_depends_on_the_texts_of_its_users_profiles(folder: Folder) -> None:
    users = some_users()
    recipe = recipes.base_recipe(load({"tasks": ["LaMP_2N"]}), "LaMP_2N", "profile-k0")

    def key() -> str:
        return keys.base_key(recipe, {}, "users", base_profiles_of(recipe, folder.profiles))

    folder.run_base(users)
    first = key()
    users[0] = replace(users[0], history=users[0].history[1:])
    folder.run_base(users)
    assert key() == first, "another history, the same text"
    users[0] = replace(users[0], history=())
    folder.run_base(users)
    assert key() != first


def test_a_model_writes_the_profiles_of_test_and_base_users(folder: Folder, model: Path) -> None:
    users = [*some_users(), replace(user(9), history=())]
    folder.use(recipe_for(model))
    folder.run(users)
    folder.run_base(users)
    texts = folder.texts(users)
    assert texts == base_profiles_of(AUGMENTED, folder.profiles)
    assert texts[users[-1].key] == "" and all(texts[person.key] for person in users[:-1])
    assert {folder.record(person)["source"] for person in users} == {"llm"}


def test_a_cut_line_is_dropped_and_the_rest_kept(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    users = some_users()
    folder.run_base(users)
    path = folder.profiles / "base.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") * 2 + 20])
    with caplog.at_level("INFO"):
        folder.run_base(users)
    assert "5 base users, 3 profiles to make" in caplog.text
    assert path.read_bytes() == whole
    folder.run_base(users[1:])
    assert path.read_bytes() == whole[whole.index(b"\n") + 1 :], "a user who left takes the profile along"


def test_a_killed_run_keeps_what_it_wrote(
    folder: Folder, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    users = [user(n) for n in range(20)]
    folder.use(recipe_for(model, tokens_per_batch=1, max_new_tokens=60))
    (folder.path / "base.jsonl").write_text("".join(json.dumps(u.as_json(golds=True)) + "\n" for u in users))
    arguments = [str(folder.base), "--recipe", str(folder.profiles / "recipe.json")]
    arguments += ["--base-users", str(folder.path / "base.jsonl")]
    job = subprocess.Popen(
        [sys.executable, "-m", "oppu.cli", "base-profiles", *arguments], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    path, deadline = folder.profiles / "base.jsonl", time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    kept = path.read_bytes().split(b"\n")[:-1]
    assert 3 <= len(kept) < 20 and not folder.base.exists()
    folder.use(recipe_for(model, max_new_tokens=60))
    with caplog.at_level("INFO"):
        folder.run_base(users)
    assert f"20 base users, {20 - len(kept)} profiles to make" in caplog.text
    assert set(kept) <= set(path.read_bytes().split(b"\n")), "what was kept was not made again"
    assert set(base_profiles_of(AUGMENTED, folder.profiles) or {}) == {person.key for person in users}


def test_nothing_stale_imports_no_torch(folder: Folder, model: Path) -> None:
    users = some_users(2)
    folder.use(recipe_for(model))
    folder.run(users)
    folder.run_base(users)
    code = "import sys; from pathlib import Path; from oppu.profile_records import run, run_base; "
    code += "p = Path(sys.argv[1]); r = p / 'profiles/recipe.json'; histories = sorted(p.glob('histories/*')); "
    code += "run(p / 'stamp', r, histories, p / 'own'); run_base(p / 'profiles/base.json', r, p / 'base.jsonl'); "
    code += "print('torch' in sys.modules)"

    def imports_torch() -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder.path)], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert imports_torch() == "False\n"
    (folder.own / f"{users[0].key}.txt").write_text("my own")
    assert imports_torch() == "False\n"
    (folder.own / f"{users[0].key}.txt").unlink()
    assert imports_torch() == "False\n", "the generated text was kept"
    (folder.profiles / f"users/{users[0].key}.json").unlink()
    assert imports_torch() == "True\n"
