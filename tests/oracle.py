"""The oracle: one user at a time, by PEFT, torch and transformers alone; one unpacked forward per example."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from oppu.rows import Example
from oppu.training_settings import Ia3Training, Lora, PromptTraining, Training


def peft_config(of: Training) -> PeftConfig:
    """PEFT's own configuration of a kind; layers that are not named are PEFT's to find."""
    if isinstance(of, Ia3Training):
        layers = {"target_modules": of.target_modules, "feedforward_modules": of.feedforward_modules}
        return IA3Config(**layers, task_type="CAUSAL_LM")
    if isinstance(of, PromptTraining):
        return PromptTuningConfig(num_virtual_tokens=of.virtual_tokens, task_type="CAUSAL_LM")
    assert isinstance(of, Lora)
    return LoraConfig(r=of.rank, lora_alpha=of.alpha, target_modules=of.target_modules, task_type="CAUSAL_LM")


def train_alone(
    model: PreTrainedModel, start: dict[str, Tensor], examples: list[Example], plan: list[list[int]], lora: Training
) -> dict[str, Tensor]:
    """The trained adapter of one user, from the initial parameters `start`."""
    peft = get_peft_model(copy.deepcopy(model), peft_config(lora))
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)
    set_peft_model_state_dict(peft, start)
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=lora.lr, weight_decay=lora.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimiser, math.ceil(lora.warmup * len(plan)), len(plan))
    for step in plan:
        optimiser.zero_grad()
        count = sum(len(examples[n].target) for n in step)
        for n in step:
            prompt, target = examples[n].prompt, examples[n].target
            logits = peft(input_ids=torch.tensor([prompt + target])).logits[0]  # of virtual tokens too
            loss = F.cross_entropy(logits[-len(target) - 1 : -1], torch.tensor(target), reduction="sum") / count
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, lora.max_grad_norm)
        optimiser.step()
        schedule.step()
    return {name: t.detach().clone() for name, t in get_peft_model_state_dict(peft).items()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest absolute difference of two adapters with the same names."""
    assert a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)
