"""A bank of personal adapters: many users' PEFT parameters (section 2.3) over one frozen base model.

One matrix [U, P] holds all users; a user's adapter is a row. Hooks on the frozen layers apply to each token the
parameters of that token's own user, so one forward pass serves many users and no user's parameters meet another's
tokens. Here: what all kinds share, and LoRA; the other kinds are in oppu/banks.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from oppu.models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, default_targets, sizes_of, target_linears
from oppu.records import InputError
from oppu.training_settings import Lora

State = dict[str, Tensor]
PREFIX = "base_model.model."
"""PEFT's name of the base model, before the name of a layer."""


@dataclass
class Active:
    """Whose adapters the hooks apply: `parts` are the parameters [G, …] of G groups of tokens, by PEFT's names.

    With `ends` [G] (int32) the batch is packed: group g is the tokens up to ends[g] of the flattened batch. Without,
    group g is row g of the batch. `keys` [N] are the tokens' dropout keys; None: no dropout.
    """

    parts: dict[str, Tensor]
    ends: Tensor | None
    keys: Tensor | None
    _groups: dict[int, Tensor] = field(default_factory=dict)

    def groups(self, tokens: int) -> Tensor:
        """The group of each of the packed batch's tokens, [N]."""
        assert self.ends is not None
        if tokens not in self._groups:
            order = torch.arange(tokens, dtype=self.ends.dtype, device=self.ends.device)
            self._groups[tokens] = torch.searchsorted(self.ends, order, right=True)
        return self._groups[tokens]


class Bank:
    """U users' adapters of one kind over one frozen model. A kind adds its parameters' shapes and hooks.

    All users begin with the same parameters, drawn from `seed` as PEFT draws them, so that their adapters can be
    compared (appendix G). Parameters are float32, or float64 when the model is.
    """

    kind: ClassVar[str]
    """PEFT's name of the kind."""
    rounded: ClassVar[bool] = True
    """Whether the hooks take the parameters in the model's dtype; else in their own."""
    dropout: float = 0.0

    def __init__(self, model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], users: int, seed: int) -> None:
        self.shapes = shapes
        self.sizes = [math.prod(shape) for shape in shapes.values()]
        embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
        self.dtype: torch.dtype = embedding.dtype
        generator = torch.Generator().manual_seed(seed)
        # Drawn on the CPU, in the model's order of layers.
        start = torch.cat([self._initial(name, shape, generator).flatten() for name, shape in shapes.items()])
        exact = torch.promote_types(self.dtype, torch.float32)
        self.weights = start.to(device=embedding.device, dtype=exact).repeat(users, 1)
        self.grads: dict[int, Tensor] = {}
        self.active: Active | None = None
        self._handles: list[RemovableHandle] = []

    def _initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """What one parameter begins with."""
        raise NotImplementedError

    def peft_config(self) -> PeftConfig:
        """PEFT's own settings of these adapters."""
        raise NotImplementedError

    def problems(self, config: dict[str, Any]) -> list[str]:
        """What an adapter_config.json says that its tensors do not show and that is not so in this bank."""
        return []

    def __len__(self) -> int:
        return len(self.weights)

    def parameter(self, user: int) -> nn.Parameter:
        """A user's row [P] as a parameter that shares the bank's memory: what an optimiser steps."""
        return nn.Parameter(self.weights[user])

    @contextmanager
    def use(self, users: Tensor, ends: Tensor | None = None, keys: Tensor | None = None) -> Iterator[None]:
        """Within the block, the model runs with these users' adapters (see Active); a user may stand more than once.

        A backward pass must come within the block too. At its end, each user's gradient [P] is added to `grads`.
        """
        if self.active is not None:
            raise RuntimeError("the bank is in use; blocks do not nest")
        rows = self.weights[users.to(self.weights.device, non_blocking=True)].requires_grad_(torch.is_grad_enabled())
        split = (rows.to(self.dtype) if self.rounded else rows).split(self.sizes, 1)
        parts = {n: part.view(-1, *shape) for part, (n, shape) in zip(split, self.shapes.items(), strict=True)}
        self.active = Active(parts, ends, keys)
        try:
            yield
        finally:
            self.active = None
        if rows.grad is not None:
            # One by one and in order: index_add_ has no fixed order on a GPU.
            for user, grad in zip(users.tolist(), rows.grad, strict=True):
                self.grads[user] = self.grads[user] + grad if user in self.grads else grad

    def state_dict(self, user: int) -> State:
        """A user's adapter by PEFT's names, on the CPU."""
        parts = self.weights[user].detach().cpu().split(self.sizes)
        named = zip(self.shapes.items(), parts, strict=True)
        return {name: part.reshape(shape).clone() for (name, shape), part in named}

    def load(self, user: int, state: State) -> None:
        """Make `state` a user's adapter; ValueError where names or shapes differ from the bank's."""
        if problems := self.mismatches(state):
            raise ValueError("; ".join(problems))
        flat = torch.cat([state[name].flatten() for name in self.shapes])
        self.weights[user] = flat.to(self.weights)

    def mismatches(self, state: State) -> list[str]:
        """Why an adapter does not fit this bank: names that differ, shapes that differ; empty when it fits."""
        problems = [f"{name} is missing" for name in self.shapes if name not in state]
        problems += [f"{name} has no layer" for name in state if name not in self.shapes]
        problems += [
            f"{name} is {tuple(state[name].shape)}, not {shape}"
            for name, shape in self.shapes.items()
            if name in state and tuple(state[name].shape) != shape
        ]
        return problems

    def close(self) -> None:
        """Take the hooks away: the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class LoraBank(Bank):
    """LoRA: A drawn as PEFT draws it, B zero, so that all begin at the base model."""

    kind = "LORA"

    def __init__(self, model: PreTrainedModel, lora: Lora, users: int, seed: int) -> None:
        """Add the hooks. Raises InputError for targets that the model lacks, ValueError where rank is unset."""
        if lora.rank is None:
            raise ValueError("LoraBank: lora.rank is unset; take it from Config.lora(task)")
        self.rank = lora.rank
        self.alpha = float(lora.rank if lora.alpha is None else lora.alpha)
        self.dropout = lora.dropout
        self.target_modules = sorted(lora.target_modules or default_targets(model))
        linears = target_linears(model, self.target_modules)
        self.transposed = any(isinstance(linear, Conv1D) for linear in linears.values())
        shapes: dict[str, tuple[int, ...]] = {}
        for name, linear in linears.items():
            inner, outer = sizes_of(linear)
            shapes[f"{PREFIX}{name}.lora_A.weight"] = (self.rank, inner)
            shapes[f"{PREFIX}{name}.lora_B.weight"] = (outer, self.rank)
        super().__init__(model, shapes, users, seed)
        self._handles = [
            linear.register_forward_hook(partial(self._add_delta, number, name))
            for number, (name, linear) in enumerate(linears.items())
        ]

    def _initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        part = torch.zeros(shape)
        if name.endswith(".lora_A.weight"):
            nn.init.kaiming_uniform_(part, a=math.sqrt(5), generator=generator)
        return part

    def peft_config(self) -> LoraConfig:
        """PEFT's own settings of these adapters."""
        return LoraConfig(
            r=self.rank,
            lora_alpha=int(self.alpha) if self.alpha.is_integer() else self.alpha,  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            fan_in_fan_out=self.transposed,
        )

    def problems(self, config: dict[str, Any]) -> list[str]:
        """Rank and alpha that are not the bank's: the scale stands in no tensor."""
        if (scale := (config.get("r"), config.get("lora_alpha"))) == (self.rank, self.alpha):
            return []
        return [f"r and lora_alpha are {scale}, not {(self.rank, self.alpha)}"]

    def _add_delta(self, number: int, name: str, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Forward hook of one layer: x W + alpha/r x A^T B^T, each token with its own user's A and B."""
        if self.active is None:
            return out
        x, ends = args[0], self.active.ends
        a, b = (self.active.parts[f"{PREFIX}{name}.lora_{part}.weight"].mT.to(x.dtype) for part in "AB")
        if ends is None:
            hidden = torch.bmm(x, a) * (self.alpha / self.rank)
            return out + torch.bmm(hidden, b).to(out.dtype)
        x = x.flatten(0, -2)
        if self.active.keys is not None:
            keep = kept(self.active.keys, number, x.shape[-1], self.dropout)
            x = x * keep.to(x.dtype) / (1 - self.dropout)
        hidden = grouped(x, a, ends) * (self.alpha / self.rank)
        return out + grouped(hidden, b, ends).view(out.shape).to(out.dtype)


def grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Each group's rows times that group's matrix: x [N, i], weights [G, i, o], ends [G] -> [N, o].

    grouped_mm knows no float64 and wants 16-byte strides; a plain loop does the rest.
    """
    size = x.element_size()
    strides = (x.shape[-1], weights.shape[-1], weights.stride(0))
    if x.dtype != torch.float64 and all(n * size % 16 == 0 for n in strides) and weights.data_ptr() % 16 == 0:
        return F.grouped_mm(x, weights, offs=ends)
    stops = ends.tolist()
    parts = x.split([stop - start for start, stop in zip([0, *stops], stops, strict=False)])
    return torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)])


GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as a signed 64-bit integer


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64: every bit of the input moves every bit of the output."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def kept(keys: Tensor, layer: int, width: int, rate: float) -> Tensor:
    """Which inputs of a layer dropout keeps, [N, width]: a number per (token key, layer, feature) decides.

    Counted instead of drawn in turn, so that it depends on neither the batch, nor its order, nor the device.
    """
    features = torch.arange(width, device=keys.device) + (layer + 1) * 1_000_003
    return mix(keys[:, None] + features * GOLDEN) & 0xFFFFFFFF >= rate * 2**32


def save_adapter(folder: Path, bank: Bank, user: int, base_name: str) -> None:
    """Write a user's adapter in PEFT's own format: the same adapter gives the same bytes.

    `base_name` names the merged base model that the adapter belongs to: on the raw one it would be silently wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors' save_file writes through a temporary file of its own mode; the bytes are written plainly here.
    (folder / ADAPTER_WEIGHTS).write_bytes(save(bank.state_dict(user), metadata={"format": "pt"}))
    config = bank.peft_config()
    config.base_model_name_or_path, config.task_type, config.inference_mode = base_name, "CAUSAL_LM", True
    for name, value in vars(config).items():
        if isinstance(value, set):  # layers, whose order differs between runs
            setattr(config, name, sorted(value))
    config.save_pretrained(str(folder))


def load_adapter(folder: Path, bank: Bank | None = None) -> State:
    """A saved adapter's tensors by PEFT's names.

    Raises InputError when the folder holds no whole adapter, and, given a bank, when the adapter's kind, names, shapes,
    rank or alpha are not the bank's.
    """
    try:
        state = load_file(folder / ADAPTER_WEIGHTS)
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError([f"{folder}: not an adapter: {error}"]) from error
    if bank is not None and (kind := config.get("peft_type")) != bank.kind:
        raise InputError([f"{folder}: is an adapter of kind {kind}, not {bank.kind}"])
    ranks = {t.shape[0] if ".lora_A." in name else t.shape[-1] for name, t in state.items() if ".lora_" in name}
    problems = [] if ranks <= {config.get("r")} else [f"adapter_config.json says r {config.get('r')}, tensors {ranks}"]
    if bank is not None:
        problems += bank.mismatches(state) + bank.problems(config)
    if problems:
        raise InputError([f"{folder}: {problem}" for problem in problems])
    return state
