"""Training many users' adapters at once (section 2.3): per user exactly what training that user alone would do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.optim import AdamW
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from oppu.attention import attention_over, takes_blocks
from oppu.bank import Bank
from oppu.budget import Budget, checkpointed
from oppu.checkpoints import Checkpoint
from oppu.models import head_at
from oppu.packing import assemble
from oppu.rows import Chunk, Example, Piece, next_batch, step_seed
from oppu.training_settings import Training

Progress = Callable[[int, int, int], None]
"""Called after every pass with (user steps done, user steps in all, example tokens trained on)."""


@dataclass(frozen=True)
class Trained:
    """What became of one user: optimiser steps taken, the last step's loss, and the error that ended it, if any."""

    steps: int
    loss: float | None
    error: Exception | None


MASKED = 2048
"""Tokens of a pass under one mask for all, whose cost is their square."""


def warmup_steps(lora: Training, steps: int) -> int:
    """Steps of warm-up, always leaving one: it starts at zero, and a lone step at zero would learn nothing."""
    return min(math.ceil(lora.warmup * steps), max(steps - 1, 0))


def train(
    model: PreTrainedModel,
    bank: Bank,
    examples: Sequence[Sequence[Example]],
    plans: Sequence[list[list[int]]],
    lora: Training,
    accelerator: Accelerator,
    progress: Progress | None = None,
    seeds: Sequence[int] | None = None,
    finished: Callable[[int], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[Trained]:
    """Train user u's adapter on `examples[u]` by `plans[u]`, for all users of the bank.

    Each user has an AdamW, a linear schedule with warm-up and a gradient clip of its own, and a step's loss is the
    mean over that user's target tokens of the step. So a user's result depends on nobody else, up to rounding.
    A user whose loss or gradient is not finite ends with an error and the others go on; a user without a plan keeps
    the initial adapter. `seeds` (one per user) key dropout, and are needed only with it. `finished` is told each user
    right after that user's last step, so that an adapter can be kept while the others go on. With a `checkpoint`,
    training goes on from it, and leaves one every `lora.checkpoint_minutes`.
    """
    if lora.lr is None or lora.weight_decay is None:
        raise ValueError("train: lora.lr or lora.weight_decay is unset; take them from Config.lora(task)")
    if bank.dropout and seeds is None:
        raise ValueError("train: dropout needs a seed per user")
    if accelerator.scaler is not None:
        raise ValueError("train: mixed precision fp16 is not supported; use bf16 or no")
    if not len(bank) == len(examples) == len(plans):
        raise ValueError(f"train: {len(bank)} adapters, {len(examples)} example lists, {len(plans)} plans")
    blocks = takes_blocks(model)
    budget = Budget.found(lora.tokens_per_batch, model, bank.weights.shape[1], len(bank))
    if not blocks:
        budget.tokens = min(budget.tokens, MASKED)
    parameters = [bank.parameter(user) for user in range(len(bank))]
    optimisers = [
        AdamW([{"params": [p], "initial_lr": lora.lr}], lr=lora.lr, weight_decay=lora.weight_decay) for p in parameters
    ]
    done = [0] * len(bank)
    if checkpoint is not None:
        done = checkpoint.resume(bank, optimisers, budget if lora.tokens_per_batch is None else None)
    schedules = [
        get_linear_schedule_with_warmup(optimiser, warmup_steps(lora, len(steps)), len(steps), last_epoch=before - 1)
        for optimiser, steps, before in zip(optimisers, plans, done, strict=True)
    ]
    losses: list[float | None] = [None] * len(bank)
    errors: dict[int, Exception] = {}
    chunks: dict[int, Chunk] = {}  # every unfinished user's next step
    todo = {user for user, steps in enumerate(plans) if steps}
    total, tokens = sum(map(len, plans)), 0

    while todo:
        for user in todo - chunks.keys():
            chosen = tuple(examples[user][n] for n in plans[user][done[user]])
            chunks[user] = Chunk(user, chosen, step_seed(seeds[user], done[user]) if seeds else 0)
        left = {user: len(plans[user]) - done[user] for user in todo}
        batch = next_batch(chunks, left, budget.tokens)
        for chunk in batch:
            del chunks[chunk.user]

        results = gradients(model, bank, batch, lora, accelerator, blocks, budget)
        if len(batch) > 1 and not all(map(_finite, results)):
            # What is not finite spreads within a row (0 * NaN in attention), so all are done again, each alone.
            results = [gradients(model, bank, [chunk], lora, accelerator, blocks, budget)[0] for chunk in batch]

        for chunk, result in zip(batch, results, strict=True):
            user = chunk.user
            if _finite(result):
                parameters[user].grad = result.grad
                optimisers[user].step()
                schedules[user].step()
                parameters[user].grad = None
                losses[user] = result.loss
                done[user] += 1
            else:
                found = f"loss {result.loss}, gradient norm {result.norm}"
                errors[user] = FloatingPointError(f"step {done[user] + 1} of {len(plans[user])}: {found}")
            if user in errors or done[user] == len(plans[user]):
                todo.remove(user)
                optimisers[user].state.clear()
                if finished is not None and user not in errors:
                    finished(user)
            tokens += sum(map(len, chunk.examples))
        if progress is not None:
            progress(sum(done), total, tokens)
        if checkpoint is not None:
            checkpoint.keep(lora.checkpoint_minutes, bank, optimisers, done, todo, budget)
    return [Trained(done[user], losses[user], errors.get(user)) for user in range(len(bank))]


@dataclass(frozen=True)
class Result:
    """One user's loss, gradient [P] after clipping, and the gradient's norm before it."""

    loss: float
    grad: torch.Tensor
    norm: float


def _finite(result: Result) -> bool:
    return math.isfinite(result.loss) and math.isfinite(result.norm)


def gradients(
    model: PreTrainedModel,
    bank: Bank,
    chunks: Sequence[Chunk],
    lora: Training,
    accelerator: Accelerator,
    blocks: bool = True,
    budget: Budget | None = None,
) -> list[Result]:
    """Forward and backward of one step of these (distinct) users, in as many passes as the token budget asks for."""
    device = bank.weights.device
    losses = torch.zeros(len(chunks), dtype=torch.float64, device=device)
    bank.grads.clear()

    def run(pieces: Sequence[Piece]) -> None:
        packed = assemble(chunks, pieces).to(device)
        keys = packed.dropout_keys() if bank.dropout else None
        users = bank.use(packed.users, packed.ends, keys)
        with users, head_at(model, packed.positions), attention_over(model, packed, blocks) as mask:
            with accelerator.autocast():
                logits = model(
                    input_ids=packed.input_ids,
                    position_ids=packed.position_ids,
                    attention_mask=mask,
                    use_cache=False,
                ).logits
            logits = logits.to(bank.weights.dtype)
            loss = F.cross_entropy(logits, packed.targets, reduction="none") * packed.weights.to(logits.dtype)
            accelerator.backward(loss.sum())
        losses.index_add_(0, packed.chunks, loss.detach().double())

    budget = budget or Budget.found(lora.tokens_per_batch, model, bank.weights.shape[1], len(bank))
    budget.passes(chunks, run, sparing=lambda: checkpointed(model))
    grads = [bank.grads.pop(chunk.user) for chunk in chunks]
    norms = [_clip(grad, lora.max_grad_norm) for grad in grads]
    numbers = zip(losses.tolist(), grads, torch.stack(norms).tolist(), strict=True)  # one wait for the device
    return [Result(loss, grad, norm) for loss, grad, norm in numbers]


def _clip(grad: torch.Tensor, max_norm: float) -> torch.Tensor:
    """Clip a gradient in place by clip_grad_norm_'s formula; returns its norm before. Never waits for the device."""
    norm = torch.linalg.vector_norm(grad)
    grad *= torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return norm
