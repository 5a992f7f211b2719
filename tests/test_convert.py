from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from oppu.base import model_files
from oppu.convert import safetensors_source
from oppu.models import load_model
from oppu.records import InputError
from tests.tiny_models import CONFIGS, tiny_llama


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPPU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pickled(folder: Path, shards: int, name: str = "llama") -> dict[str, torch.Tensor]:
    """A model folder as it was before safetensors; returns its tensors."""
    model = tiny_llama(torch.bfloat16, config=CONFIGS[name])
    folder.mkdir()
    model.config.save_pretrained(folder)
    state = dict(model.state_dict())
    names = sorted(state)
    parts = [names[n::shards] for n in range(shards)]
    files = [
        f"pytorch_model-{n + 1:05}-of-{shards:05}.bin" if shards > 1 else "pytorch_model.bin" for n in range(shards)
    ]
    for file, part in zip(files, parts, strict=True):
        torch.save({n: state[n] for n in part}, folder / file)
    if shards > 1:
        where = {n: file for file, part in zip(files, parts, strict=True) for n in part}
        index = json.dumps({"metadata": {}, "weight_map": where})
        (folder / "pytorch_model.bin.index.json").write_text(index)
    return state


@pytest.mark.parametrize(("shards", "name"), [(1, "llama"), (3, "llama"), (1, "gpt2")])
def test_bin_weights_are_rewritten_once_and_bit_for_bit(tmp_path: Path, cache: Path, shards: int, name: str) -> None:
    """GPT-2's embedding and head are one tensor under two names, which safetensors alone would refuse."""
    state = pickled(tmp_path / "old", shards, name)
    model = load_model(str(tmp_path / "old"), dtype="bfloat16", convert=True)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())
    (copy,) = [p for p in cache.iterdir() if p.is_dir()]
    written = {k: v for file in copy.glob("*.safetensors") for k, v in load_file(file).items()}
    assert written.keys() == state.keys()
    before = {p: p.stat().st_mtime_ns for p in copy.iterdir()}
    load_model(str(tmp_path / "old"), convert=True)
    assert {p: p.stat().st_mtime_ns for p in copy.iterdir()} == before
    assert not list(copy.glob("*.bin*"))


def test_other_bytes_make_another_copy_and_safetensors_none(tmp_path: Path, cache: Path) -> None:
    state = pickled(tmp_path / "old", 1)
    first = safetensors_source(str(tmp_path / "old"))
    torch.save({n: t + 1 for n, t in state.items()}, tmp_path / "old/pytorch_model.bin")
    assert safetensors_source(str(tmp_path / "old")) != first
    tiny_llama().save_pretrained(tmp_path / "new")
    assert safetensors_source(str(tmp_path / "new"), "main") == (str(tmp_path / "new"), "main")
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 2


def test_without_the_flag_the_key_is_named(tmp_path: Path) -> None:
    pickled(tmp_path / "old", 2)
    with pytest.raises(InputError, match=r"model\.convert"):
        load_model(str(tmp_path / "old"))
    with pytest.raises(InputError, match=r"model\.convert: true"):
        model_files(str(tmp_path / "old"), None)
    assert sum(name.endswith(".bin") for name in model_files(str(tmp_path / "old"), None, convert=True)) == 2


class Payload:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.proof),)


def test_a_pickle_that_runs_code_is_refused_and_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    pickled(tmp_path / "old", 1)
    for zipped in (True, False):  # today's format, and the one before torch 1.6
        evil = {"lm_head.weight": Payload(tmp_path / "proof")}
        torch.save(evil, tmp_path / "old/pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(InputError, match="more than tensors"):
            load_model(str(tmp_path / "old"), convert=True)
        assert not (tmp_path / "proof").exists()
        assert not [p for p in cache.iterdir() if p.is_dir()]
    torch.load(tmp_path / "old/pytorch_model.bin", weights_only=False)
    assert (tmp_path / "proof").exists(), "the payload would have run"
    (tmp_path / "old/pytorch_model.bin").unlink()
    with pytest.raises(InputError, match="neither safetensors nor"):
        load_model(str(tmp_path / "old"), convert=True)
