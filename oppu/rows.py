"""Which tokens are trained on, in which order and together: pure, and without torch, so that a plan can ask too.

A pass holds pieces; a piece is one user's prompt prefix and, behind it, some of the user's items of one optimiser step.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


def virtual(count: int) -> tuple[int, ...]:
    """Prompt tuning's virtual tokens, as ids that no vocabulary has: -count, …, -1."""
    return tuple(range(-count, 0))


def common_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the prompts' longest common prefix, less one token of the shortest prompt at least.

    The last prompt token stays with each prompt, since its logits predict the answer's first token.
    """
    first, last = (
        min(map(tuple, prompts)),
        max(map(tuple, prompts)),
    )  # in dictionary order; what these two share, all share
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(same, min(map(len, prompts)) - 1)


@dataclass(frozen=True)
class Example:
    """What is learned: the target's tokens (end-of-text token included) after the prompt's; loss on the target only.

    A prompt may begin with virtual tokens: as the first part of what all prompts share, they are laid out with it.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt or self.prompt[-1] < 0 or not self.target:
            raise ValueError("an example needs at least one prompt token and one target token")

    def __len__(self) -> int:
        return len(self.prompt) + len(self.target)


@dataclass(frozen=True)
class Chunk:
    """One user's examples of one optimiser step. `seed` keys its dropout: from the user and the step, nothing else."""

    user: int
    examples: tuple[Example, ...]
    seed: int = 0

    @cached_property
    def prefix(self) -> int:
        """What the chunk's prompts share (`common_prefix`): it is laid into a row once."""
        return common_prefix([e.prompt for e in self.examples])

    @cached_property
    def tokens(self) -> int:
        """Tokens of the chunk in one piece."""
        return self.prefix + sum(len(e) - self.prefix for e in self.examples)

    @cached_property
    def labels(self) -> int:
        """Target tokens of the whole step: what the loss is divided by."""
        return sum(len(e.target) for e in self.examples)


class Piece(NamedTuple):
    """Consecutive examples of one chunk that share one copy of its prefix; `tokens` is their length together."""

    chunk: int
    items: range
    tokens: int


def passes(chunks: Sequence[Chunk], budget: int, parts: Sequence[Piece] | None = None) -> list[list[Piece]]:
    """The pieces of each forward pass: at most `budget` tokens together, or one example with its prefix at least.

    A chunk over the budget is cut into pieces, each with the prefix again; with `parts`, only these are laid out. Best
    fit: the longest piece first, each into the fullest pass that has room for it.
    """
    whole = [(number, range(len(chunk.examples))) for number, chunk in enumerate(chunks)]
    wanted = whole if parts is None else [(part.chunk, part.items) for part in parts]
    pieces = [piece for number, items in wanted for piece in _cut(number, chunks[number], items, budget)]
    made: list[list[Piece]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda p: -p.tokens):
        fits = [n for n, left in enumerate(room) if left >= piece.tokens]
        if not fits:
            made.append([])
            room.append(budget)
        place = min(fits, key=lambda n: room[n]) if fits else -1
        made[place].append(piece)
        room[place] -= piece.tokens
    return made


def _cut(number: int, chunk: Chunk, items: range, budget: int) -> list[Piece]:
    pieces: list[Piece] = []
    for item in items:
        own = len(chunk.examples[item]) - chunk.prefix
        if pieces and pieces[-1].tokens + own <= budget:
            last = pieces.pop()
            pieces.append(Piece(number, range(last.items.start, item + 1), last.tokens + own))
        else:
            pieces.append(Piece(number, range(item, item + 1), chunk.prefix + own))
    return pieces


def plan(n_examples: int, epochs: int, batch_size: int, seed_text: str) -> list[list[int]]:
    """A user's optimiser steps as lists of example numbers: shuffled anew in every epoch, the last step may be short.

    The order comes from `seed_text` alone (run seed, task, user, purpose).
    """
    draw = random.Random(hashlib.sha256(seed_text.encode()).digest())
    steps = []
    for _ in range(epochs):
        order = list(range(n_examples))
        draw.shuffle(order)
        steps += [order[start : start + batch_size] for start in range(0, n_examples, batch_size)]
    return steps


def next_batch(chunks: Mapping[int, Chunk], left: Mapping[int, int], budget: int) -> list[Chunk]:
    """Of every user's next step, those that are done together: of at most `budget` tokens, one at least.

    Those with most steps `left` go first: else the longest histories would be left over, alone, at the end.
    """
    batch: list[Chunk] = []
    for user in sorted(chunks, key=lambda u: (-left[u], u)):
        if batch and chunks[user].tokens > budget:
            break
        budget -= chunks[user].tokens
        batch.append(chunks[user])
    return batch


def step_seed(user_seed: int, step: int) -> int:
    """The dropout seed of a user's step, 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{user_seed} {step}".encode()).digest()[:8]) >> 1
