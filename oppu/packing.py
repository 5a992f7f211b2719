"""Packing: many users' examples in rows of tokens, each user's shared prompt prefix once per row.

A row holds pieces; a piece is one user's prefix and, behind it, some of the user's items of one optimiser step. Under
the 4-D mask an item sees its prefix and itself only, so the packed forward equals the plain one of each example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from oppu.bank import GOLDEN, mix

WIDTH = 384
"""Tokens that a row is filled to. Attention costs rows * width^2, a narrow row costs one more prefix: measured on a
small model (prefix 80, items 35), 384 was the fastest of 256 to 1024, by 10 to 20 %."""


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
        """Length of the prompts' longest common prefix, less one token of the shortest prompt at least.

        The last prompt token stays with each item, since its logits predict the item's first target token.
        """
        prompts = [e.prompt for e in self.examples]
        first, last = min(prompts), max(prompts)  # in dictionary order; what these two share, all share
        same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        return min(same, min(map(len, prompts)) - 1)

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
    return sorted(rows, key=lambda row: -_length(row))


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


def _length(row: Row) -> int:
    return sum(piece.tokens for piece in row)


def micro_batches(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Rows (longest first) in batches of at most `budget` tokens, padding included; one row at least."""
    batches: list[list[Row]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * _length(batches[-1][0]) <= budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


@dataclass(frozen=True)
class Packed:
    """One forward pass: R rows of T tokens in G pieces with M labels. All tensors; token positions index R * T."""

    input_ids: Tensor
    """[R, T]"""
    position_ids: Tensor
    """[R, T]; an item's go on where its prefix ended."""
    piece: Tensor
    """[R, T] number of the token's piece, -1 for padding."""
    item: Tensor
    """[R, T] number of the token's example in its chunk, from 1; 0 for the prefix and for padding."""
    users: Tensor
    """[G] the user of each piece."""
    ends: Tensor
    """[G] (int32) where each piece ends. A row's padding counts as its last piece's: no loss, seen by nobody."""
    seeds: Tensor
    """[G] the chunk's seed."""
    positions: Tensor
    """[M] the tokens whose logits predict a target token."""
    targets: Tensor
    """[M] those target tokens."""
    weights: Tensor
    """[M] (float64) 1 / the label count of the user's whole step."""
    chunks: Tensor
    """[M] the chunk of each label."""

    @property
    def mask(self) -> Tensor:
        """[R, 1, T, T] bool: True where a token (row) may see a token (column). Padding sees padding: no NaN."""
        order = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        mask = self.piece[:, :, None] == self.piece[:, None, :]
        mask &= (self.item[:, :, None] == self.item[:, None, :]) | (self.item[:, None, :] == 0)
        mask &= order[:, None] >= order
        return mask[:, None]

    def mask_within(self, window: int | None) -> Tensor:
        """The mask less what lies `window` or more true positions back, as sliding attention has it; None: no window.

        A row's columns do not count: an item stands far behind its prefix in the row, and right after it in truth.
        """
        if window is None:
            return self.mask
        near = self.position_ids[:, :, None] - self.position_ids[:, None, :] < window
        return self.mask & near[:, None]

    def dropout_keys(self) -> Tensor:
        """[R * T] one key per (user, step, example, position): a repeated prefix token has the same key again."""
        keys = self.seeds[self.piece.clamp(min=0)] + self.item * GOLDEN
        return mix(mix(keys) + self.position_ids).flatten()

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        return Packed(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


def assemble(chunks: Sequence[Chunk], rows: Sequence[Row]) -> Packed:
    """The tensors of one forward pass over these rows."""
    width = -(-max(map(_length, rows)) // 8) * 8  # CUDA's attention with a mask wants multiples of eight
    shape = (len(rows), width)
    ids, position, piece_of, item_of = [], [], [], []  # type: list[int], list[int], list[int], list[int]
    users, ends, seeds = [], [], []  # type: list[int], list[int], list[int]
    positions, targets, weights, labels_of = [], [], [], []  # type: list[int], list[int], list[float], list[int]
    for number, row in enumerate(rows, start=1):
        for piece in row:
            chunk, start = chunks[piece.chunk], len(ids)
            ids += chunk.examples[0].prompt[: chunk.prefix]
            position += range(chunk.prefix)
            item_of += [0] * chunk.prefix
            for item in piece.items:
                example = chunk.examples[item]
                ids += example.prompt[chunk.prefix :]
                positions += range(len(ids) - 1, len(ids) - 1 + len(example.target))
                ids += example.target
                position += range(chunk.prefix, len(example))
                item_of += [item + 1] * (len(example) - chunk.prefix)
                targets += example.target
                weights += [1 / chunk.labels] * len(example.target)
                labels_of += [piece.chunk] * len(example.target)
            piece_of += [len(users)] * (len(ids) - start)
            users.append(chunk.user)
            ends.append(len(ids))
            seeds.append(chunk.seed)
        padding = number * width - len(ids)
        ids += [0] * padding
        position += range(padding)
        piece_of += [-1] * padding
        item_of += [0] * padding
        ends[-1] = len(ids)
    return Packed(
        input_ids=torch.tensor(ids).view(shape),
        position_ids=torch.tensor(position).view(shape),
        piece=torch.tensor(piece_of).view(shape),
        item=torch.tensor(item_of).view(shape),
        users=torch.tensor(users),
        ends=torch.tensor(ends, dtype=torch.int32),
        seeds=torch.tensor(seeds),
        positions=torch.tensor(positions),
        targets=torch.tensor(targets),
        weights=torch.tensor(weights, dtype=torch.float64),
        chunks=torch.tensor(labels_of),
    )


def step_seed(user_seed: int, step: int) -> int:
    """The dropout seed of a user's step, 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{user_seed} {step}".encode()).digest()[:8]) >> 1
