"""Prediction, three ways in turn: adapter by adapter with PEFT, PEFT's mixed batches (`adapter_names`), and ours.

    python benchmarks/generate.py --users 100 --queries-per-user 4 --shape LaMP_2M --json generate.json

Adapter by adapter is at its fair best: one PeftModel with all adapters loaded, and all of a user's queries in one batch
of transformers' `generate`. Prompts are random tokens with the paper's Table 5 lengths (words times 1.3, log-normal,
cv 0.8) behind the task's instruction; adapters are random, so that users' answers differ. All three must give the same
tokens; the answers that differ are counted (with float32, two logits within rounding; bfloat16 rounds more).
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import random
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from common import CV, FACTOR, ROOT, SHAPES, finish, interleaved, model_of, parser, ratio, spread
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import GenerationConfig, PreTrainedModel

from oppu.bank import LoraBank
from oppu.cache import left_padded
from oppu.decoding import Asked, batches, decode
from oppu.models import load_model
from oppu.tasks import task as task_named
from oppu.training_settings import Lora

Answers = list[list[int]]


@dataclass(frozen=True)
class Work:
    """What all three ways are given."""

    asked: Asked
    ends: Collection[int]
    limit: int
    budget: int


def prompts_of(shape: str, users: int, queries: int, vocabulary: int) -> list[list[int]]:
    """Per user so many prompts: the task's instruction, the same for all, and behind it random tokens."""
    with (ROOT / "data/paper/table5.csv").open(encoding="utf-8") as f:
        words = {row["task"]: float(row["personal_in_tokens"]) for row in csv.DictReader(f)}[shape]
    draw = random.Random(0)
    instruction = round(FACTOR * len(task_named(shape).prompt.partition("{")[0].split()))
    prefix = [1, *draw.choices(range(3, vocabulary), k=instruction)]
    sigma = math.log(1 + CV**2) ** 0.5
    mean = math.log(max(FACTOR * words - instruction, 1)) - sigma**2 / 2
    sizes = [max(round(draw.lognormvariate(mean, sigma)), 1) for _ in range(users * queries)]
    return [prefix + draw.choices(range(3, vocabulary), k=min(size, 800)) for size in sizes]


def peft_of(model: PreTrainedModel, bank: LoraBank) -> PeftModel:
    """A PeftModel with every adapter of the bank, on modules of its own that share the model's weights."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    config = LoraConfig(r=bank.rank, lora_alpha=int(bank.alpha), target_modules=bank.target_modules)
    made = copy.deepcopy(model, shared)
    for module in made.modules():
        module._forward_hooks.clear()  # the bank's
    peft = get_peft_model(made, config, adapter_name="0", autocast_adapter_dtype=False)
    for user in range(len(bank)):
        if user:
            peft.add_adapter(str(user), config, autocast_adapter_dtype=False)
        set_peft_model_state_dict(peft, bank.state_dict(user), adapter_name=str(user))
    return peft.eval().requires_grad_(False)


def by_transformers(peft: PeftModel, work: Work, numbers: Sequence[int], **more: object) -> Answers:
    """One left-padded batch through `generate`; answers end at their first end token."""
    prompts = [work.asked.prompts[n] for n in numbers]
    ids = left_padded(prompts, 0, peft.device)
    settings = GenerationConfig(
        max_new_tokens=work.limit, do_sample=False, eos_token_id=list(work.ends) or None, pad_token_id=0
    )
    with torch.inference_mode():
        out = peft.generate(
            input_ids=ids,
            attention_mask=left_padded([[1] * len(p) for p in prompts], 0, peft.device),
            generation_config=settings,
            **more,
        )
    return [_ended(answer, work.ends) for answer in out[:, ids.shape[1] :].tolist()]


def _ended(answer: list[int], ends: Collection[int]) -> list[int]:
    stop = next((n for n, token in enumerate(answer, start=1) if token in ends), len(answer))
    return answer[:stop]


def one_by_one(peft: PeftModel, work: Work) -> Answers:
    """Adapter by adapter, all of a user's queries in one batch."""
    answers: Answers = [[] for _ in work.asked.prompts]
    users = work.asked.users or []
    for user in dict.fromkeys(users):
        numbers = [n for n, owner in enumerate(users) if owner == user]
        peft.set_adapter(str(user))
        for number, answer in zip(numbers, by_transformers(peft, work, numbers), strict=True):
            answers[number] = answer
    return answers


def adapter_names(peft: PeftModel, work: Work) -> Answers:
    """Mixed batches of like length, as large as ours."""
    answers: Answers = [[] for _ in work.asked.prompts]
    users = work.asked.users or []
    for batch in batches([len(p) for p in work.asked.prompts], work.budget):
        names = [str(users[n]) for n in batch]
        for number, answer in zip(batch, by_transformers(peft, work, batch, adapter_names=names), strict=True):
            answers[number] = answer
    return answers


def ours(work: Work, share: bool) -> Answers:
    """As `oppu.generation.generate` does it, between tokens and tokens."""
    with torch.inference_mode():
        return decode(
            work.asked, lambda _, logits: logits.float().argmax(-1), work.ends, work.limit, work.budget, share
        )


def ours_by_transformers(work: Work) -> Answers:
    """The bank around transformers' `generate`, one padded batch at a time."""
    answers: Answers = [[] for _ in work.asked.prompts]
    for batch in batches([len(p) for p in work.asked.prompts], work.budget):
        with work.asked.adapters(batch):
            for number, answer in zip(batch, by_transformers(work.asked.model, work, batch), strict=True):
                answers[number] = answer
    return answers


def prepared(options: argparse.Namespace) -> tuple[Work, PeftModel]:
    """Model, adapters and prompts, from the options."""
    device = torch.device(options.device)
    if options.model in SHAPES:
        model = model_of(options.model, options.dtype, str(device))
    else:
        model = load_model(options.model, dtype=options.dtype, device=device)
    model.generation_config.eos_token_id = None  # `mean_answer` alone says what ends an answer
    vocabulary = model.config.vocab_size
    prompts = prompts_of(options.shape, options.users, options.queries_per_user, vocabulary)
    bank = LoraBank(model, Lora(rank=8, alpha=8), options.users, seed=0)
    bank.weights.copy_(torch.randn(bank.weights.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    users = [user for user in range(options.users) for _ in range(options.queries_per_user)]
    limit = options.new_tokens or task_named(options.shape).output_tokens
    ends = range(0, vocabulary, options.mean_answer) if options.mean_answer else ()
    return Work(Asked(model, prompts, bank, users), ends, limit, options.tokens_per_batch), peft_of(model, bank)


def ways_of(options: argparse.Namespace, work: Work, peft: PeftModel) -> dict[str, Callable[[], Answers]]:
    """All ways that are asked for, ours among them."""
    ways: dict[str, Callable[[], Answers]] = {
        "one-by-one": lambda: one_by_one(peft, work),
        "adapter_names": lambda: adapter_names(peft, work),
        "ours": lambda: ours_by_transformers(work) if options.no_loop else ours(work, not options.no_prefix),
    }
    if options.each:
        ways["ours, no prefix"] = lambda: ours(work, False)
        ways["ours, no loop"] = lambda: ours_by_transformers(work)
    return {name: run for name, run in ways.items() if name not in options.without}


def parsed() -> argparse.Namespace:
    made = parser(__doc__)
    add = made.add_argument
    add("--users", type=int, default=100, help="users, each with an adapter (100)")
    add("--queries-per-user", type=int, default=4, help="queries of each user (4)")
    add("--shape", default="LaMP_2M", choices=["LaMP_2M", "LaMP_2N", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"])
    add("--new-tokens", type=int, help="longest answer in tokens (the task's own: 8 for LaMP_2M, 40 for LaMP_4)")
    add("--mean-answer", type=int, default=0, help="every M-th token of the vocabulary ends an answer (0: none does)")
    add("--model", default=str(ROOT / "data/models/oppu-tiny"), help=f"a folder, or random: {', '.join(SHAPES)}")
    add("--dtype", default="float32", help="float32, bfloat16 or float64 (float32)")
    add("--device", default=str(Accelerator().device), help="cpu, cuda (what accelerate finds)")
    add("--threads", type=int, help="torch's threads on the CPU")
    add("--tokens-per-batch", type=int, default=16384, help="prompt tokens of a mixed batch (16384)")
    add("--no-prefix", action="store_true", help="ours: read the shared instruction anew with every prompt")
    add("--no-loop", action="store_true", help="ours: transformers' generate in the place of our own loop")
    add("--each", action="store_true", help="also time ours without the prefix, and without the loop")
    add("--without", nargs="*", default=[], choices=["one-by-one", "adapter_names"], help="ways left out")
    options = made.parse_args()
    if min(options.users, options.queries_per_user) < 1:
        made.error("--users and --queries-per-user must be at least 1")
    return options


def main() -> int:
    options = parsed()
    if options.threads:
        torch.set_num_threads(options.threads)
    work, peft = prepared(options)
    ways = ways_of(options, work, peft)
    answers = {name: run() for name, run in ways.items()}
    differ = {n: sum(a != b for a, b in zip(found, answers["ours"], strict=True)) for n, found in answers.items()}
    del differ["ours"]
    seconds = interleaved(ways, options.repeats, warm=False)
    finish(
        options,
        {name: spread(values) for name, values in seconds.items()},
        {f"{name}/ours": ratio(seconds[name], seconds["ours"]) for name in ways if name != "ours"},
        answers=len(work.asked.prompts),
        answers_that_differ=differ,
        tokens={
            "prompt": sum(map(len, work.asked.prompts)),
            "answer": sum(map(len, answers["ours"])),
            "words_to_tokens": FACTOR,
        },
    )
    sys.stdout.write(f"answers that differ from ours, of {len(work.asked.prompts)}: {differ}\n")
    return 1 if options.dtype != "bfloat16" and any(differ.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
