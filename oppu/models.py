"""The frozen language model: loading it, merging the task LoRA into it, finding the layers that PEFT is added to."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.constants import (
    TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from oppu.convert import cache, safetensors_source
from oppu.float8 import check_float8, to_float8
from oppu.hub import refusal, token
from oppu.records import InputError

if not sys.stderr.isatty():  # a log is no place for "Loading weights"
    disable_progress_bar()

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
LINEAR = (nn.Linear, Conv1D)


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A model's tokenizer, by hub id or local folder; it pads with its end-of-text token when it has no pad token.

    Raises InputError when it cannot be loaded, or has no end-of-text token to end an answer with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False, token=token())
    except (OSError, ValueError) as error:
        raise InputError([f"no tokenizer: {refusal(path, error)}"]) from error
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
    convert: bool = False,
    quantization: str | None = None,
    exact: Sequence[str] = (),
) -> PreTrainedModel:
    """A causal LM by hub id or local folder: safetensors only, no remote code, frozen, in eval mode.

    Tensors go from the mapped files to the device one by one. `convert` makes safetensors of a model that has none;
    `quantization` (8bit, 4bit, fp8) stores its Linear layers so. Where the dtype has 16 bits, the target modules in
    `exact` stay as they are stored. Attention is SDPA where the model has it. Raises InputError when it cannot load.
    """
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    source, revision = safetensors_source(path, revision) if convert else (path, revision)
    if quantization == "fp8":
        check_float8(device, kind)
    options = quantized_loading(quantization, kind) if quantization in ("8bit", "4bit") else {}
    common: dict[str, Any] = {"revision": revision, "trust_remote_code": False, "token": token()}
    try:
        config = AutoConfig.from_pretrained(source, **common)
        model = _class_of(config, exact if kind.itemsize == 2 else ()).from_pretrained(
            source, config=config, dtype=kind, use_safetensors=True, device_map={"": device}, **common, **options
        )
    except (OSError, ValueError, SafetensorError, ImportError, RuntimeError) as error:
        raise InputError([refusal(path, error)]) from error
    # Of the model's own settings only its end tokens stay: its sampling defaults would change answers silently.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    return to_float8(freeze(model)) if quantization == "fp8" else freeze(model)


def _class_of(config: PreTrainedConfig, exact: Sequence[str]) -> type[PreTrainedModel]:
    """The class that the auto class would choose, told to load some layers in the dtype they are stored in."""
    with torch.device("meta"):
        kind: type[PreTrainedModel] = type(AutoModelForCausalLM.from_config(config))
    if not exact:
        return kind
    as_stored = dict.fromkeys(rf"(^|\.){re.escape(name)}\.weight$" for name in exact)

    def plan(self: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype | None]:
        """Transformers' own table of what is loaded in another dtype than the rest; None stands for no cast."""
        return {**kind._get_dtype_plan(self, dtype), **as_stored}

    return type(kind.__name__, (kind,), {"_get_dtype_plan": plan, "__module__": kind.__module__})


def quantized_loading(quantization: str, dtype: torch.dtype) -> dict[str, Any]:
    """What from_pretrained must be told for 8bit or 4bit; InputError without bitsandbytes, or for a wrong dtype."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError([f"model.quantization {quantization}: needs bitsandbytes: pip install 'oppu[quantization]'"])
    if dtype == torch.float64:
        raise InputError([f"model.quantization {quantization}: model.dtype must be bfloat16, float16 or float32"])
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "8bit"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    )
    return {"quantization_config": config}


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, in eval mode and with no parameter that asks for a gradient."""
    return model.eval().requires_grad_(False)


def default_targets(model: PreTrainedModel) -> list[str]:
    """The query and value projections (section 4), by the names this architecture gives them.

    Where it has no `q_proj` and `v_proj`, PEFT's table says what holds them (`c_attn` in GPT-2). Raises InputError
    with the names there are where the table does not know the architecture.
    """
    table = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return _known(model, ["q_proj", "v_proj"], table, "query and value projections")


def ia3_targets(
    model: PreTrainedModel, targets: list[str] | None = None, feedforward: list[str] | None = None
) -> tuple[list[str], list[str]]:
    """The layers that (IA)3 scales, and those of them whose input is scaled; both sorted.

    Where none are named: `k_proj`, `v_proj` and `down_proj`, or what PEFT's table has for this architecture; inputs are
    scaled in `down_proj`, or by PEFT's table. InputError where neither knows, or an input's layer is no target.
    """
    table = TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    targets = targets or _known(model, ["k_proj", "v_proj", "down_proj"], table, "keys, values and feedforward layers")
    if feedforward is None:
        kind = model.config.get_text_config().model_type
        usual = {"down_proj", *TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.get(kind, [])}
        feedforward = sorted(usual & set(targets))
    if other := sorted(set(feedforward) - set(targets)):
        raise InputError([f"feedforward_modules: {', '.join(other)} must stand in target_modules too: {targets}"])
    return sorted(targets), sorted(feedforward)


def _known(model: PreTrainedModel, usual: list[str], table: dict[str, Any], what: str) -> list[str]:
    modules = dict(model.named_modules())
    kind = model.config.get_text_config().model_type
    for names in (usual, table.get(kind)):
        if isinstance(names, list) and all(any(m.endswith(f".{n}") for m in modules) for n in names):
            return names
    found = _linear_names(modules)
    raise InputError([f"target_modules: {what} of a {kind} are not known; name some of {found}"])


def target_linears(model: nn.Module, target_modules: list[str]) -> dict[str, nn.Module]:
    """The Linear layers (GPT-2: Conv1D) that PEFT would match: full name -> layer, in the model's order.

    A target names a layer by its full name or by the end of it, as in PEFT. PEFT passes over a target that matches
    nothing and trains less than it was asked to; here that is an InputError that lists the names there are.
    """
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    problems = []
    for target in target_modules:
        names = [n for n in modules if n == target or n.endswith(f".{target}")]
        wrong = sorted({type(modules[n]).__name__ for n in names if not isinstance(modules[n], LINEAR)})
        if wrong:
            problems.append(f"target_modules: {target!r} is a {', '.join(wrong)}; only Linear layers can carry LoRA")
        elif not names:
            problems.append(f"target_modules: {target!r} matches no layer; there are {_linear_names(modules)}")
        found |= {n: modules[n] for n in names if isinstance(modules[n], LINEAR)}
    if problems:
        raise InputError(problems)
    return {n: found[n] for n in modules if n in found}


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a layer that can carry LoRA."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features  # a quantized weight's shape says nothing


def _linear_names(modules: dict[str, nn.Module]) -> str:
    names = {n.rsplit(".", 1)[-1] for n, m in modules.items() if isinstance(m, LINEAR)}
    return ", ".join(sorted(names)) or "no Linear layers at all"


def merge(model: PreTrainedModel, adapter: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with a LoRA folder merged into its weights (in place), as the base of section 2.2: W + alpha/r B A.

    Each layer in turn is merged in float32 (float64 where it is so), on its device, and then, given a `dtype`, cast to
    it. Without one the layers must be float32 or float64: a small delta added to rounded weights is lost; ValueError
    otherwise. Raises InputError when the folder holds tensors that belong to no layer of this model.
    """
    config, names = _adapter(adapter)
    linears = target_linears(model, config["target_modules"])
    for name, linear in linears.items():
        if (found := linear.weight.dtype) not in (torch.float32, torch.float64) and dtype is None:
            raise ValueError(f"merge {adapter}: {name} is {found}; load it in float32, merge, then cast")
    wanted = {f"base_model.model.{n}.lora_{x}.weight" for n in linears for x in "AB"}
    if names != wanted:
        raise InputError([f"{adapter}: does not fit the model: {sorted(names ^ wanted)[:4]} stand on one side only"])
    tuner: Any = PeftModel.from_pretrained(model, str(adapter)).base_model
    for layer in tuner.modules():
        if isinstance(layer, LoraLayer):
            base: Any = layer.get_base_layer()
            wide = torch.promote_types(base.weight.dtype, torch.float32)
            base.to(wide)
            layer.merge()
            base.to(dtype or wide)
    return freeze(tuner.unload())


def _adapter(folder: Path) -> tuple[dict[str, Any], set[str]]:
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return config, set(load_file(folder / ADAPTER_WEIGHTS))
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError([f"{folder}: not a PEFT adapter: {error}"]) from error


def load_base(
    path: str,
    revision: str | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    task_adapter: Path | None = None,
    convert: bool = False,
    quantization: str | None = None,
) -> PreTrainedModel:
    """The base model Theta of section 2.2: loaded, the task LoRA merged in float32, then cast and quantized.

    The layers that are merged into are float32 one at a time, so a 7B stored and run in 16 bits needs 14 GB and one
    layer, on the device; stored in float32, those layers stay so until each is merged. fp8 starts from that and ends
    at half of it. See `load_model` for the other arguments and the errors.
    """
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if task_adapter is None:
        return load_model(path, revision, kind, device, convert, quantization)
    if quantization == "fp8":
        check_float8(device, kind)
    targets = _adapter(task_adapter)[0]["target_modules"]
    bits = quantization in ("8bit", "4bit")
    model = merge(
        load_model(path, revision, kind, "cpu" if bits else device, convert, exact=targets), task_adapter, kind
    )
    if not bits:
        return to_float8(model) if quantization else model
    # bitsandbytes quantizes while it loads, so the merged model goes by way of the disk.
    cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache()) as folder:
        model.save_pretrained(folder)
        del model
        return load_model(folder, None, kind, device, quantization=quantization)


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
