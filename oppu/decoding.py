"""Answers token by token: a user's shared prompt prefix is read once, like lengths together, finished rows are dropped.

Transformers' `generate` answers one batch; this loop around the model's forward spends less time per token, and keeps
what prompts have in common.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oppu.bank import Bank
from oppu.cache import PADDING, Rows, gathered, left_padded
from oppu.rows import common_prefix

SHARED = 8
"""A user's prompts share their beginning if it has so many tokens: less is not worth a pass of its own."""
KEPT = 0.75
"""Finished rows are dropped as soon as no more than this share is at work: dropping copies what is kept."""
CPU_TOKENS = 1536
"""The most tokens that are read at once on a CPU: what is larger falls out of its caches, and has to be padded more.
With oppu-tiny on one core 512 to 3,072 took .98 to 1.17 of the time of 1,536. Answers are given in wider batches."""

Choose = Callable[[Sequence[int], Tensor], Tensor]
"""From prompt numbers and their logits [B, V] to the next tokens [B]."""


@dataclass(frozen=True)
class Asked:
    """Tokenised prompts, each to be answered under its own user's adapter, or all by the base model alone."""

    model: PreTrainedModel
    prompts: Sequence[Sequence[int]]
    bank: Bank | None = None
    users: Sequence[int] | None = None
    progress: Callable[[int, int, int], object] | None = None
    """Told of (prompts answered, prompts in all, their tokens)."""

    def told(self, answered: Collection[int]) -> None:
        """Tell which prompts have been answered so far."""
        if self.progress is not None:
            self.progress(len(answered), len(self.prompts), sum(len(self.prompts[n]) for n in answered))

    def user(self, number: int) -> int:
        """Whose adapter a prompt has; without adapters, 0 for all."""
        return self.users[number] if self.bank is not None and self.users is not None else 0

    def adapters(self, numbers: Sequence[int]) -> AbstractContextManager[None]:
        """The context in which row n of a batch runs with the adapter of prompt numbers[n]."""
        if self.bank is None:
            return nullcontext()
        return self.bank.use(torch.tensor([self.user(n) for n in numbers], device=self.model.device))


class Span(NamedTuple):
    """Tokens `start` to `stop` of a prompt; what stands before them is in a row that was read already."""

    number: int
    start: int
    stop: int
    row: int = 0


@dataclass
class Part:
    """A batch to go on with: its prompts' numbers, its rows so far, and what they read next (both [B, Q])."""

    numbers: list[int]
    rows: Rows
    ids: Tensor
    positions: Tensor

    def read(self) -> Tensor:
        """Logits [B, V] that follow every row's last token."""
        count, width = self.ids.shape
        last = torch.arange(1, count + 1, device=self.ids.device) * width - 1
        return self.rows.read(self.ids, self.positions, last if width > 1 else None)

    def follow(self, tokens: Tensor) -> None:
        """Read these tokens [B] next, one in each row."""
        self.ids, self.positions = tokens[:, None], self.positions[:, -1:] + 1

    def keep(self, places: Sequence[int]) -> None:
        """Drop all rows but these."""
        chosen = torch.tensor(places, dtype=torch.long, device=self.ids.device)
        self.numbers = [self.numbers[n] for n in places]
        self.rows = gathered([(self.rows, chosen)], self.rows.positions.shape[1])
        self.ids, self.positions = self.ids[chosen], self.positions[chosen]


def joined(parts: Sequence[Part], room: int) -> Part:
    """Batches that read one token next as one batch, with room for so many tokens."""
    sources = [(part.rows, torch.arange(len(part.numbers), device=part.ids.device)) for part in parts]
    return Part(
        [number for part in parts for number in part.numbers],
        gathered(sources, max(part.rows.used for part in parts) + room),
        torch.cat([part.ids for part in parts]),
        torch.cat([part.positions for part in parts]),
    )


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Prompt numbers in batches of like length, longest first: rows * longest <= budget, one row at least."""
    result: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if result and (len(result[-1]) + 1) * lengths[result[-1][0]] <= budget:
            result[-1].append(number)
        else:
            result.append([number])
    return result


def budget_on(device: torch.device, budget: int) -> int:
    """Tokens of one batch on a device, at most `budget`."""
    return min(budget, CPU_TOKENS) if device.type == "cpu" else budget


def parts(asked: Asked, budget: int, room: int, share: bool = True, tail: int = 0) -> Iterator[Part]:
    """All prompts in batches of at most `budget` tokens, with room for so many more in each row.

    With `share`, what a user's prompts begin with is read here, once; the rest of them is left to be read, and `tail`
    tokens behind it.
    """
    for group in _groups(asked, budget, share):
        begun = None
        if group[0][1]:
            first = _part(asked, [Span(numbers[0], 0, length) for numbers, length in group], None, 0)
            with asked.adapters(first.numbers):
                first.rows.read(first.ids, first.positions, torch.arange(0, device=first.ids.device))
            begun = first.rows
        spans = [
            Span(number, length, len(asked.prompts[number]), row)
            for row, (numbers, length) in enumerate(group)
            for number in numbers
        ]
        columns = begun.used if begun else 0
        for batch in batches([columns + span.stop - span.start + tail for span in spans], budget):
            yield _part(asked, [spans[n] for n in batch], begun, room + tail)


def _groups(asked: Asked, budget: int, share: bool) -> Iterator[list[tuple[list[int], int]]]:
    """The prompts as lists of (prompt numbers, tokens that these share); a group's prefixes fit into one batch."""
    owners: dict[int, list[int]] = defaultdict(list)
    for number in range(len(asked.prompts)):
        owners[asked.user(number)].append(number)
    same = {user: common_prefix([asked.prompts[n] for n in own]) for user, own in owners.items()}
    sharing = [user for user, own in owners.items() if share and len(own) > 1 and same[user] >= SHARED]
    for group in batches([same[user] for user in sharing], budget):
        yield [(owners.pop(sharing[n]), same[sharing[n]]) for n in group]
    if owners:
        yield [([number for own in owners.values() for number in own], 0)]


def _part(asked: Asked, spans: Sequence[Span], begun: Rows | None, room: int) -> Part:
    """A batch that reads these spans, each behind its row of `begun`, with room for so many tokens more."""
    device = asked.model.device
    ids = left_padded([asked.prompts[s.number][s.start : s.stop] for s in spans], 0, device)
    positions = left_padded([range(s.start, s.stop) for s in spans], PADDING, device)
    columns = ids.shape[1] + room
    if begun is None:
        rows = Rows(asked.model, len(spans), columns)
    else:
        chosen = torch.tensor([s.row for s in spans], device=device)
        rows = gathered([(begun, chosen)], begun.used + columns, done=False)
    return Part([s.number for s in spans], rows, ids, positions)


def decode(
    asked: Asked, choose: Choose, ends: Collection[int], limit: int, budget: int, share: bool = True
) -> list[list[int]]:
    """The answers' tokens, at most `limit` each, an end token being the last where one was chosen.

    Prompts are read in batches that suit the device, and answered in batches of up to `budget` tokens.
    """
    answers: list[list[int]] = [[] for _ in asked.prompts]
    answered: set[int] = set()

    def unfinished(part: Part) -> list[int]:
        own = [answers[number] for number in part.numbers]
        return [row for row, a in enumerate(own) if len(a) < limit and (not a or a[-1] not in ends)]

    def step(part: Part) -> None:
        tokens = choose(part.numbers, part.read())
        chosen = tokens.tolist()  # the one wait for the device
        open_rows = unfinished(part)
        for row in open_rows:
            answers[part.numbers[row]].append(chosen[row])
        if more := set(open_rows) - set(unfinished(part)):
            answered.update(part.numbers[row] for row in more)
            asked.told(answered)
        part.follow(tokens)

    def finish(part: Part) -> None:
        while left := unfinished(part):
            if len(left) <= KEPT * len(part.numbers):
                part.keep(left)
            with asked.adapters(part.numbers):
                while len(unfinished(part)) > KEPT * len(part.numbers):
                    step(part)

    begun: list[Part] = []
    for part in parts(asked, budget_on(asked.model.device, budget), 0, share):
        with asked.adapters(part.numbers):
            step(part)
        columns = max(one.rows.used for one in [*begun, part])
        if begun and columns * sum(len(one.numbers) for one in [*begun, part]) > budget:
            finish(joined(begun, limit))
            begun = []
        begun.append(part)
    if begun:
        finish(joined(begun, limit))
    return answers
