"""Packing: many users' examples in rows of tokens, each user's shared prompt prefix once per row.

Under the 4-D mask an item sees its prefix and itself only, so the packed forward equals the plain one of each example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from oppu.bank import GOLDEN, mix
from oppu.rows import Chunk, Row, padded_width


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
    width = padded_width(rows)
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
