"""Tiny random models and examples, made on the spot."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from oppu.models import freeze
from oppu.rows import Example, virtual
from oppu.training_settings import Ia3Training, Lora, PromptTraining, Training

VOCAB, EOS = 97, 2


def tiny_config(**changes: object) -> LlamaConfig:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    }
    return LlamaConfig(**(values | changes))


class Norm(nn.Module):
    """RMS norm in the dtype of its input; Gemma's weight counts from one."""

    def __init__(self, weight: torch.Tensor, eps: float, from_one: bool) -> None:
        super().__init__()
        self.weight, self.eps, self.from_one = nn.Parameter(weight), eps, from_one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return x * (1 + self.weight if self.from_one else self.weight)


def tiny_llama(
    dtype: torch.dtype = torch.float32, seed: int = 0, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """A random model. Its norms keep their input's dtype: Hugging Face's round to float32 even in a float64 model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or tiny_config())
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                gemma = type(norm).__name__.startswith("Gemma")
                eps = norm.eps if gemma else norm.variance_epsilon
                setattr(module, name, Norm(norm.weight.data, eps, from_one=gemma))
    for parameter in model.parameters():
        if parameter.ndim > 1:  # larger than the library's 0.02, so that attention and the loss are not flat
            nn.init.normal_(parameter, std=0.15)
    return freeze(model.to(dtype))


SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
WINDOW = 6
"""Shorter than the examples, which have 12 to 27 tokens."""
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": tiny_config(),
    "qwen3": Qwen3Config(**SMALL),
    "qwen2-window": Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "mistral-window": MistralConfig(**SMALL, sliding_window=WINDOW),
    "gemma2-window": Gemma2Config(**SMALL, sliding_window=WINDOW, query_pre_attn_scalar=16),
    "gemma3-window": Gemma3TextConfig(**SMALL, sliding_window=WINDOW, sliding_window_pattern=2),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=64, eos_token_id=EOS),
}


def settings(**changes: object) -> Lora:
    values: dict[str, object] = {"rank": 4, "alpha": 8, "lr": 1e-2, "weight_decay": 1e-2, "epochs": 2, "batch_size": 4}
    return Lora(**(values | {"max_grad_norm": 0.3, "tokens_per_batch": 200} | changes))


KINDS = ("lora", "ia3", "prompt")


def settings_of(kind: str, **changes: object) -> Training:
    """Settings of any kind; learning rates at which each moves well."""
    if kind == "lora":
        return settings(**changes)
    values: dict[str, object] = {"weight_decay": 1e-2, "epochs": 2, "batch_size": 4}
    values |= {"max_grad_norm": 0.3, "tokens_per_batch": 200} | changes
    if kind == "ia3":
        return Ia3Training(**({"lr": 3e-2} | values))
    return PromptTraining(**({"lr": 3e-2, "virtual_tokens": 5} | values))


def with_virtual(examples: list[list[Example]], lora: Training) -> list[list[Example]]:
    """The examples as a context of these settings makes them."""
    lead = virtual(lora.virtual_tokens) if isinstance(lora, PromptTraining) else ()
    return [[Example(lead + e.prompt, e.target) for e in own] for own in examples]


def some_examples(seed: int, counts: list[int]) -> list[list[Example]]:
    """Per user, examples whose prompts share a beginning (some differ early, some are the prefix alone)."""
    draw = random.Random(seed)
    token: Callable[[], int] = lambda: draw.randrange(3, VOCAB)  # noqa: E731
    prefix = (1, *(token() for _ in range(9)))
    users = []
    for user, count in enumerate(counts):
        own = prefix if user % 3 else (*prefix[:4], *(token() for _ in range(3)))
        users.append(
            [
                Example(
                    (*own, *(token() for _ in range(draw.randrange(0, 12)))),
                    (*(token() for _ in range(draw.randrange(1, 5))), EOS),
                )
                for _ in range(count)
            ]
        )
    return users
