from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import PreTrainedModel

from oppu.bank import LoraBank
from oppu.records import InputError
from oppu.rows import Example, plan
from oppu.training import Trained, train
from oppu.training_settings import Lora
from tests.oracle import distance, train_alone
from tests.tiny_models import settings, some_examples, tiny_llama

BOUND = {torch.float64: 1e-12, torch.float32: 1e-4}
COUNTS = [9, 5, 0, 13, 4]


def plans_of(examples: list[list[Example]], keys: list[int]) -> list[list[list[int]]]:
    return [plan(len(e), 2, 4, f"0 LaMP_x user {key}") for e, key in zip(examples, keys, strict=True)]


def cohort(model: PreTrainedModel, lora: Lora, users: list[int]) -> tuple[dict[int, dict[str, Tensor]], list[Trained]]:
    """Train these users of the fixed five together; adapters by user."""
    everyone = some_examples(1, COUNTS)
    examples = [everyone[u] for u in users]
    bank = LoraBank(model, lora, len(users), seed=3)
    results = train(model, bank, examples, plans_of(examples, users), lora, Accelerator(cpu=True), seeds=users)
    bank.close()
    return {user: bank.state_dict(place) for place, user in enumerate(users)}, results


def test_plans_shuffle_every_epoch_and_keep_the_short_batch() -> None:
    steps = plan(10, 2, 4, "a")
    assert [len(s) for s in steps] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*steps[:3])) == sorted(chain(*steps[3:])) == list(range(10))
    assert steps[:3] != steps[3:]
    assert steps == plan(10, 2, 4, "a") != plan(10, 2, 4, "b")
    assert plan(0, 3, 4, "a") == []
    # The order decides adapters: it must not change with a version.
    assert plan(5, 1, 3, "golden") == [[4, 0, 2], [3, 1]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "o_proj", "up_proj", "down_proj"]])
def test_a_cohort_equals_peft_one_user_at_a_time(dtype: torch.dtype, targets: list[str]) -> None:
    model, lora = tiny_llama(dtype), settings(target_modules=targets)
    start = LoraBank(model, lora, 1, seed=3).state_dict(0)
    examples = some_examples(1, COUNTS)
    together, results = cohort(model, lora, [0, 1, 2, 3, 4])
    for user, steps in enumerate(plans_of(examples, list(range(5)))):
        alone = train_alone(model, start, examples[user], steps, lora)
        assert distance(together[user], alone) < BOUND[dtype]
        assert (distance(together[user], start) > 1e-3) == bool(steps)
        assert results[user].steps == len(steps)
        assert results[user].error is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_order_company_and_budget_change_nothing(dtype: torch.dtype) -> None:
    model = tiny_llama(dtype)
    together, _ = cohort(model, settings(), [0, 1, 2, 3, 4])
    others = [
        cohort(model, settings(), [3]),
        cohort(model, settings(), [4, 0, 3, 2, 1]),
        cohort(model, settings(tokens_per_batch=40), [0, 3, 4]),
        cohort(model, settings(tokens_per_batch=100_000), [0, 1, 3]),
        cohort(model, settings(tokens_per_batch=1), [1, 3]),
    ]
    for adapters, _ in others:
        for user, adapter in adapters.items():
            assert distance(adapter, together[user]) < BOUND[dtype]


class Short:
    """A model that runs out of memory above so many tokens, in the forward pass or in the backward pass."""

    def __init__(self, model: PreTrainedModel, room: int, backward: bool) -> None:
        self.room, self.backward, self.checkpoints, self.refused = room, backward, 0, 0
        layer = model.get_decoder().layers[0]
        self.handles = [model.register_forward_pre_hook(self.enter, with_kwargs=True)]
        self.handles.append(layer.register_forward_hook(self.leave))
        self.layer = layer

    def enter(self, _: object, args: object, kwargs: dict[str, Tensor]) -> None:
        spared = 2 if "forward" in vars(self.layer) else 1
        self.checkpoints += spared - 1
        self.over = kwargs["input_ids"].numel() > self.room * spared
        if self.over and not self.backward:
            self.fail()

    def leave(self, _: object, args: object, out: Tensor) -> None:
        if self.over and self.backward and out.requires_grad:
            out.register_hook(lambda _: self.fail())

    def fail(self) -> None:
        self.refused += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("backward", [False, True])
def test_running_out_of_memory_changes_nothing(backward: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, users = tiny_llama(torch.float64), [0, 1, 3]
    plain, _ = cohort(model, settings(dropout=0.3, tokens_per_batch=100_000), users)
    for room, spared in ((100, False), (20, True)):
        short = Short(model, room, backward)
        adapters, results = cohort(model, settings(dropout=0.3, tokens_per_batch=100_000), users)
        short.close()
        assert short.refused
        assert (short.checkpoints > 0) == spared
        assert all(one.error is None for one in results)
        for user, adapter in adapters.items():
            assert distance(adapter, plain[user]) < 1e-12
    assert "from here on at most" in caplog.text
    short = Short(model, 8, backward)
    with pytest.raises(InputError, match=r"an example of .* does not fit into memory"):
        cohort(model, settings(), users)
    short.close()


def test_the_same_run_gives_the_same_bits() -> None:
    model = tiny_llama()
    (first, one), (second, two) = (cohort(model, settings(), [0, 1, 3]) for _ in range(2))
    assert all(distance(first[u], second[u]) == 0 for u in first)
    assert one == two


def test_dropout_depends_on_the_user_alone() -> None:
    model = tiny_llama(torch.float64)
    lora = settings(dropout=0.3)
    together, _ = cohort(model, lora, [0, 1, 2, 3, 4])
    without, _ = cohort(model, settings(), [0, 1, 2, 3, 4])
    assert distance(together[3], without[3]) > 1e-4
    for adapters, _ in (
        cohort(model, lora, [3]),
        cohort(model, lora, [4, 3, 1]),
        cohort(model, settings(dropout=0.3, tokens_per_batch=40), [3, 0]),
    ):
        assert distance(adapters[3], together[3]) < 1e-12


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_user_that_is_not_finite_fails_alone(value: float) -> None:
    """NaN from the start, and parameters that overflow only within the forward pass, in a row shared with others."""
    model, lora = tiny_llama(), settings()
    healthy, _ = cohort(model, lora, [0, 1, 2, 3, 4])
    examples = some_examples(1, COUNTS)
    bank = LoraBank(model, lora, 5, seed=3)
    bank.weights[1] = value
    results = train(model, bank, examples, plans_of(examples, list(range(5))), lora, Accelerator(cpu=True))
    assert [r.error is None for r in results] == [True, False, True, True, True]
    assert isinstance(results[1].error, FloatingPointError)
    assert "step 1 of 4" in str(results[1].error)
    for user in (0, 2, 3, 4):
        assert distance(bank.state_dict(user), healthy[user]) < 1e-4


def test_progress_is_told() -> None:
    told: list[tuple[int, int, int]] = []
    examples = some_examples(1, [5, 3])
    model, lora = tiny_llama(), settings()
    bank = LoraBank(model, lora, 2, seed=0)
    train(model, bank, examples, plans_of(examples, [0, 1]), lora, Accelerator(cpu=True), lambda *a: told.append(a))
    assert told[-1] == (6, 6, 2 * sum(len(e) for several in examples for e in several))
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)


@pytest.fixture
def autocast() -> Iterator[Callable[[], Accelerator]]:
    """Makes the accelerator late: its state is the process's, and would hold for every other one too."""
    AcceleratorState._reset_state(reset_partial_state=True)

    def start() -> Accelerator:
        AcceleratorState._reset_state(reset_partial_state=True)
        return Accelerator(cpu=True, mixed_precision="bf16")

    yield start
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_trains_float32_parameters(autocast: Callable[[], Accelerator], dtype: torch.dtype) -> None:
    """By autocast over a float32 model, and in a bfloat16 model: close to what float32 finds, and no closer."""
    lora = settings()
    exact, _ = cohort(tiny_llama(), lora, [0, 1])
    examples = some_examples(1, COUNTS)[:2]
    model = tiny_llama(dtype)
    bank = LoraBank(model, lora, 2, seed=3)
    results = train(model, bank, examples, plans_of(examples, [0, 1]), lora, autocast())
    assert bank.weights.dtype == torch.float32
    assert all(r.error is None for r in results)
    assert 1e-5 < distance(bank.state_dict(0), exact[0]) < 0.05


def test_missing_settings_are_refused() -> None:
    model = tiny_llama()
    bank = LoraBank(model, settings(dropout=0.1), 1, 0)
    with pytest.raises(ValueError, match="unset"):
        train(model, bank, [[]], [[]], Lora(rank=4), Accelerator(cpu=True))
    with pytest.raises(ValueError, match="seed per user"):
        train(model, bank, [[]], [[]], settings(dropout=0.1), Accelerator(cpu=True))
    with pytest.raises(ValueError, match="1 adapters, 2 example lists"):
        train(model, bank, [[], []], [[]], settings(), Accelerator(cpu=True), seeds=[0])
