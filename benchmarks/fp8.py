"""What a float8 base does to personal adapters: how far they move, and which answers change, beside what bf16 does.

    python benchmarks/fp8.py --users 10 --json fp8.json

The sample's LaMP_2N users with the longest histories learn their newest items on data/models/oppu-tiny with the demo's
settings, from the same start on each base. Against the float32 base, median over users: the distance of what was
learned (alpha/r B A of every layer, in one vector) over its length, and the cosine; the share of answers that differ;
accuracy. For scale, `another order` is float32 again with each user's items in another order. The variants show what
each choice costs: e5m2 gradients, the backward pass alone or the forward pass alone, a kind of layer left in float32.
The CPU computes with the same 8-bit numbers as CUDA does, so the effect is the same; the speed is not.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from oppu import float8, lamp
from oppu.bank import LoraBank
from oppu.config import Generation, Split, load, parse_augmentation
from oppu.examples import Context, history_examples, query_prompts
from oppu.generation import generate
from oppu.models import load_model, load_tokenizer
from oppu.rows import Example, plan
from oppu.split import split
from oppu.tasks import task
from oppu.training import train
from oppu.training_settings import Lora

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "data/models/oppu-tiny")
Learned = list[Tensor]


class Data:
    """Examples and queries of the users with the longest histories."""

    def __init__(self, users: int, items: int) -> None:
        record, tokenizer = task("LaMP_2N"), load_tokenizer(MODEL)
        found = split(lamp.read(ROOT / "data/sample/lamp", record), record, Split(test_users="dev")).test
        chosen = sorted(found, key=lambda user: (-len(user.history), user.key))[:users]
        context = Context(record, parse_augmentation("k0"), tokenizer, tokenizer.eos_token_id, 512, 0)
        self.tokenizer = tokenizer
        self.examples = [history_examples(context, user, None, Counter(), items) for user in chosen]
        asked = [
            (row, query.gold, tokens)
            for row, user in enumerate(chosen)
            for query, _, tokens in query_prompts(context, user, None, 8, Counter())
        ]
        self.users, self.golds, self.prompts = map(list, zip(*asked, strict=True))


def run(model: PreTrainedModel, data: Data, lora: Lora, order: str = "0") -> tuple[Learned, list[str]]:
    """What every user's adapter adds to the layers, as one vector each, and all answers."""
    bank = LoraBank(model, lora, len(data.examples), seed=0)
    steps = [
        plan(len(examples), int(lora.epochs or 0), int(lora.batch_size or 0), f"{order} {user}")
        for user, examples in enumerate(data.examples)
    ]
    trained = train(model, bank, data.examples, steps, lora, Accelerator(cpu=True))
    assert all(one.error is None for one in trained)
    answers = generate(model, data.tokenizer, data.prompts, Generation(), 8, bank, data.users)
    learned = []
    for user in range(len(bank)):
        state = bank.state_dict(user)
        pairs = [(state[n], state[n.replace("lora_A", "lora_B")]) for n in state if "lora_A" in n]
        learned.append(torch.cat([(b @ a).double().flatten() for a, b in pairs]))
    bank.close()
    return learned, answers


def loss(model: PreTrainedModel, examples: list[list[Example]]) -> float:
    """Mean over the users' target tokens, no adapter."""
    total, count = 0.0, 0
    for example in (e for own in examples for e in own):
        logits = model(torch.tensor([example.prompt + example.target])).logits[0, len(example.prompt) - 1 : -1]
        total += F.cross_entropy(logits.float(), torch.tensor(example.target), reduction="sum").item()
        count += len(example.target)
    return total / count


@contextmanager
def coarse_gradients() -> Iterator[None]:
    """Gradients as e5m2: wider range, two bits of mantissa instead of three."""
    plain = float8._Frozen.backward

    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        with patch.object(float8, "FLOAT8", torch.float8_e5m2), patch.object(float8, "LARGEST", 57344.0):
            return plain(ctx, grad)

    with patch.object(float8._Frozen, "backward", staticmethod(backward)):
        yield


class OnlyForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(values, scale)
        return float8.product(float8.rounded(x), float8.Rounded(values, scale), x.dtype)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None, None]:
        values, scale = ctx.saved_tensors
        return grad @ (values.float() * scale).to(grad.dtype), None, None


class OnlyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(values, scale)
        return F.linear(x, (values.float() * scale).to(x.dtype))

    backward = float8._Frozen.backward


class OnlyWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(values, scale)
        return F.linear(x, (values.float() * scale).to(x.dtype))

    backward = OnlyForward.backward


def without(kind: str) -> Callable[[], PreTrainedModel]:
    """A float8 model whose layers of one name are left in float32."""

    def load_it() -> PreTrainedModel:
        model, whole = load_model(MODEL, quantization="fp8"), load_model(MODEL)
        for name, layer in list(whole.named_modules()):
            if name.endswith(kind):
                model.set_submodule(name, layer)
        return model

    return load_it


def bases() -> dict[str, tuple[Callable[[], PreTrainedModel], Callable[[], object] | None]]:
    fp8 = lambda: load_model(MODEL, quantization="fp8")  # noqa: E731
    swap = lambda function: lambda: patch.object(float8, "_Frozen", function)  # noqa: E731
    return {
        "bf16": (lambda: load_model(MODEL, dtype="bfloat16"), None),
        "fp8": (fp8, None),
        "fp8, rest bf16": (lambda: load_model(MODEL, dtype="bfloat16", quantization="fp8"), None),
        "fp8, e5m2 gradients": (fp8, coarse_gradients),
        "fp8, weights only": (fp8, swap(OnlyWeights)),
        "fp8, no backward": (fp8, swap(OnlyForward)),
        "fp8, no forward": (fp8, swap(OnlyBackward)),
        "fp8 but down_proj": (without("down_proj"), None),
        "fp8 but o_proj": (without("o_proj"), None),
        "fp8 but q_proj": (without("q_proj"), None),
        "fp8 but v_proj": (without("v_proj"), None),
        "fp8 but gate_proj": (without("gate_proj"), None),
    }


def compare(learned: Learned, exact: Learned) -> dict[str, float]:
    far = [((a - b).norm() / b.norm()).item() for a, b in zip(learned, exact, strict=True)]
    cosines = [F.cosine_similarity(a, b, dim=0).item() for a, b in zip(learned, exact, strict=True)]
    return {"distance": statistics.median(far), "max_distance": max(far), "cosine": statistics.median(cosines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=10)
    parser.add_argument("--items", type=int, default=32, help="each user's newest items to learn from")
    parser.add_argument("--lr", type=float, default=3e-2, help="peak learning rate (the demo's: 3e-2)")
    parser.add_argument("--only", nargs="*", help="of the variants, these only")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    data = Data(arguments.users, arguments.items)
    settings = {"lr": arguments.lr, "epochs": 2, "batch_size": 4, "tokens_per_batch": 2048}
    lora = load({"personal": settings}).lora("LaMP_2N")
    whole = load_model(MODEL)
    exact, answers = run(whole, data, lora)
    with torch.no_grad():
        rows = {"float32": {"loss_before": loss(whole, data.examples)} | scored(answers, answers, data)}
    learned, other = run(whole, data, lora, order="1")
    rows["another order"] = compare(learned, exact) | scored(other, answers, data)
    for name, (load_it, changed) in bases().items():
        if arguments.only and name not in arguments.only:
            continue
        model = load_it()
        with changed() if changed else patch.dict({}):  # type: ignore[attr-defined]
            learned, other = run(model, data, lora)
            with torch.no_grad():
                before = {"loss_before": loss(model, data.examples)}
        rows[name] = before | compare(learned, exact) | scored(other, answers, data)
    columns = ["distance", "max_distance", "cosine", "changed", "accuracy", "loss_before"]
    print(
        f"{len(data.examples)} users, {sum(map(len, data.examples))} items, {len(data.prompts)} queries, lr {lora.lr}"
    )
    print(f"{'':22}" + "".join(f"{c:>14}" for c in columns))
    for name, row in rows.items():
        print(f"{name:22}" + "".join(f"{row[c]:14.4f}" if c in row else f"{'-':>14}" for c in columns))
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


def scored(found: list[str], answers: list[str], data: Data) -> dict[str, float]:
    right = [a == gold for a, gold in zip(found, data.golds, strict=True)]
    changed = [a != b for a, b in zip(found, answers, strict=True)]
    return {"changed": sum(changed) / len(changed), "accuracy": sum(right) / len(right)}


if __name__ == "__main__":
    main()
