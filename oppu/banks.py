"""The other kinds of personal adapter (Figure 6) in banks of the same form: (IA)3 and prompt tuning."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from peft import IA3Config, PromptTuningConfig
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from oppu.bank import PREFIX, Bank, LoraBank
from oppu.models import ia3_targets, sizes_of, target_linears
from oppu.training_settings import Ia3, Lora, Training, VirtualPrompt


def bank_for(model: PreTrainedModel, settings: Training, users: int, seed: int) -> Bank:
    """A bank of the kind that the settings are of."""
    if isinstance(settings, Ia3):
        return Ia3Bank(model, settings, users, seed)
    if isinstance(settings, VirtualPrompt):
        return PromptBank(model, settings, users, seed)
    assert isinstance(settings, Lora)
    return LoraBank(model, settings, users, seed)


class Ia3Bank(Bank):
    """(IA)3: a vector per layer scales its output, or its input in feedforward layers. All ones at first."""

    kind = "IA3"
    rounded = False  # near 1, where these stay, bfloat16 has steps of .8 %

    def __init__(self, model: PreTrainedModel, ia3: Ia3, users: int, seed: int) -> None:
        """Add the hooks. Raises InputError for targets that the model lacks."""
        self.target_modules, self.feedforward_modules = ia3_targets(model, ia3.target_modules, ia3.feedforward_modules)
        linears = target_linears(model, self.target_modules)
        self.transposed = any(isinstance(linear, Conv1D) for linear in linears.values())
        inputs = set(target_linears(model, self.feedforward_modules))
        shapes: dict[str, tuple[int, ...]] = {}
        for name, linear in linears.items():
            inner, outer = sizes_of(linear)
            shapes[f"{PREFIX}{name}.ia3_l"] = (1, inner) if name in inputs else (outer, 1)
        super().__init__(model, shapes, users, seed)
        self._handles = [
            linear.register_forward_pre_hook(partial(self._scale_input, name))
            if name in inputs
            else linear.register_forward_hook(partial(self._scale_output, name))
            for name, linear in linears.items()
        ]

    def _initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.ones(shape)

    def peft_config(self) -> IA3Config:
        """PEFT's own settings of these adapters."""
        return IA3Config(
            target_modules=self.target_modules,
            feedforward_modules=self.feedforward_modules,
            fan_in_fan_out=self.transposed,
        )

    def _scale_input(self, name: str, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._scaled(name, args[0]), *args[1:])

    def _scale_output(self, name: str, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return self._scaled(name, out)

    def _scaled(self, name: str, x: Tensor) -> Tensor:
        """x [R, T, n], each token times its own user's vector."""
        if self.active is None:
            return x
        vectors = self.active.parts[f"{PREFIX}{name}.ia3_l"].flatten(1)
        if self.active.ends is None:
            return (x * vectors[:, None]).to(x.dtype)
        groups = self.active.groups(x[..., 0].numel())
        # Not vectors[groups]: what that adds up backward comes in no fixed order on a GPU, and slowly on a CPU.
        return (x * F.embedding(groups, vectors).view(x.shape)).to(x.dtype)


class PromptBank(Bank):
    """Prompt tuning: each user's own embeddings in the place of the virtual tokens (`rows.virtual`) before a prompt.

    They are tokens like others to packing, masks, positions and the cache of keys and values; only what is embedded
    for them differs from user to user.
    """

    kind = "PROMPT_TUNING"

    def __init__(self, model: PreTrainedModel, prompt: VirtualPrompt, users: int, seed: int) -> None:
        """Add the hooks."""
        self.count, self.init = prompt.virtual_tokens, prompt.init
        self.model_config = model.config
        self.embedding = model.get_input_embeddings()
        self.width = int(self.embedding.weight.shape[1])  # type: ignore[index]
        super().__init__(model, {"prompt_embeddings": (self.count, self.width)}, users, seed)
        self._tokens: Tensor | None = None
        self._handles = [
            self.embedding.register_forward_pre_hook(self._hide),
            self.embedding.register_forward_hook(self._replace),
        ]

    def _initial(self, name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.init == "random":
            return torch.randn(shape, generator=generator)
        table: Tensor = self.embedding.weight  # type: ignore[assignment]
        chosen = torch.randint(len(table), shape[:1], generator=generator)
        return table[chosen.to(table.device)].detach().float().cpu()

    def peft_config(self) -> PromptTuningConfig:
        """PEFT's own settings of these adapters."""
        text = self.model_config.get_text_config()
        return PromptTuningConfig(
            num_virtual_tokens=self.count,
            token_dim=self.width,
            num_transformer_submodules=1,
            num_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
        )

    def _hide(self, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Before the embedding: keep its tokens in mind, and give it none that it does not know."""
        if self.active is None:
            return args
        self._tokens = args[0]
        return (args[0].clamp(min=0), *args[1:])

    def _replace(self, _: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """After it: virtual token -v + n of a group is row n of that group's v embeddings."""
        if self.active is None or self._tokens is None:
            return out
        tokens, self._tokens = self._tokens, None
        own = self.active.parts["prompt_embeddings"]
        if self.active.ends is None:
            groups = torch.arange(len(own), device=tokens.device)[:, None]
        else:
            groups = self.active.groups(tokens.numel()).view(tokens.shape)
        place = torch.where(tokens < 0, (groups + 1) * self.count + tokens, 0)
        return torch.where((tokens < 0)[..., None], F.embedding(place, own.flatten(0, 1)).to(out.dtype), out)
