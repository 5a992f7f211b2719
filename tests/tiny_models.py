"""Tiny random models and examples, made on the spot."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel

from oppu.config import Lora
from oppu.models import freeze
from oppu.rows import Example

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


def tiny_llama(
    dtype: torch.dtype = torch.float32, seed: int = 0, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """A random model. Its norms are torch's own: Hugging Face's round to float32 even in a float64 model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config or tiny_config(), attn_implementation="sdpa")
    for module in list(model.modules()):
        for name, norm in list(module.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                setattr(module, name, nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon))
    for parameter in model.parameters():
        if parameter.ndim > 1:  # larger than the library's 0.02, so that attention and the loss are not flat
            nn.init.normal_(parameter, std=0.15)
    return freeze(model.to(dtype))


def settings(**changes: object) -> Lora:
    values: dict[str, object] = {"rank": 4, "alpha": 8, "lr": 1e-2, "weight_decay": 1e-2, "epochs": 2, "batch_size": 4}
    return Lora(**(values | {"max_grad_norm": 0.3, "tokens_per_batch": 200} | changes))


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
