"""The frozen language model: loading it, merging the task LoRA into it, finding the layers that PEFT is added to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from oppu.records import InputError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer, by hub id or local folder; it pads with its end-of-text token when it has no pad token.

    Raises InputError when it cannot be loaded, or has no end-of-text token to end an answer with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError([f"model {path!r}: no tokenizer could be loaded: {error}"]) from error
    if tokenizer.eos_token_id is None:
        raise InputError([f"model {path!r}: its tokenizer has no end-of-text token; set eos_token"])
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    path: str,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """A causal LM by hub id or local folder: safetensors only, no remote code, frozen, in eval mode, SDPA attention.

    Raises InputError when it cannot be loaded.
    """
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=revision,
            dtype=kind,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError) as error:
        raise InputError([f"model {path!r}: could not be loaded: {error}"]) from error
    # Of the model's own settings only its end tokens stay: its sampling defaults would change answers silently.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return freeze(moved(model, device))


def moved(model: PreTrainedModel, device: str | torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model itself, on a device and in a dtype."""
    nn.Module.to(model, device=device, dtype=dtype)
    return model


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, in eval mode and with no parameter that asks for a gradient."""
    return model.eval().requires_grad_(False)


def target_linears(model: nn.Module, target_modules: list[str]) -> dict[str, nn.Linear]:
    """The Linear layers that PEFT would match: full name -> layer, in the model's order.

    A target names a layer by its full name or by the end of it, as in PEFT. PEFT passes over a target that matches
    nothing and trains less than it was asked to; here that is an InputError that lists the names there are.
    """
    modules = dict(model.named_modules())
    found: dict[str, nn.Linear] = {}
    problems = []
    for target in target_modules:
        names = [n for n in modules if n == target or n.endswith(f".{target}")]
        wrong = sorted({type(modules[n]).__name__ for n in names if not isinstance(modules[n], nn.Linear)})
        if wrong:
            problems.append(f"target_modules: {target!r} is a {', '.join(wrong)}; only Linear layers can carry LoRA")
        elif not names:
            problems.append(f"target_modules: {target!r} matches no layer; there are {_linear_names(modules)}")
        found |= {n: modules[n] for n in names if isinstance(modules[n], nn.Linear)}
    if problems:
        raise InputError(problems)
    return {n: found[n] for n in modules if n in found}


def _linear_names(modules: dict[str, nn.Module]) -> str:
    names = {n.rsplit(".", 1)[-1] for n, m in modules.items() if isinstance(m, nn.Linear)}
    return ", ".join(sorted(names)) or "no Linear layers at all"


def merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with a LoRA folder merged into its weights (in place), as the base of section 2.2: W + alpha/r B A.

    The model must be float32 or float64: a small delta added to rounded weights is lost. Raises ValueError otherwise,
    and InputError when the folder holds tensors that belong to no layer of this model.
    """
    if (dtype := next(model.parameters()).dtype) not in (torch.float32, torch.float64):
        raise ValueError(f"merge {adapter}: the model is {dtype}; load it in float32, merge, then cast")
    try:
        config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        names = set(load_file(adapter / ADAPTER_WEIGHTS))
    except (OSError, ValueError) as error:
        raise InputError([f"{adapter}: not a PEFT adapter: {error}"]) from error
    wanted = {
        f"base_model.model.{n}.lora_{x}.weight" for n in target_linears(model, config["target_modules"]) for x in "AB"
    }
    if names != wanted:
        raise InputError([f"{adapter}: does not fit the model: {sorted(names ^ wanted)[:4]} stand on one side only"])
    return freeze(PeftModel.from_pretrained(model, str(adapter)).merge_and_unload())


def load_base(
    path: str,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    task_adapter: Path | None = None,
) -> PreTrainedModel:
    """The base model Theta of section 2.2: loaded and merged with the task LoRA in float32, then cast and moved."""
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if task_adapter is None:
        return load_model(path, revision, kind, device)
    exact = torch.float64 if kind == torch.float64 else torch.float32
    return moved(merge(load_model(path, revision, exact), task_adapter), device, kind)


@contextmanager
def head_at(model: PreTrainedModel, positions: Tensor) -> Iterator[None]:
    """Within the block, the LM head runs at these positions only: logits are [M, V] instead of [R, T, V].

    `positions` [M] index the R * T tokens of a batch. A hook does it because `logits_to_keep` takes one set of
    positions for all rows in some versions of transformers, and is not taken by every model.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise InputError([f"{type(model).__name__} has no LM head; a causal LM is needed"])

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1)[positions], *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
