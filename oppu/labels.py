"""Answers by scoring: of a closed set of labels the one that the model holds most probable, in one pass per batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from oppu.attention import check_packing
from oppu.decoding import Asked, Part, budget_on, parts

PROMPT = 0
"""The node that stands for the prompt's last token."""


@dataclass(frozen=True)
class Tree:
    """Labels as a tree of tokens behind the prompt, common beginnings once. Node n > 0 is token n - 1 of `tokens`."""

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    """The node before each token; PROMPT, or one that comes earlier."""
    paths: tuple[tuple[tuple[int, int], ...], ...]
    """Per label, its tokens as (node whose logits foretell it, token), the end of text last."""

    def __len__(self) -> int:
        return len(self.tokens)

    def seen(self) -> Tensor:
        """[N, N] bool: which tokens each one sees; itself and what it follows in its own label."""
        mask = torch.eye(len(self), dtype=torch.bool)
        for n, parent in enumerate(self.parents):
            if parent != PROMPT:
                mask[n] |= mask[parent - 1]
        return mask


def tree_of(labels: Sequence[Sequence[int]]) -> Tree:
    """The tree of tokenised labels, each with its end-of-text token, which is foretold and never read."""
    nodes: dict[tuple[int, ...], int] = {(): PROMPT}
    tokens, parents, paths = [], [], []
    for label in map(tuple, labels):
        for n in range(1, len(label)):
            if label[:n] not in nodes:
                nodes[label[:n]] = len(nodes)
                tokens.append(label[n - 1])
                parents.append(nodes[label[: n - 1]])
        paths.append(tuple((nodes[label[:n]], token) for n, token in enumerate(label)))
    return Tree(tuple(tokens), tuple(parents), tuple(paths))


@torch.inference_mode()
def likeliest(asked: Asked, labels: Sequence[Sequence[int]], budget: int, share: bool = True) -> list[int]:
    """The number of each prompt's most probable label; of equal ones, the first. See `scores`."""
    best = [0] * len(asked.prompts)
    answered: list[int] = []
    for numbers, found in scores(asked, labels, budget, share):
        asked.told(answered := answered + list(numbers))
        for number, label in zip(numbers, found.argmax(-1).tolist(), strict=True):
            best[number] = label
    return best


def scores(
    asked: Asked, labels: Sequence[Sequence[int]], budget: int, share: bool = True
) -> Iterator[tuple[list[int], Tensor]]:
    """Per batch, its prompts' numbers and each label's log-probability [B, labels], in float32 at least.

    A label's is the sum over its tokens and the end-of-text token behind them: the exact log-probability that sampling
    at temperature 1 gives this very answer. No division by length: that would be no probability of an answer. Raises
    InputError for a model whose attention cannot tell the labels of a row apart.
    """
    check_packing(asked.model)
    tree = tree_of(labels)
    for part in parts(asked, budget_on(asked.model.device, budget), 0, share, tail=len(tree)):
        with asked.adapters(part.numbers):
            yield part.numbers, _scores(part, tree)


def _scores(part: Part, tree: Tree) -> Tensor:
    """[B, labels]: the labels' tokens are read right behind each prompt's, with logits from its last token on."""
    device, (count, width) = part.ids.device, part.ids.shape
    depth = torch.tensor(tree.seen().sum(1).tolist(), dtype=torch.long, device=device)
    ids = torch.tensor(tree.tokens, dtype=torch.long, device=device).expand(count, -1)
    rows = torch.arange(count, device=device)[:, None] * (width + len(tree))
    at = rows + torch.arange(width - 1, width + len(tree), device=device)
    logits = part.rows.read(
        torch.cat([part.ids, ids], 1),
        torch.cat([part.positions, part.positions[:, -1:] + depth], 1),
        at.flatten(),
        tree.seen().to(device) if len(tree) else None,
    ).unflatten(0, at.shape)
    whole = torch.stack([row.to(torch.promote_types(row.dtype, torch.float32)).logsumexp(-1) for row in logits])
    found = []
    for path in tree.paths:
        nodes, tokens = (torch.tensor(x, device=device) for x in zip(*path, strict=True))
        found.append((logits[:, nodes, tokens].to(whole.dtype) - whole[:, nodes]).sum(-1))
    return torch.stack(found, 1)
