"""How far an adapter moves in the steps that it has: Table 4's values, the released code's, and the demo's own.

    python benchmarks/table4_steps.py

One person of the sample with the longest LaMP_2N history learns it on data/models/oppu-tiny, from the same start with
each setting. Printed per setting: optimiser steps, |alpha/r B A| / |W| (Frobenius norms, mean over the layers), and
the loss over the history before and after.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import PreTrainedModel

from oppu import lamp
from oppu.bank import LoraBank
from oppu.config import Config, Split, parse_augmentation
from oppu.examples import Context, history_examples
from oppu.models import load_model, load_tokenizer, target_linears
from oppu.rows import Example, plan
from oppu.split import split
from oppu.tasks import task
from oppu.training import train
from oppu.training_settings import Lora

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "data/models/oppu-tiny")


def learned_examples() -> list[Example]:
    record, tokenizer = task("LaMP_2N"), load_tokenizer(MODEL)
    users = split(lamp.read(ROOT / "data/sample/lamp", record), record, Split(test_users="dev")).test
    context = Context(record, parse_augmentation("k0"), tokenizer, tokenizer.eos_token_id, 512, 0)
    return history_examples(context, max(users, key=lambda user: len(user.history)), None, Counter())


def loss(model: PreTrainedModel, examples: list[Example]) -> float:
    """Mean over all target tokens."""
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.prompt + example.target])
        logits = model(ids).logits[0, len(example.prompt) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(example.target), reduction="sum").item()
        count += len(example.target)
    return total / count


def moved_by(model: PreTrainedModel, bank: LoraBank) -> float:
    state, shares = bank.state_dict(0), []
    for name, linear in target_linears(model, bank.target_modules).items():
        a, b = (state[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        shares.append((bank.alpha / bank.rank * (b @ a).norm() / linear.weight.norm()).item())
    return sum(shares) / len(shares)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model, examples = load_model(MODEL), learned_examples()
    paper = Config().lora("LaMP_2N")
    released = {"epochs": 2, "lr": 1e-4, "weight_decay": 1e-2, "batch_size": 16, "max_grad_norm": 0.3}
    demo = {"epochs": 2, "lr": 3e-2, "batch_size": 4}
    settings = {"Table 4": {}, "released code": released, "demo (chosen on held-out base users)": demo}
    with torch.no_grad():
        print(f"{len(examples)} items, loss {loss(model, examples):.4f}")
    for name, changes in settings.items():
        lora = Lora(**paper.model_dump() | changes)
        bank = LoraBank(model, lora, 1, seed=0)
        steps = plan(len(examples), int(lora.epochs or 0), int(lora.batch_size or 0), "steps")
        (trained,) = train(model, bank, [examples], [steps], lora, Accelerator(cpu=True))
        with torch.no_grad(), bank.use(torch.tensor([0])):
            after = loss(model, examples)
        bank.close()
        print(f"{name}: lr {lora.lr:g}, {trained.steps} steps: moved {moved_by(model, bank):.1e}, loss {after:.4f}")


if __name__ == "__main__":
    main()
