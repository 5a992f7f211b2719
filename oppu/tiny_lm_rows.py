"""From lessons to training rows: the tokenizer, and packed rows in which exchanges share the start of their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np

from oppu.tasks import tasks
from oppu.tiny_lm_examples import Exchange, Lesson
from oppu.tiny_lm_texts import Document

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def make_tokenizer(documents: Sequence[Document], vocabulary: int, positions: int) -> Any:
    """A byte-level BPE that begins every text with `<s>`; news words and the instructions weigh most.

    Abstracts are ten times as many words as news, and headlines are what the sample is scored on.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{d.title}\n {d.text}" for d in documents for _ in range(12 if d.source == "news" else 1)]
    # LaMP's tasks only: the shipped tokenizer stays what it is when the table of tasks grows
    lamp = [t for t in tasks().values() if t.name.startswith("LaMP_")]
    forms = [f"{t.prompt} {' '.join(t.labels or [])} {t.item} {t.profile.form}" for t in lamp]
    inner.train_from_iterator([*texts, *(forms * 300)], trainer)
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, inner.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Weights:
    """What a token counts for in the loss, by what it belongs to."""

    plain: float = 0.5
    prompt: float = 0.1
    answer: float = 1.0
    label: float = 6.0
    plain_share: float = 0.6
    prompt_share: float = 0.2
    """Shares of plain and prompt tokens that are predicted at all: the head is half of the work."""


@dataclass
class Row:
    """A packed row. A token sees its own block's start and, before itself, its own exchange.

    `sources`, `labels`, `weights`: which token predicts which, and for how much; `soft` holds the places in these
    lists whose label is a distribution over the first tokens of the categories.
    """

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    soft: dict[int, np.ndarray] = field(default_factory=dict)

    def _token(self, token: int, position: int, block: int, part: int) -> int:
        self.ids.append(token)
        self.positions.append(position)
        self.blocks.append(block)
        self.parts.append(part)
        return len(self.ids) - 1

    def _loss(self, source: int, label: int, weight: float, target: np.ndarray | None = None) -> None:
        if weight > 0:
            if target is not None:
                self.soft[len(self.labels)] = target
            self.sources.append(source)
            self.labels.append(label)
            self.weights.append(weight)

    def add(self, block: Block, number: int) -> None:
        """Append a block: the shared start once, then each exchange behind it."""
        last = -1
        for position, token in enumerate(block.start):
            last = self._token(token, position, number, 0)
        for part, tokens in enumerate(block.exchanges, start=1):
            source = last
            for n, (token, weight) in enumerate(zip(tokens.ids, tokens.weights, strict=True)):
                self._loss(source, token, weight, tokens.target if n == tokens.answer else None)
                source = self._token(token, len(block.start) + n, number, part)


@dataclass(frozen=True)
class Tokens:
    """An exchange's tokens behind the shared start, what each counts, and where the answer begins."""

    ids: list[int]
    weights: list[float]
    answer: int
    target: np.ndarray | None


@dataclass(frozen=True)
class Block:
    """Exchanges behind one shared start."""

    start: list[int]
    exchanges: list[Tokens]

    def __len__(self) -> int:
        return len(self.start) + sum(len(e.ids) for e in self.exchanges)


def block(tokenizer: Any, lesson: Lesson, weights: Weights, longest: int, rng: np.random.Generator) -> Block | None:
    """A lesson as tokens; exchanges that do not fit into `longest` are left out, None when none fits."""
    prompts = tokenizer([e.prompt for e in lesson])["input_ids"]
    full = tokenizer([f"{e.prompt} {e.answer}" if e.prompt else e.answer for e in lesson])["input_ids"]
    shared = sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, zip(*prompts, strict=False)))
    shared = max(1, min(shared, *(len(p) - 1 for p in prompts))) if len(prompts) > 1 else 1
    kept: list[Tokens] = []
    size = shared
    for exchange, prompt, ids in zip(lesson, prompts, full, strict=True):
        tokens = _tokens(exchange, len(prompt) - shared, [*ids[shared:], tokenizer.eos_token_id], weights, rng)
        if size + len(tokens.ids) <= longest:
            kept.append(tokens)
            size += len(tokens.ids)
    return Block(full[0][:shared], kept) if kept else None


def _tokens(exchange: Exchange, prompt: int, ids: list[int], weights: Weights, rng: np.random.Generator) -> Tokens:
    if not exchange.prompt:
        return Tokens(ids, list((rng.random(len(ids)) < weights.plain_share) * weights.plain), 0, None)
    counts = list((rng.random(prompt) < weights.prompt_share) * weights.prompt)
    counts += [weights.answer] * (len(ids) - prompt)
    if exchange.target is not None:
        counts[prompt] = weights.label
    return Tokens(ids, counts, prompt, exchange.target)


def collate(rows: Sequence[Row], length: int, pad: int, label_tokens: Sequence[int]) -> dict[str, Any]:
    """Tensors of a batch: ids and positions [B, T], mask [B, 1, T, T] (true where seen), and flat losses.

    `targets` [S, labels] belong to the losses numbered in `soft`; `label_tokens` are the categories' first tokens.
    """
    import torch

    count = len(rows)
    arrays = {name: np.full((count, length), fill, dtype=np.int64) for name, fill in _FILL.items()}
    arrays["ids"][:] = pad
    sources: list[int] = []
    soft: list[int] = []
    targets: list[np.ndarray] = []
    for n, row in enumerate(rows):
        for name, array in arrays.items():
            values = getattr(row, name)
            array[n, : len(values)] = values
        soft += [len(sources) + place for place in row.soft]
        targets += list(row.soft.values())
        sources += [n * length + place for place in row.sources]
    ids, positions, blocks, parts = (torch.from_numpy(a) for a in arrays.values())
    same = blocks[:, :, None] == blocks[:, None, :]
    seen = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
    return {
        "ids": ids,
        "positions": positions,
        "mask": (same & seen).tril()[:, None],
        "sources": torch.tensor(sources),
        "labels": torch.tensor([label for row in rows for label in row.labels]),
        "weights": torch.tensor([weight for row in rows for weight in row.weights]),
        "soft": torch.tensor(soft, dtype=torch.long),
        "targets": torch.from_numpy(np.array(targets, dtype=np.float32).reshape(len(soft), len(label_tokens))),
    }


_FILL = {"ids": 0, "positions": 0, "blocks": -1, "parts": 0}
