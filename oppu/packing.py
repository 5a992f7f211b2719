"""Packing: many users' examples in one line of tokens, each user's shared prompt prefix once, and no padding.

An item sees its prefix and itself only (oppu/attention.py), so the packed forward equals the plain one of each example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from oppu.bank import GOLDEN, mix
from oppu.rows import Chunk, Piece

HOST = ("users", "spans")
"""What is asked for its numbers: on a device that would wait for all that it still has to do."""


@dataclass(frozen=True)
class Packed:
    """One forward pass over N tokens in G pieces with M labels and S spans. All tensors.

    A span is what causal attention runs within: a piece's prefix, or an item, which sees its prefix too.
    """

    input_ids: Tensor
    """[1, N]"""
    position_ids: Tensor
    """[1, N]; an item's go on where its prefix ended."""
    piece: Tensor
    """[N] number of the token's piece."""
    item: Tensor
    """[N] number of the token's example in its chunk, from 1; 0 for the prefix."""
    users: Tensor
    """[G] on the CPU: the user of each piece."""
    ends: Tensor
    """[G] (int32) where each piece ends."""
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
    spans: Tensor
    """[S, 4] on the CPU: a span's first token and length, and its prefix's (length 0 for a prefix itself)."""

    def mask(self, window: int | None = None) -> Tensor:
        """[1, 1, N, N] bool: True where a token (row) may see a token (column); `window`: less what lies so far back.

        Distance is in true positions: an item stands far behind its prefix in the line, and right after it in truth.
        """
        order = torch.arange(len(self.item), device=self.item.device)
        mask = self.piece[:, None] == self.piece
        mask &= (self.item[:, None] == self.item) | (self.item == 0)
        mask &= order[:, None] >= order
        if window is not None:
            mask &= self.position_ids[0, :, None] - self.position_ids[0] < window
        return mask[None, None]

    def dropout_keys(self) -> Tensor:
        """[N] one key per (user, step, example, position): a repeated prefix token has the same key again."""
        keys = self.seeds[self.piece] + self.item * GOLDEN
        return mix(mix(keys) + self.position_ids[0])

    def to(self, device: torch.device) -> Packed:
        """The same on another device, but for users and spans; copies run beside what the device is doing."""
        if device.type == "cpu":
            return self
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {n: t.pin_memory().to(device, non_blocking=True) for n, t in tensors.items() if n not in HOST}
        return Packed(**tensors | moved)


def assemble(chunks: Sequence[Chunk], pieces: Sequence[Piece]) -> Packed:
    """The tensors of one forward pass over these pieces."""
    ids, position, piece_of, item_of = [], [], [], []  # type: list[int], list[int], list[int], list[int]
    users, ends, seeds = [], [], []  # type: list[int], list[int], list[int]
    positions, targets, weights, labels_of = [], [], [], []  # type: list[int], list[int], list[float], list[int]
    spans: list[tuple[int, int, int, int]] = []
    for number, piece in enumerate(pieces):
        chunk, start = chunks[piece.chunk], len(ids)
        ids += chunk.examples[0].prompt[: chunk.prefix]
        position += range(chunk.prefix)
        item_of += [0] * chunk.prefix
        if chunk.prefix:
            spans.append((start, chunk.prefix, start, 0))
        for item in piece.items:
            example = chunk.examples[item]
            spans.append((len(ids), len(example) - chunk.prefix, start, chunk.prefix))
            ids += example.prompt[chunk.prefix :]
            positions += range(len(ids) - 1, len(ids) - 1 + len(example.target))
            ids += example.target
            position += range(chunk.prefix, len(example))
            item_of += [item + 1] * (len(example) - chunk.prefix)
            targets += example.target
            weights += [1 / chunk.labels] * len(example.target)
            labels_of += [piece.chunk] * len(example.target)
        piece_of += [number] * (len(ids) - start)
        users.append(chunk.user)
        ends.append(len(ids))
        seeds.append(chunk.seed)
    return Packed(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([position]),
        piece=torch.tensor(piece_of),
        item=torch.tensor(item_of),
        users=torch.tensor(users),
        ends=torch.tensor(ends, dtype=torch.int32),
        seeds=torch.tensor(seeds),
        positions=torch.tensor(positions),
        targets=torch.tensor(targets),
        weights=torch.tensor(weights, dtype=torch.float64),
        chunks=torch.tensor(labels_of),
        spans=torch.tensor(spans),
    )
