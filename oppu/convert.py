"""Weights that exist only as pickled .bin files: read once, safely, and written as safetensors into a cache folder."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from oppu.files import digest, file_digest, lock, new_folder
from oppu.hub import refusal, token
from oppu.records import InputError

log = logging.getLogger(__name__)

BESIDE = ("*.json", "*.model", "*.txt", "*.jinja")
"""What lies beside the weights: configuration and tokenizer."""
PICKLED = "pytorch_model*.bin"
SAFE = ("model.safetensors", "model.safetensors.index.json")


def cache() -> Path:
    """The folder of converted models: $OPPU_CACHE, or ~/.cache/oppu/models."""
    return Path(os.environ.get("OPPU_CACHE") or Path.home() / ".cache/oppu/models")


def safetensors_source(path: str, revision: str | None = None) -> tuple[str, str | None]:
    """Where the model lies as safetensors, (path, revision): itself if it has them, else its converted copy.

    The copy is made on the first call and named by what it was made from: the commit on the hub, or a local folder's
    bytes. Raises InputError where there are no weights, or where a .bin file holds anything but tensors.
    """
    if Path(path).is_dir():
        if any(Path(path, name).exists() for name in SAFE):
            return path, revision
        folder = Path(path)
        names = sorted(p for pattern in (*BESIDE, PICKLED) for p in folder.glob(pattern))
        key = digest({p.name: file_digest(p) for p in names})
    else:
        try:
            if any(_on_hub(path, name, revision) for name in SAFE):
                return path, revision
            wanted = [*BESIDE, PICKLED]
            folder = Path(snapshot_download(path, revision=revision, allow_patterns=wanted, token=token()))
        except (OSError, ValueError) as error:
            raise InputError([refusal(path, error)]) from error
        key = digest([path, folder.name])
    copy = cache() / key
    with lock(cache() / f".{key}.lock", f"conversion of {path}", wait=True):
        if not (copy / "config.json").exists():
            log.info("%s: converting its .bin weights to safetensors in %s, once", path, copy)
            with new_folder(copy) as new:
                convert(folder, new)
    return str(copy), None


def _on_hub(path: str, name: str, revision: str | None) -> bool:
    """Whether the model has this file; offline: whether the cache has it."""
    return bool(cached_file(path, name, revision=revision, token=token(), _raise_exceptions_for_missing_entries=False))


def convert(folder: Path, out: Path) -> None:
    """Write a folder of .bin weights as safetensors: every tensor bit for bit, one shard in memory at a time."""
    shards = sorted(folder.glob(PICKLED))
    if not shards:
        raise InputError([f"{folder}: neither safetensors nor {PICKLED}; model.path needs a model with weights"])
    where: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(shards, start=1):
        name = SAFE[0] if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = dict(_unshared(read_bin(shard)))
        save_file(tensors, out / name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, name)
        size += sum(t.nbytes for t in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (out / SAFE[1]).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
    for file in (p for pattern in BESIDE for p in folder.glob(pattern) if p.name != "pytorch_model.bin.index.json"):
        shutil.copyfile(file, out / file.name)


def read_bin(shard: Path) -> dict[str, Tensor]:
    """The tensors of one .bin file. Raises InputError for a file that would run code, or holds anything else."""
    try:
        # A pickle may name any function to call; weights_only allows tensors and plain containers alone.
        state = torch.load(shard, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(shard))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise InputError([f"{shard}: refused: it holds more than tensors, or is damaged: {error}"]) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise InputError([f"{shard}: refused: not a table of tensors"])
    return state


def _unshared(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that share no memory, as safetensors asks: of tied weights each gets a copy of its own."""
    seen: set[int] = set()
    for name, tensor in state.items():
        storage = tensor.untyped_storage().data_ptr()
        yield name, tensor.clone().contiguous() if storage in seen else tensor.contiguous()
        seen.add(storage)
