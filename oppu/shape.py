"""A model's shape, read without its weights: how many parameters it has, and what a token costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from oppu.records import InputError
from oppu.training_settings import Ia3, Lora, Training, VirtualPrompt

LLAMA_LIKE = {"llama", "mistral", "qwen2", "qwen3"}
"""Model types whose layers are q, k, v, o, gate, up and down projections."""
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "8bit": 1, "fp8": 1, "4bit": 0.5}


@lru_cache
def known() -> dict[str, Any]:
    """plan.yaml: GPUs, and the config values of a few models."""
    return dict(yaml.safe_load(Path(__file__).with_name("plan.yaml").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Shape:
    """What decides a causal LM's costs."""

    linears: tuple[tuple[str, int, int], ...]
    """(full name, inputs, outputs) of each Linear layer but the head."""
    body: int
    """Parameters that every token is multiplied with: no embeddings, no head."""
    head: int
    parameters: int
    layers: int
    width: int
    """Attention heads times their size."""
    hidden: int
    intermediate: int
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """The layers that LoRA is added to where none are named."""
    ia3: tuple[str, ...] = ("k_proj", "v_proj", "down_proj")
    """The layers that (IA)3 scales where none are named."""
    feedforward: tuple[str, ...] = ("down_proj",)
    """Those whose input (IA)3 scales."""

    def forward(self, tokens: float, pairs: float, logits: float) -> float:
        """FLOPs of a forward pass: 2 per parameter and token, 4 per pair of tokens in attention, layer and width.

        `pairs` counts pairs of a query and a key token, masked ones too; the head runs at `logits` places.
        """
        return 2 * self.body * tokens + 4 * self.layers * self.width * pairs + 2 * self.head * logits

    def training(self, tokens: float, pairs: float, labels: float, adapter: int) -> float:
        """FLOPs of a forward pass, the backward pass to the inputs (none to the frozen weights), and the adapter's own.

        Backward, a frozen matrix costs as much as forward, attention and the adapter twice as much.
        """
        attention = 4 * self.layers * self.width * pairs
        return 2 * self.forward(tokens, pairs, labels) + attention + 6 * adapter * tokens

    def adapter(self, settings: Training) -> int:
        """Parameters of one adapter of the settings' kind; InputError for a target that the model lacks."""
        if isinstance(settings, VirtualPrompt):
            return settings.virtual_tokens * self.hidden
        if isinstance(settings, Ia3):
            named = settings.feedforward_modules
            feedforward = {layer for t in (self.feedforward if named is None else named) for layer in self._matching(t)}
            chosen = self._chosen(settings.target_modules or self.ia3)
            return sum(layer[1] if layer in feedforward else layer[2] for layer in chosen)
        assert isinstance(settings, Lora)
        chosen = self._chosen(settings.target_modules or self.targets)
        return sum(int(settings.rank or 0) * (inputs + outputs) for _, inputs, outputs in chosen)

    def _chosen(self, targets: Sequence[str]) -> set[tuple[str, int, int]]:
        if not targets:
            raise InputError(["target_modules: not known for this architecture; name the layers"])
        matched = {target: self._matching(target) for target in targets}
        if missing := [t for t, layers in matched.items() if not layers]:
            names = sorted({name.rsplit(".", 1)[-1] for name, *_ in self.linears})
            raise InputError([f"target_modules: {t!r} matches no layer; there are {', '.join(names)}" for t in missing])
        return {layer for layers in matched.values() for layer in layers}

    def _matching(self, target: str) -> list[tuple[str, int, int]]:
        return [layer for layer in self.linears if layer[0] == target or layer[0].endswith(f".{target}")]


def model_file(path: str, revision: str | None, name: str) -> Path | None:
    """A small file of a model: of its folder, or of a hub model that was fetched before; None where there is none."""
    if Path(path).is_dir():
        file = Path(path) / name
        return file if file.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(path, name, revision=revision)
    except ValueError as error:
        raise InputError([f"model.path: {path!r} is no folder and no hub id: {error}"]) from None
    return Path(found) if isinstance(found, str) else None


def shape_of(path: str, revision: str | None = None) -> tuple[Shape | None, str]:
    """A model's shape and where it is from; None where no config of it is at hand. Never goes to the network.

    Raises InputError for a folder without config.json, and for a config.json that cannot be read.
    """
    file = model_file(path, revision, "config.json")
    if file is None and Path(path).is_dir():
        raise InputError([f"{path}: no config.json; model.path needs a Hugging Face model folder"])
    if file is None:
        values = known()["models"].get(path)
        return (llama_like(values), "oppu's own table") if values else (None, f"unknown: no config.json of {path} here")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["model_type"] in LLAMA_LIKE:
            return llama_like(values), "config.json"
    except (ValueError, KeyError, TypeError) as error:
        raise InputError([f"{file}: not the config of a Hugging Face model: {error!r}"]) from None
    return _by_building(file), "config.json, built without weights"


def llama_like(values: dict[str, Any]) -> Shape:
    """The shape of a Llama, Mistral or Qwen from the values of its config.json."""
    d, inner, layers = values["hidden_size"], values["intermediate_size"], values["num_hidden_layers"]
    heads = values["num_attention_heads"]
    size = values.get("head_dim") or d // heads
    q, kv = heads * size, (values.get("num_key_value_heads") or heads) * size
    attention = {"q_proj": (d, q), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (q, d)}
    mlp = {"gate_proj": (d, inner), "up_proj": (d, inner), "down_proj": (inner, d)}
    linears = tuple(
        (f"model.layers.{n}.{part}.{name}", *shape)
        for n in range(layers)
        for part, group in (("self_attn", attention), ("mlp", mlp))
        for name, shape in group.items()
    )
    body = sum(inputs * outputs for _, inputs, outputs in linears)
    small = (2 * layers + 1) * d  # the norms
    kind = values["model_type"]
    small += layers * (q + 2 * kv) * (kind == "qwen2") + layers * 2 * size * (kind == "qwen3")
    small += layers * (q + 2 * kv + d) * bool(values.get("attention_bias") and kind == "llama")
    small += layers * (2 * inner + d) * bool(values.get("mlp_bias") and kind == "llama")
    head = values["vocab_size"] * d
    parameters = body + small + head * (1 if values.get("tie_word_embeddings", False) else 2)
    return Shape(linears, body, head, parameters, layers, q, d, inner)


def _by_building(file: Path) -> Shape:
    """The shape of any other causal LM, built by transformers on the meta device: no memory, but seconds of imports."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from oppu.models import LINEAR, default_targets, ia3_targets, sizes_of

    try:
        config = AutoConfig.from_pretrained(str(file.parent), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError([f"{file}: not the config of a causal LM: {error}"]) from None
    text = config.get_text_config()
    out = model.get_output_embeddings()
    modules = dict(model.named_modules())
    linears = tuple((name, *sizes_of(m)) for name, m in modules.items() if isinstance(m, LINEAR) and m is not out)
    tables = {id(m.weight) for m in modules.values() if isinstance(m, torch.nn.Embedding)} | {id(out.weight)}
    body = sum(p.numel() for p in model.parameters() if p.ndim > 1 and id(p) not in tables)
    d, heads = text.hidden_size, text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or d // heads)
    inner = getattr(text, "intermediate_size", None) or 4 * d
    total = sum(p.numel() for p in model.parameters())
    try:
        scaled = ia3_targets(model)
    except InputError:  # it matters only where (IA)3 is asked for
        scaled = ([], [])
    targets = (tuple(default_targets(model)), *map(tuple, scaled))
    return Shape(linears, body, out.weight.numel(), total, text.num_hidden_layers, width, d, inner, *targets)
