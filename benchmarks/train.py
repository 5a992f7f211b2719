"""Training one adapter per user: Hugging Face's Trainer user by user, a plain PEFT loop user by user, and ours.

    python benchmarks/train.py --shape LaMP_2M --batch 4 --json train.json

* authors: the released code's way, with its data leak repaired: a Trainer per user, fp32, gradient checkpointing
* trainer: a Trainer per user at its fair best: one model load, no checkpointing, no logging or saving
* plain: a PEFT loop per user, in the same order of data as ours: its adapters are compared with ours
* ours: all users together; `--without` takes optimisations away one at a time, `--with` adds what is off by default

All sides train the same made-up users (Table 5's lengths) on the same random-weight model for the same number of
optimiser steps. `useful` in the JSON is what must be computed at least: 4 FLOPs per body parameter and token, each
user's shared beginning counted once per step.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from common import finish, histories, interleaved, model_of, parser, ratio, spread
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_linear_schedule_with_warmup
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from oppu import budget, models, training
from oppu.bank import LoraBank
from oppu.budget import checkpointed
from oppu.models import freeze
from oppu.rows import Chunk, Example, Piece, passes, plan
from oppu.training import train
from oppu.training_settings import Lora

Users = Sequence[Sequence[Example]]
Plans = list[list[list[int]]]


def padded(examples: Sequence[Example], device: torch.device | str) -> dict[str, torch.Tensor]:
    """A batch as everybody makes it: padded to its longest example, loss on the targets."""
    width = max(map(len, examples))
    ids = [[*e.prompt, *e.target, *[0] * (width - len(e))] for e in examples]
    labels = [[*[-100] * len(e.prompt), *e.target, *[-100] * (width - len(e))] for e in examples]
    mask = [[1] * len(e) + [0] * (width - len(e)) for e in examples]
    tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    return {name: torch.tensor(values, device=device) for name, values in tensors.items()}


def adapted(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """The model with one PEFT adapter whose parameters are float32."""
    config = LoraConfig(r=int(lora.rank or 0), lora_alpha=int(lora.alpha or 0), target_modules=["q_proj", "v_proj"])
    made = get_peft_model(copy.deepcopy(model), config)
    for parameter in made.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return made


class Start:
    """Resets a PEFT model's adapter to a bank's initial parameters before the next user."""

    def __init__(self, model: PeftModel, bank: LoraBank) -> None:
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.start = {n.replace(".weight", ".default.weight"): t for n, t in bank.state_dict(0).items()}

    def __call__(self) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.start[name])


def trainer_run(model: PeftModel, start: Start, users: Users, lora: Lora, checkpointing: bool) -> None:
    """Hugging Face's Trainer, user by user: no logging, no saving, batches of like length."""
    device = next(model.parameters()).device
    arguments = TrainingArguments(
        output_dir="unused",
        per_device_train_batch_size=int(lora.batch_size or 1),
        num_train_epochs=int(lora.epochs or 1),
        learning_rate=float(lora.lr or 0),
        weight_decay=float(lora.weight_decay or 0),
        max_grad_norm=lora.max_grad_norm,
        warmup_steps=lora.warmup,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        train_sampling_strategy="group_by_length",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
    )
    for examples in users:
        start()
        data = [{"input_ids": [*e.prompt, *e.target], "example": e} for e in examples]
        made = Trainer(
            model, arguments, train_dataset=data, data_collator=lambda rows: padded([r["example"] for r in rows], "cpu")
        )
        made.remove_callback(PrinterCallback)
        made.remove_callback(ProgressCallback)
        made.train()


def plain_run(model: PeftModel, start: Start, users: Users, plans: Plans, lora: Lora) -> list[dict[str, torch.Tensor]]:
    """A plain loop, user by user; the adapters."""
    model.train()
    adapters = []
    for examples, steps in zip(users, plans, strict=True):
        start()
        parameters = list(start.parameters.values())
        optimiser = torch.optim.AdamW(parameters, lr=float(lora.lr or 0), weight_decay=float(lora.weight_decay or 0))
        schedule = get_linear_schedule_with_warmup(optimiser, math.ceil(lora.warmup * len(steps)), len(steps))
        for step in steps:
            model(**padded([examples[n] for n in step], parameters[0].device), use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, lora.max_grad_norm)
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()
        adapters.append({n: p.detach().cpu().clone() for n, p in start.parameters.items()})
    return adapters


@contextlib.contextmanager
def whole_head(model: PreTrainedModel, positions: torch.Tensor) -> Iterator[None]:
    """The LM head at every position, as everybody runs it, and then the labels' logits chosen."""
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, __, out: out.flatten(0, 1)[positions])  # type: ignore[union-attr]
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def compiled(model: PreTrainedModel) -> Iterator[None]:
    """The layers' MLPs and norms through torch.compile: what the adapters' hooks leave whole."""
    chosen = [m for n, m in model.named_modules() if n.endswith(("mlp", "norm", "layernorm"))]
    try:
        for module in chosen:
            module.compile(dynamic=True)
        yield
    finally:
        for module in chosen:
            module._compiled_call_impl = None


WITHOUT: dict[str, Callable[[], Any]] = {
    "batching": contextlib.nullcontext,  # each user alone, one after the other
    "packing": lambda: mock.patch.object(budget, "passes", each_alone),  # each user's step a pass of its own
    "prefix": lambda: mock.patch.object(Chunk, "prefix", 0),  # every example carries its whole prompt
    "head": lambda: mock.patch.object(training, "head_at", whole_head),  # the LM head and last MLP at every position
    "last": lambda: mock.patch.object(models, "last_mlp", lambda _: None),  # the last MLP at every position
    "attention": lambda: mock.patch.object(training, "takes_blocks", lambda _: False),  # one mask for the whole line
}
WITH = ("checkpointing", "compile", "bfloat16")


def each_alone(chunks: Sequence[Chunk], tokens: int, parts: Sequence[Piece] | None = None) -> list[list[Piece]]:
    """No two users in one pass."""
    return [[piece] for pieces in passes(chunks, tokens, parts) for piece in pieces]


def ours_run(model: PreTrainedModel, users: Users, plans: Plans, lora: Lora, change: str = "") -> LoraBank:
    """Our trainer, with one optimisation taken away or added; the bank with everybody's adapters."""
    accelerator = Accelerator()
    if change == "bfloat16":
        model = freeze(copy.deepcopy(model).to(torch.bfloat16))
    bank = LoraBank(model, lora, len(users), seed=0)
    added = {"compile": compiled, "checkpointing": checkpointed}.get(change, lambda _: contextlib.nullcontext())
    with WITHOUT.get(change, contextlib.nullcontext)(), added(model):
        if change == "batching":
            for user, steps in enumerate(plans):
                train(model, bank, users, [steps if u == user else [] for u in range(len(users))], lora, accelerator)
        else:
            train(model, bank, users, plans, lora, accelerator)
    bank.close()
    return bank


def useful_flops(model: PreTrainedModel, users: Users, plans: Plans) -> float:
    """4 FLOPs per body parameter and token that must be computed, and the head's at the labels (attention left out)."""
    head = model.get_output_embeddings().weight.numel()  # type: ignore[union-attr,operator]
    body = sum(p.numel() for n, p in model.named_parameters() if p.ndim > 1 and "embed" not in n and "lm_head" not in n)
    total = 0.0
    for examples, steps in zip(users, plans, strict=True):
        for step in steps:
            chunk = Chunk(0, tuple(examples[n] for n in step))
            total += 4.0 * (body * chunk.tokens + head * chunk.labels)
    return total


def main() -> None:
    arguments = parser(__doc__)
    add = arguments.add_argument
    add("--shape", default="LaMP_2M", help="task whose Table 5 lengths the made-up users have (LaMP_2M, LaMP_3, …)")
    add("--batch", type=int, default=4, help="examples per optimiser step (4)")
    add("--users", type=int, default=8, help="number of users (8)")
    add("--items", type=float, help="mean history items per user (Table 5's)")
    add("--epochs", type=int, default=1, help="epochs (1)")
    add("--model", choices=["tiny", "1b", "llama-2-7b"], default="tiny", help="shape of the random-weight model")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, help="torch's threads on the CPU (all cores)")
    add("--tokens", type=int, help="our token budget of one pass (found from free memory)")
    add("--sides", nargs="*", default=["authors", "trainer", "plain"], choices=["authors", "trainer", "plain"])
    add("--without", nargs="*", default=[], choices=list(WITHOUT), help="ours less an optimisation, each a side")
    add(
        "--with", dest="more", nargs="*", default=[], choices=WITH, help="ours with what is off by default, each a side"
    )
    options: argparse.Namespace = arguments.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = model_of(options.model, options.dtype, options.device)
    lora = Lora(
        rank=8, alpha=8, lr=1e-4, weight_decay=1e-2, epochs=options.epochs, batch_size=options.batch,
        max_grad_norm=0.3, tokens_per_batch=options.tokens,
    )  # fmt: skip
    users = histories(options.shape, options.users, 0, model.config.vocab_size, items=options.items)
    plans = [plan(len(own), options.epochs, options.batch, str(user)) for user, own in enumerate(users)]
    bank = LoraBank(model, lora, 1, seed=0)
    sides: dict[str, Callable[[], object]] = {}
    results: dict[str, Any] = {}
    if {"trainer", "plain"} & set(options.sides):
        tuned = adapted(model, lora)
        start = Start(tuned, bank)
    if "authors" in options.sides:
        exact = adapted(model.float() if options.dtype != "float32" else model, lora)
        if options.dtype != "float32":
            model.to(getattr(torch, options.dtype))
        from_start = Start(exact, bank)
        exact.enable_input_require_grads()
        sides["authors"] = lambda: trainer_run(exact, from_start, users, lora, checkpointing=True)
    bank.close()
    if "trainer" in options.sides:
        sides["trainer"] = lambda: trainer_run(tuned, start, users, lora, checkpointing=False)
    if "plain" in options.sides:
        sides["plain"] = lambda: results.update(plain=plain_run(tuned, start, users, plans, lora))
    for word, names in (("without", options.without), ("with", options.more)):
        for name in names:
            sides[f"ours {word} {name}"] = lambda name=name: ours_run(model, users, plans, lora, name)
    sides["ours"] = lambda: results.update(ours=ours_run(model, users, plans, lora))

    tokens = sum(len(users[u][n]) for u, steps in enumerate(plans) for step in steps for n in step)
    sys.stdout.write(f"{options.shape}, {options.users} users, {sum(map(len, users))} items, {tokens} example tokens,"
                     f" {sum(map(len, plans))} steps of {options.batch};"
             f" model {options.model} in {options.dtype}\n")  # fmt: skip
    seconds = interleaved(sides, options.repeats)
    ratios = {f"{name}/ours": ratio(taken, seconds["ours"]) for name, taken in seconds.items() if name != "ours"}
    flops = useful_flops(model, users, plans)
    best = spread(seconds["ours"])
    sys.stdout.write(
        f"ours: {tokens / best['median']:,.0f} example tokens/s, {flops / best['median'] / 1e12:.3g} useful TFLOP/s\n"
    )
    more = {"tokens": tokens, "useful_flops": flops, "useful_tflops": flops / best["median"] / 1e12}
    if "plain" in results:
        ours = [results["ours"].state_dict(user) for user in range(len(users))]
        apart = max(
            (ours[u][n.replace(".default.weight", ".weight")] - t).abs().max().item()
            for u, adapter in enumerate(results["plain"]) for n, t in adapter.items()
        )  # fmt: skip
        sys.stdout.write(f"largest difference of any parameter between plain and ours: {apart:.2g}\n")
        more["plain_to_ours"] = apart
    finish(options, {name: spread(taken) for name, taken in seconds.items()}, ratios, **more)


if __name__ == "__main__":
    main()
