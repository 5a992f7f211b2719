"""Which tokens are trained on, in which order and in which rows: pure, and without torch, so that a plan can ask too.

A row holds pieces; a piece is one user's prompt prefix and, behind it, some of the user's items of one optimiser step.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

WIDTH = 384
"""Tokens that a row is filled to. Attention costs rows * width^2, a narrow row costs one more prefix: measured on a
small model (prefix 80, items 35), 384 was the fastest of 256 to 1024, by 10 to 20 %."""


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
    """What is learned: the target's tokens (end-of-text token included) after the prompt's; loss on the target only."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.target:
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


Row = list[Piece]


def fill_rows(chunks: Sequence[Chunk], width: int = WIDTH) -> list[Row]:
    """Lay chunks into rows of at most `width` tokens (more where a prefix or one example is long), longest first.

    A chunk over the width is cut into pieces, each with the prefix again. Returned rows go from longest to shortest.
    """
    lengths = [len(example) for chunk in chunks for example in chunk.examples]
    if 4 * sum(chunk.prefix * len(chunk.examples) for chunk in chunks) < sum(lengths):
        width = min(width, max(lengths))  # little is shared, so wide rows would only make attention dearer
    pieces = [piece for number, chunk in enumerate(chunks) for piece in _cut(number, chunk, width)]
    rows: list[Row] = []
    filled: list[int] = []
    for piece in sorted(pieces, key=lambda p: -p.tokens):
        place = next((n for n, tokens in enumerate(filled) if tokens + piece.tokens <= width), len(rows))
        if place == len(rows):
            rows.append([])
            filled.append(0)
        rows[place].append(piece)
        filled[place] += piece.tokens
    return sorted(rows, key=lambda row: -row_length(row))


def _cut(number: int, chunk: Chunk, width: int) -> list[Piece]:
    width = max(width, 4 * chunk.prefix)  # a long prefix wants many items behind it
    pieces: list[Piece] = []
    for item, example in enumerate(chunk.examples):
        own = len(example) - chunk.prefix
        if pieces and pieces[-1].tokens + own <= width:
            last = pieces.pop()
            pieces.append(Piece(number, range(last.items.start, item + 1), last.tokens + own))
        else:
            pieces.append(Piece(number, range(item, item + 1), chunk.prefix + own))
    return pieces


def row_length(row: Row) -> int:
    """Tokens of a row, padding aside."""
    return sum(piece.tokens for piece in row)


def padded_width(rows: Sequence[Row]) -> int:
    """Tokens that every row of a forward pass has, padding included."""
    return -(-max(map(row_length, rows)) // 8) * 8  # CUDA's attention with a mask wants multiples of eight


def micro_batches(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Rows (longest first) in batches of at most `budget` tokens, padding included; one row at least."""
    batches: list[list[Row]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * row_length(batches[-1][0]) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


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
