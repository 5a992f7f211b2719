"""A training that was cut off goes on from its checkpoint to the same bytes, and never from a stale one."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from oppu.bank import LoraBank
from oppu.checkpoints import Checkpoint, kept, kept_keys
from oppu.rows import plan
from oppu.training import train
from tests.oracle import distance
from tests.tiny_models import settings, some_examples, tiny_llama

COUNTS = [9, 5, 0, 13, 4]
KEYS = [f"key{user}" for user in range(5)]


class Cut(Exception):
    """What a kill is to a training: nothing is done after it."""


def cohort(
    path: Path | None, keys: list[str] = KEYS, cut: int | None = None, dropout: float = 0.3, **changes: object
) -> dict[str, dict[str, Tensor]]:
    """Train the users of these keys together, cut off after so many passes if told to; adapters by key."""
    model, lora = tiny_llama(), settings(dropout=dropout, **({"checkpoint_minutes": 0} | changes))
    users = [int(key[3]) for key in keys]
    everyone = some_examples(1, COUNTS)
    examples = [everyone[user] for user in users]
    plans = [plan(len(own), 2, 4, f"0 LaMP_x user {user}") for user, own in zip(users, examples, strict=True)]
    bank = LoraBank(model, lora, len(users), seed=3)
    seen = 0

    def count(*_: int) -> None:
        nonlocal seen
        seen += 1
        if cut is not None and seen > cut:
            raise Cut

    checkpoint = Checkpoint(path, keys) if path else None
    train(model, bank, examples, plans, lora, Accelerator(cpu=True), count, users, checkpoint=checkpoint)
    if checkpoint:
        checkpoint.delete()
    bank.close()
    return {key: bank.state_dict(row) for row, key in enumerate(keys)}


@pytest.mark.parametrize("tokens", [60, 200])
def test_cut_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, tokens: int) -> None:
    whole, path = cohort(None, tokens_per_batch=tokens), tmp_path / "000.checkpoint"
    before = 0
    for _ in range(3):
        with pytest.raises(Cut):
            cohort(path, cut=1, tokens_per_batch=tokens)
        folder, state = kept(path)[0]
        assert list(path.iterdir()) == [folder], "one checkpoint, the newest"
        assert sum(state["done"].values()) > before, "nothing is done twice for ever"
        before = sum(state["done"].values())
        assert all(file.stat().st_mode & 0o777 == 0o600 for file in folder.iterdir())
    after = cohort(path, tokens_per_batch=tokens)
    assert not path.exists()
    assert all(distance(after[key], whole[key]) == 0 for key in KEYS)


def test_a_resumed_cohort_packs_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of a pass are kept too: what free memory would give may differ the next time."""
    path = tmp_path / "000.checkpoint"
    monkeypatch.setattr("oppu.budget.MOST", {"cpu": 60})
    whole = cohort(None, tokens_per_batch=None)
    with pytest.raises(Cut):
        cohort(path, cut=2, tokens_per_batch=None)
    monkeypatch.setattr("oppu.budget.MOST", {"cpu": 300})
    assert kept(path)[0][1]["tokens"] == 60
    resumed, other = cohort(path, tokens_per_batch=None), cohort(None, tokens_per_batch=None)
    assert all(distance(resumed[key], whole[key]) == 0 for key in KEYS)
    assert max(distance(other[key], whole[key]) for key in KEYS) > 0, "packed otherwise, bits differ"


def test_only_the_keys_of_a_checkpoint_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "000.checkpoint"
    with pytest.raises(Cut):
        cohort(path, cut=1, tokens_per_batch=1000)
    changed = ["key0", "key1 of another history", "key2", "key3", "key4"]
    whole, resumed = cohort(None, changed), cohort(path, changed)
    assert "3 of 5 adapters go on" in caplog.text
    assert all(distance(resumed[key], whole[key]) < 1e-4 for key in changed)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [flip, lambda file: os.truncate(file, 100), Path.unlink], ids=["flipped", "truncated", "gone"]
)
def test_a_damaged_file_costs_its_own_user_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "000.checkpoint"
    with pytest.raises(Cut):
        cohort(path, cut=1, tokens_per_batch=1000)
    damage(kept(path)[0][0] / "key3.safetensors")
    whole, resumed = cohort(None), cohort(path)
    assert "key3.safetensors is missing or not what was written" in caplog.text
    assert "3 of 5 adapters go on" in caplog.text
    assert all(distance(resumed[key], whole[key]) < 1e-4 for key in KEYS)


@pytest.mark.parametrize("text", ["", '{"format": 0, "done": {"key0": 1}}'], ids=["truncated", "old format"])
def test_a_state_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "000.checkpoint"
    with pytest.raises(Cut):
        cohort(path, cut=1, tokens_per_batch=1000)
    assert set(kept_keys(path)) == set(KEYS) - {"key2"}
    (kept(path)[0][0] / "state.json").write_text(text)
    assert kept_keys(path) == {}
    assert distance(cohort(path)["key3"], cohort(None)["key3"]) == 0


def test_a_rank_reads_its_own_and_those_of_ranks_that_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "000.checkpoint"
    with pytest.raises(Cut):
        cohort(path, cut=1, tokens_per_batch=1000)
    (folder,) = path.iterdir()
    shutil.copytree(folder, path / "1-000000007")
    shutil.rmtree(folder)
    model = tiny_llama()
    lora = settings()

    def steps(rank: int, world: int) -> int:
        bank = LoraBank(model, lora, 5, seed=3)
        optimisers = [torch.optim.AdamW([bank.parameter(row)]) for row in range(5)]
        done = Checkpoint(path, KEYS, rank, world).resume(bank, optimisers, None)
        bank.close()
        return sum(done)

    assert steps(1, 2) == steps(0, 1) > 0
    assert steps(0, 2) == 0


def test_a_full_disk_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("oppu.checkpoints.folder_digests", full)
    path = tmp_path / "000.checkpoint"
    assert distance(cohort(path)["key3"], cohort(None)["key3"]) == 0
    assert "no checkpoint was written, training goes on: [Errno 28]" in caplog.text
    assert not list(path.glob("*")) and not list(path.glob(".*"))
