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
import gc
import importlib.metadata
import json
import math
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel

from oppu.bank import LoraBank
from oppu.cache import left_padded
from oppu.config import Lora
from oppu.decoding import Asked, batches, decode
from oppu.models import freeze, load_model
from oppu.tasks import task as task_named

ROOT = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, int]] = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "llama-2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
FACTOR, CV = 1.3, 0.8
"""Tokens per whitespace word, roughly Llama's for English (Table 5 counts words); standard deviation over mean."""

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


def model_of(name: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """A model by folder, or one of SHAPES with random weights."""
    if name not in SHAPES:
        return load_model(name, dtype=dtype, device=device)
    torch.manual_seed(0)
    with device:
        return freeze(AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[name]), dtype=getattr(torch, dtype)))


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


def timed(run: Callable[[], Answers]) -> float:
    """Seconds of one run, until the device has nothing left to do."""
    gc.collect()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}


def prepared(options: argparse.Namespace) -> tuple[Work, PeftModel]:
    """Model, adapters and prompts, from the options."""
    model = model_of(options.model, options.dtype, options.device)
    model.generation_config.eos_token_id = None  # `mean_answer` alone says what ends an answer
    vocabulary = model.config.vocab_size
    prompts = prompts_of(options.shape, options.users, options.queries_per_user, vocabulary)
    bank = LoraBank(model, Lora(rank=8, alpha=8), options.users, seed=0)
    bank.weights.copy_(torch.randn(bank.weights.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    users = [user for user in range(options.users) for _ in range(options.queries_per_user)]
    limit = options.new_tokens or task_named(options.shape).output_tokens
    ends = range(0, vocabulary, options.mean_answer) if options.mean_answer else ()
    return Work(Asked(model, prompts, bank, users), ends, limit, options.tokens_per_batch), peft_of(model, bank)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of all ways and the ratios of runs taken in turn, after one run of each whose answers are compared."""
    work, peft = prepared(options)
    ways: dict[str, Callable[[], Answers]] = {
        "one-by-one": lambda: one_by_one(peft, work),
        "adapter_names": lambda: adapter_names(peft, work),
        "ours": lambda: ours(work, not options.no_prefix) if not options.no_loop else ours_by_transformers(work),
    }
    if options.each:
        ways["ours, no prefix"] = lambda: ours(work, False)
        ways["ours, no loop"] = lambda: ours_by_transformers(work)
    ways = {name: run for name, run in ways.items() if name not in options.without}
    answers = {name: run() for name, run in ways.items()}
    differ = {n: sum(a != b for a, b in zip(found, answers["ours"], strict=True)) for n, found in answers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, run in ways.items():
            seconds[name].append(timed(run))
    pairs = {name: zip(seconds[name], seconds["ours"], strict=True) for name in ways if name != "ours"}
    return {
        "ratios": {f"{name}/ours": spread([a / b for a, b in both]) for name, both in pairs.items()},
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "answers": len(work.asked.prompts),
        "answers_that_differ": {name: count for name, count in differ.items() if name != "ours"},
        "tokens": {
            "prompt": sum(map(len, work.asked.prompts)),
            "answer": sum(map(len, answers["ours"])),
            "words_to_tokens": FACTOR,
        },
        "machine": machine(),
    }


def table(result: dict[str, Any]) -> str:
    """Seconds and ratio of each way, one line each."""
    lines = [f"{'':18}{'seconds: min':>13}{'median':>9}{'max':>9}{'ratio: min':>12}{'median':>9}{'max':>9}  differ"]
    for name, seconds in result["seconds"].items():
        ratio = result["ratios"].get(f"{name}/ours")
        cells = [f"{name:18}", f"{seconds['min']:13.3f}{seconds['median']:9.3f}{seconds['max']:9.3f}"]
        if ratio:
            cells += [f"{ratio['min']:12.2f}{ratio['median']:9.2f}{ratio['max']:9.2f}"]
            cells += [f"  {result['answers_that_differ'][name]} of {result['answers']}"]
        lines.append("".join(cells))
    about = ", ".join(f"{name} {value}" for name, value in result["machine"].items() if value is not None)
    return "\n".join([*lines, about])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--users", type=int, default=100, help="users, each with an adapter (100)")
    add("--queries-per-user", type=int, default=4, help="queries of each user (4)")
    add("--shape", default="LaMP_2M", choices=["LaMP_2M", "LaMP_2N", "LaMP_3", "LaMP_4", "LaMP_5", "LaMP_7"])
    add("--new-tokens", type=int, help="longest answer in tokens (the task's own: 8 for LaMP_2M, 40 for LaMP_4)")
    add("--mean-answer", type=int, default=0, help="every M-th token of the vocabulary ends an answer (0: none does)")
    add(
        "--model",
        default=str(ROOT / "data/models/oppu-tiny"),
        help=f"folder, or of random weights: {', '.join(SHAPES)}",
    )
    add("--dtype", default="float32", help="float32, bfloat16 or float64 (float32)")
    add("--device", type=torch.device, default=Accelerator().device, help="cpu, cuda (what accelerate finds)")
    add("--threads", type=int, help="torch's threads on the CPU")
    add("--tokens-per-batch", type=int, default=16384, help="prompt tokens of a mixed batch (16384)")
    add("--no-prefix", action="store_true", help="ours: read the shared instruction anew with every prompt")
    add("--no-loop", action="store_true", help="ours: transformers' generate in the place of our own loop")
    add("--each", action="store_true", help="also time ours without the prefix, and without the loop")
    add("--without", nargs="*", default=[], choices=["one-by-one", "adapter_names"], help="ways left out")
    add("--repeats", type=int, default=3, help="timed runs of each way, at least 3 (3)")
    add("--json", type=Path, metavar="FILE", help="also write the result as JSON")
    options = parser.parse_args()
    if min(options.users, options.queries_per_user) < 1 or options.repeats < 3:
        parser.error("--users and --queries-per-user must be at least 1, --repeats at least 3")
    return options


def main() -> int:
    options = parsed()
    if options.threads:
        torch.set_num_threads(options.threads)
    result = compare(options)
    sys.stdout.write(table(result) + "\n")
    if options.json:
        given = {name: str(value) if value is not None else None for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"options": given} | result, indent=1) + "\n", encoding="utf-8")
    exact = options.dtype != "bfloat16"
    return 1 if exact and any(result["answers_that_differ"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
