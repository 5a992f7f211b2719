"""Rows of tokens that a model reads piece by piece: keys and values are kept, and who sees whom is told by positions.

The mask is made from true positions, not from columns, so rows may be padded anywhere and sliding windows stay exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from oppu.attention import as_wanted, windows
from oppu.models import head_at

PADDING = -1
"""The position of a column that holds no token."""


class Layer(DynamicLayer):
    """One layer's keys and values [B, heads, columns, size].

    Room is made once for all columns: transformers' own layer copies all that was for every token that comes.
    """

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.used = columns, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the next columns; returns all so far."""
        if self.keys is None or self.values is None:
            self.keys, self.values = self._room(key_states), self._room(value_states)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        first, self.used = self.used, self.used + key_states.shape[2]
        self.keys[:, :, first : self.used] = key_states
        self.values[:, :, first : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def _room(self, states: Tensor, rows: int | None = None) -> Tensor:
        return states.new_empty(len(states) if rows is None else rows, states.shape[1], self.columns, states.shape[3])

    @classmethod
    def gathered(cls, sources: Sequence[tuple[Layer, Tensor]], columns: int) -> Layer:
        """The chosen rows of several layers, one below the other, with room for so many columns."""
        new, count = cls(columns), sum(len(chosen) for _, chosen in sources)
        new.used = max(layer.used for layer, _ in sources)
        for name in ("keys", "values"):
            room = new._room(getattr(sources[0][0], name), count)
            parts = room.split([len(chosen) for _, chosen in sources])
            for part, (layer, chosen) in zip(parts, sources, strict=True):
                part[:, :, : layer.used] = getattr(layer, name)[chosen, :, : layer.used]
                part[:, :, layer.used : new.used] = 0  # a gap is not seen, but multiplied with zero
            setattr(new, name, room)
        new.dtype, new.device, new.is_initialized = room.dtype, room.device, True
        return new

    def get_seq_length(self) -> int:
        """Columns so far."""
        return self.used


class Rows:
    """B rows with room for so many columns. `positions` [B, columns]: each token's place in its row, or PADDING."""

    def __init__(self, model: PreTrainedModel, rows: int, columns: int) -> None:
        self.model, self.used = model, 0
        self.windows = windows(model)
        self.cache = Cache(layer_class_to_replicate=partial(Layer, columns))  # type: ignore[arg-type]
        self.positions = torch.full((rows, columns), PADDING, device=model.device)

    def read(self, ids: Tensor, positions: Tensor, at: Tensor | None = None, tree: Tensor | None = None) -> Tensor:
        """Logits after the next tokens: ids and positions [B, Q] -> [B * Q, V], or [M, V] at the places `at` [M] of
        the B * Q. Of the last N tokens each sees those only that `tree` [N, N] says; all see what stood before.
        """
        here = slice(self.used, self.used + ids.shape[1])
        self.used = here.stop
        self.positions[:, here] = positions
        masks = {
            kind: as_wanted(self.model, self._mask(positions, window, tree)) for kind, window in self.windows.items()
        }
        with nullcontext() if at is None else head_at(self.model, at):
            logits: Tensor = self.model(
                input_ids=ids,
                position_ids=positions.clamp(min=0),
                attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
                past_key_values=self.cache,
                use_cache=True,
            ).logits
        return logits.flatten(0, -2)

    def layer(self, number: int) -> Layer:
        """The keys and values of one layer."""
        layer = self.cache.layers[number]
        assert isinstance(layer, Layer)
        return layer

    def _mask(self, positions: Tensor, window: int | None, tree: Tensor | None) -> Tensor:
        """[B, 1, Q, columns so far] bool: True where a token may see a column. Padding sees padding: no NaN."""
        query, key = positions[:, :, None], self.positions[:, None, : self.used]
        mask = (key <= query) & (key != PADDING)
        if window is not None:
            mask &= query - key < window
        if tree is not None:
            mask[:, -len(tree) :, -len(tree) :] &= tree
        return (mask | ((query == PADDING) & (key == PADDING)))[:, None]


def gathered(sources: Sequence[tuple[Rows, Tensor]], columns: int, done: bool = True) -> Rows:
    """The chosen rows of several (one may stand more than once) as new ones, with room for so many columns.

    Shorter ones get a gap before what comes next. The sources are `done`: each layer is let go as soon as it is copied.
    """
    new = Rows(sources[0][0].model, sum(len(chosen) for _, chosen in sources), columns)
    new.used = max(rows.used for rows, _ in sources)
    for part, (rows, chosen) in zip(new.positions.split([len(c) for _, c in sources]), sources, strict=True):
        part[:, : rows.used] = rows.positions[chosen, : rows.used]
    layers: list[Any] = []
    for number in range(len(sources[0][0].cache.layers)):
        layers.append(Layer.gathered([(rows.layer(number), chosen) for rows, chosen in sources], columns))
        if done:
            for rows, _ in sources:
                rows.cache.layers[number] = Layer(0)
    new.cache = Cache(layers=layers)
    return new


def left_padded(lists: Sequence[Sequence[int]], pad: int, device: torch.device) -> Tensor:
    """[B, T], every list ending in the last column."""
    width = max(map(len, lists))
    return torch.tensor([[pad] * (width - len(x)) + list(x) for x in lists], device=device)
