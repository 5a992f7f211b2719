"""Passes that fit into memory: counted, halved when it runs out, and the same results either way."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from oppu import budget as module
from oppu.attention import attention_over
from oppu.bank import LoraBank
from oppu.budget import Budget, checkpointed, free_memory, out_of_memory, tokens_that_fit, training_bytes
from oppu.float8 import to_float8
from oppu.models import freeze, head_at
from oppu.packing import Packed, assemble
from oppu.records import InputError
from oppu.rows import Chunk, Piece, passes
from tests.tiny_models import CONFIGS, settings, some_examples, tiny_config, tiny_llama

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Machine:
    """Something that runs out of memory above so many tokens, as a GPU does or as the CPU's allocator does."""

    def __init__(self, room: int, cpu: bool = False) -> None:
        self.room, self.cpu = room, cpu
        self.passes: list[list[Piece]] = []
        self.spared = 0

    def run(self, pieces: Sequence[Piece]) -> None:
        if tokens_of(pieces) > self.room * (2 if self.spared else 1):
            if self.cpu:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 1")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.passes.append(list(pieces))

    @contextmanager
    def sparing(self) -> Iterator[None]:
        self.spared += 1
        yield
        self.spared -= 1


def tokens_of(pieces: Sequence[Piece]) -> int:
    return sum(piece.tokens for piece in pieces)


def chunks_of(counts: list[int]) -> list[Chunk]:
    return [Chunk(n, tuple(e)) for n, e in enumerate(some_examples(3, counts))]


def done(machine: Machine) -> list[tuple[int, int]]:
    return sorted((p.chunk, item) for pieces in machine.passes for p in pieces for item in p.items)


@pytest.mark.parametrize("cpu", [False, True])
def test_running_out_halves_says_so_and_does_everything(cpu: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Steps that were laid out together are cut anew, down to parts of one user's step."""
    machine, budget, chunks = Machine(60, cpu), Budget(1000), chunks_of([9, 4, 7])
    whole = sum(chunk.tokens for chunk in chunks)
    budget.passes(chunks, machine.run)
    assert done(machine) == [(c, item) for c, chunk in enumerate(chunks) for item in range(len(chunk.examples))]
    assert all(tokens_of(pieces) <= 60 for pieces in machine.passes)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings[0] == f"out of memory in a pass of {whole} tokens; from here on at most {whole // 2}"
    assert len(warnings) >= 3 and budget.tokens <= 60, "what was learned is kept for the next step"
    caplog.clear()
    budget.passes(chunks, machine.run)
    assert not caplog.records


def test_without_trouble_the_passes_are_those_of_the_plan() -> None:
    chunks, seen = chunks_of([6, 3, 8, 2, 5]), []
    Budget(90).passes(chunks, lambda pieces: seen.append(list(pieces)))
    assert seen == passes(chunks, 90)
    assert len({len(pieces) for pieces in seen}) > 1


def test_one_example_that_does_not_fit_is_checkpointed_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    chunks = chunks_of([1, 5])
    most = max(len(e) for chunk in chunks for e in chunk.examples)
    machine = Machine(most - 1)
    Budget(1000).passes(chunks, machine.run, machine.sparing)
    assert done(machine) == [(0, 0), *((1, item) for item in range(5))]
    assert f"a single example of {most} tokens; it is done with checkpoints" in caplog.text
    for sparing in (None, machine.sparing):
        with pytest.raises(
            InputError, match=r"^an example of \d+ tokens does not fit into memory, even alone; lower model"
        ):
            Budget(1000).passes(chunks, Machine(3).run, sparing)
    assert machine.spared == 0


def test_other_errors_are_no_lack_of_memory() -> None:
    def broken(_: Sequence[Piece]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        Budget(10).passes(chunks_of([5, 5]), broken)
    assert out_of_memory(RuntimeError("HIP out of memory."))
    assert not out_of_memory(ValueError("memory"))


REAL = """
import resource, torch
from oppu.budget import Budget
from oppu.rows import Chunk, Example
torch.ones(1)
resource.setrlimit(resource.RLIMIT_AS, (now := int(open("/proc/self/statm").read().split()[0]) * 4096 + 2**28, now))
sums, most = [], []
def run(pieces):
    items = sum(len(piece.items) for piece in pieces)
    kept = [torch.ones(items, 2**20) for _ in range(8)]  # 32 MiB per item: 8 of them are over the 256 MiB
    sums.append(sum(x.sum().item() for x in kept))
    most.append(items)
Budget(1000).passes([Chunk(0, (Example((1,), (2,)),) * 16)], run)
assert sum(sums) == 16 * 8 * 2**20, sums
assert max(most) < 16, most
"""


def test_the_allocators_own_refusal_is_survived() -> None:
    """A real one: under a limit of address space, 16 items of 32 MiB are done in parts."""
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "out of memory in a pass of 32 tokens" in done.stderr


def forward(model: torch.nn.Module, packed: Packed) -> Tensor:
    """The loss of one pass."""
    with attention_over(model, packed, blocks=True) as mask:
        logits = model(
            input_ids=packed.input_ids, position_ids=packed.position_ids, attention_mask=mask, use_cache=False
        ).logits
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), packed.targets)


def kept_by(model: torch.nn.Module, bank: LoraBank, checkpoints: bool = False) -> tuple[int, int]:
    """(bytes that a forward pass keeps for the backward pass, its tokens), as autograd itself says."""
    chunks = [Chunk(n, tuple(e)) for n, e in enumerate(some_examples(3, [9, 8]))]
    packed = assemble(chunks, passes(chunks, 10_000)[0])
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with (
        bank.use(packed.users, packed.ends),
        head_at(model, packed.positions),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        checkpointed(model) if checkpoints else torch.enable_grad(),
    ):
        forward(model, packed).backward()
    frozen = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    return sum(size for place, size in sizes.items() if place not in frozen), packed.input_ids.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("targets", "slack"), [(None, 1.6), (ALL, 1.3)])
def test_the_estimate_is_what_autograd_keeps(dtype: torch.dtype, targets: list[str] | None, slack: float) -> None:
    config = tiny_config(hidden_size=256, intermediate_size=688, num_hidden_layers=3, head_dim=32)
    model = freeze(AutoModelForCausalLM.from_config(config).to(dtype))
    bank = LoraBank(model, settings(target_modules=targets), 2, 0)
    kept, tokens = kept_by(model, bank)
    assert kept < training_bytes(model, bank.weights.shape[1]) * tokens < slack * kept
    bank.close()


def test_the_budget_is_what_was_configured_or_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    assert Budget.found(123, model).tokens == 123
    assert Budget.found(None, model).tokens == 2048, "a CPU is not faster with more"
    monkeypatch.setattr(module, "free_memory", lambda _: 4_000_000)
    few = Budget.found(None, model).tokens
    assert few == tokens_that_fit(model, 4_000_000)
    assert 1 < few == pytest.approx(0.8 * 4e6 / training_bytes(model), abs=1)
    assert Budget.found(None, model, adapter=10_000).tokens < few
    assert Budget.found(None, model, 10_000, users=50).tokens < Budget.found(None, model, 10_000).tokens
    assert tokens_that_fit(model, 0) == 1, "one example is always tried"


def test_free_memory_minds_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CGROUP", tmp_path)
    cpu = torch.device("cpu")
    there = psutil.virtual_memory().available
    assert free_memory(cpu) == pytest.approx(there, rel=0.2)
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(cpu) == pytest.approx(there, rel=0.2)
    (tmp_path / "memory.max").write_text("1000\n")
    assert free_memory(cpu) == 400


def step(model: torch.nn.Module, bank: LoraBank, checkpoints: bool) -> Tensor:
    chunks = [Chunk(n, tuple(e), seed=n) for n, e in enumerate(some_examples(3, [5, 4]))]
    packed = assemble(chunks, passes(chunks, 10_000)[0])
    bank.grads.clear()
    keys = packed.dropout_keys() if bank.dropout else None
    sparing = checkpointed(model) if checkpoints else torch.enable_grad()
    with bank.use(packed.users, packed.ends, keys), head_at(model, packed.positions), sparing:
        forward(model, packed).backward()
    return torch.stack([bank.grads[0], bank.grads[1]])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpoints_change_no_gradient(name: str, dropout: float) -> None:
    model = tiny_llama(torch.float64, config=CONFIGS[name])
    bank = LoraBank(model, settings(dropout=dropout), 2, 0)
    bank.weights.copy_(torch.randn(bank.weights.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    plain = step(model, bank, checkpoints=False)
    assert plain.norm() > 1e-3
    assert (step(model, bank, checkpoints=True) - plain).abs().max() < 1e-12
    assert not any("forward" in vars(m) for m in model.modules())
    assert not model.training
    bank.close()


def test_checkpoints_keep_little_and_work_on_a_float8_base() -> None:
    config = tiny_config(hidden_size=64, intermediate_size=192, num_hidden_layers=3)
    model = to_float8(tiny_llama(config=config))
    bank = LoraBank(model, settings(), 2, 0)
    assert kept_by(model, bank, checkpoints=True)[0] < 0.3 * kept_by(model, bank)[0]
    assert torch.equal(step(model, bank, True), step(model, bank, False))
    with (
        pytest.raises(InputError, match="Linear has no layers that can be checkpointed"),
        checkpointed(
            torch.nn.Linear(2, 2)  # type: ignore[arg-type]
        ),
    ):
        pass
