"""Rows of tokens that a model reads piece by piece: keys and values are kept, and who sees whom is told by positions.

The mask is made from true positions, not from columns, so rows may be padded anywhere and sliding windows stay exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from oppu.attention import as_wanted, windows
from oppu.models import head_at

PADDING = -1
"""The position of a column that holds no token."""


class Layer(DynamicLayer):
    """One layer's keys and values [B, heads, columns, size], `start` being those of what the rows begin with.

    Room is made once for all columns: transformers' own layer copies all that was for every token that comes.
    """

    def __init__(self, columns: int, start: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.columns, self.used = columns, 0
        if start is not None:
            self.update(*start)

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the next columns; returns all so far."""
        if self.keys is None or self.values is None:
            self.keys, self.values = self._room_for(key_states), self._room_for(value_states)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        first, self.used = self.used, self.used + key_states.shape[2]
        self.keys[:, :, first : self.used] = key_states
        self.values[:, :, first : self.used] = value_states
        return self.keys[:, :, : self.used], self.values[:, :, : self.used]

    def _room_for(self, states: Tensor) -> Tensor:
        return states.new_empty(*states.shape[:2], self.columns, states.shape[3])

    def continued(self, rows: Tensor, columns: int) -> Layer:
        """These rows with room for so many columns."""
        assert self.keys is not None and self.values is not None, "nothing was read"
        return Layer(columns, (self.keys[rows, :, : self.used], self.values[rows, :, : self.used]))

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

    def _mask(self, positions: Tensor, window: int | None, tree: Tensor | None) -> Tensor:
        """[B, 1, Q, columns so far] bool: True where a token may see a column. Padding sees padding: no NaN."""
        query, key = positions[:, :, None], self.positions[:, None, : self.used]
        mask = (key <= query) & (key != PADDING)
        if window is not None:
            mask &= query - key < window
        if tree is not None:
            mask[:, -len(tree) :, -len(tree) :] &= tree
        return (mask | ((query == PADDING) & (key == PADDING)))[:, None]

    def continued(self, rows: Tensor, columns: int) -> Rows:
        """These rows (one may stand more than once) as new ones, with room for so many columns."""
        new = Rows(self.model, len(rows), columns)
        new.used = self.used
        new.positions[:, : self.used] = self.positions[rows, : self.used]
        layers = [layer for layer in self.cache.layers if isinstance(layer, Layer)]
        new.cache = Cache(layers=[layer.continued(rows, columns) for layer in layers])
        return new


def left_padded(lists: Sequence[Sequence[int]], pad: int, device: torch.device) -> Tensor:
    """[B, T], every list ending in the last column."""
    width = max(map(len, lists))
    return torch.tensor([[pad] * (width - len(x)) + list(x) for x in lists], device=device)
