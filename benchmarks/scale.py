"""Cost per user as the cohort grows: time and memory of training 1 to 1,000 personal adapters together.

    python benchmarks/scale.py --json scale.json                            on a CPU: 1, 10, 100 and 1,000 users
    python benchmarks/scale.py --device cuda --dtype bfloat16               on a GPU: 1, 16, 64 and 256 users

Every size trains users with the same few histories over and over, in cohorts of that size, at least --least users a
run; so a ratio compares the same work. Sizes are timed in turn. A cohort's time counts everything that it needs but
the model: bank, optimisers, batches. Memory is the most that a process of its own took for one cohort, less the model:
resident set on a CPU, tensors on a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from common import SHAPES, finish, histories, interleaved, model_of, parser, ratio, show, spread
from transformers import PreTrainedModel

from oppu.bank import LoraBank
from oppu.config import Config
from oppu.rows import Example, plan
from oppu.training import train
from oppu.training_settings import Lora

SIZES = {"cpu": [1, 10, 100, 1000], "cuda": [1, 16, 64, 256]}
MIB = 2**20


def settings(options: argparse.Namespace) -> Lora:
    """Table 4's settings of the task, with one epoch and a learning rate that moves something."""
    changes = {"epochs": 1, "lr": 1e-3, "tokens_per_batch": options.tokens_per_batch}
    return Config().lora(options.task).model_copy(update=changes)


def train_cohort(
    model: PreTrainedModel, examples: list[list[Example]], lora: Lora, accelerator: Accelerator, first: int = 0
) -> None:
    """Train one adapter per list of examples; users are numbered from `first`, by which their order is drawn."""
    bank = LoraBank(model, lora, len(examples), seed=0)
    plans = [
        plan(len(own), int(lora.epochs or 0), int(lora.batch_size or 0), f"user {user}")
        for user, own in enumerate(examples, start=first)
    ]
    trained = train(model, bank, examples, plans, lora, accelerator)
    bank.close()
    if failed := [one.error for one in trained if one.error]:
        raise failed[0]


def resident() -> tuple[float, float]:
    """MiB of this process that are resident now, and that were at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return tuple(int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))


def peak(options: argparse.Namespace, users: int) -> float:
    """MiB that a cohort takes at most beside the model, in a process that has done nothing before."""
    lora, accelerator = settings(options), Accelerator(cpu=options.device == "cpu")
    model = model_of(options.shape, options.dtype, options.device)
    before = torch.cuda.memory_allocated() / MIB if options.device == "cuda" else resident()[0]
    own = made(options, model)
    train_cohort(model, [own[user % options.distinct] for user in range(users)], lora, accelerator)
    return (torch.cuda.max_memory_allocated() / MIB if options.device == "cuda" else resident()[1]) - before


def made(options: argparse.Namespace, model: PreTrainedModel) -> list[list[Example]]:
    return histories(options.task, options.distinct, options.seed, model.config.vocab_size, items=options.items)


def read_options() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--users", type=int, nargs="+", help="sizes of cohort (1 10 100 1000; GPU: 1 16 64 256)")
    arguments.add_argument("--distinct", type=int, help="different histories (the second size)")
    arguments.add_argument("--least", type=int, help="users that every run trains at least (the third size)")
    arguments.add_argument("--task", default="LaMP_2M", help="whose lengths and batch size (LaMP_2M)")
    arguments.add_argument("--items", type=float, help="mean items of a history (CPU: 8; GPU: Table 5's)")
    arguments.add_argument("--tokens-per-batch", type=int, default=4096, help="tokens of a pass (4096)")
    arguments.add_argument("--shape", choices=SHAPES, default="tiny", help="shape of the random base (tiny)")
    arguments.add_argument("--dtype", default="float32", help="dtype of the base (float32)")
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where it runs (cpu)")
    arguments.add_argument("--seed", type=int, default=0, help="seed of the histories (0)")
    options = arguments.parse_args()
    options.users = sorted(options.users or SIZES[options.device])
    options.distinct = options.distinct or options.users[min(1, len(options.users) - 1)]
    options.least = options.least or options.users[min(2, len(options.users) - 1)]
    options.items = options.items or (8.0 if options.device == "cpu" else None)
    if bad := [users for users in options.users if trained_in_a_run(options, users) % options.distinct]:
        arguments.error(f"--users {bad}: a run would not train all {options.distinct} --distinct histories as often")
    return options


def trained_in_a_run(options: argparse.Namespace, users: int) -> int:
    return users * -(-options.least // users)


def main() -> int:
    options = read_options()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = [pool.apply(peak, (options, users)) for users in options.users]
    lora, accelerator = settings(options), Accelerator(cpu=options.device == "cpu")
    model = model_of(options.shape, options.dtype, options.device)
    own = made(options, model)

    def run(users: int) -> None:
        for first in range(0, trained_in_a_run(options, users), users):
            cohort = [own[user % options.distinct] for user in range(first, first + users)]
            train_cohort(model, cohort, lora, accelerator, first)

    train_cohort(model, own[:1], lora, accelerator)  # what the first run of a process pays, no size shall pay
    found = interleaved({users: lambda users=users: run(users) for users in options.users}, options.repeats, warm=False)
    per_user = {n: [value / trained_in_a_run(options, n) for value in values] for n, values in found.items()}
    tokens = sum(len(example) for examples in own for example in examples) / len(own)
    usual, most = options.distinct, options.users[-1]
    rows = [
        [n, spread(per_user[n])["median"], 1e6 * spread(per_user[n])["median"] / tokens, mib, 1024 * mib / n]
        for n, mib in zip(options.users, peaks, strict=True)
    ]
    show(["users", "s per user", "us per token", "peak MiB", "KiB per user"], rows)
    ratios = {f"cost-per-user-{n}/{usual}": ratio(per_user[n], per_user[usual]) for n in options.users if n != usual}
    finish(
        options,
        {f"per user, {n} together": spread(values) for n, values in per_user.items()},
        ratios,
        tokens_per_user=tokens,
        peak_mib=dict(zip(map(str, options.users), peaks, strict=True)),
        kib_per_further_user=1024 * (peaks[-1] - peaks[0]) / max(most - options.users[0], 1),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
