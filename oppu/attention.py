"""Attention over a packed line of tokens, as if each example stood alone: in blocks of like size, or by one mask."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oppu.packing import Packed
from oppu.records import InputError

FULL, SLIDING = "full_attention", "sliding_attention"
BLOCKS = "oppu_blocks"


def windows(model: PreTrainedModel) -> dict[str, int | None]:
    """The kinds of attention layers the model has, and how many tokens back each sees (None: all of them).

    Raises InputError for a model whose layers mix what stands side by side in a packed line: it would train wrong.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [SLIDING if window else FULL])
    problems = []
    if strange := sorted(kinds - {FULL, SLIDING}):
        problems.append(f"has layers of kind {', '.join(strange)}")
    if SLIDING in kinds and not window:
        problems.append("has sliding-window layers and no window in its config")
    if "local" in getattr(config, "attention_layers", []):
        problems.append("counts its local windows by place in the row")
    if getattr(config, "alibi", False) or "position_ids" not in inspect.signature(model.forward).parameters:
        problems.append("takes positions from the place in the row")
    if problems:
        raise InputError([f"{type(model).__name__} {p}; packed training needs plain attention" for p in problems])
    return {kind: window if kind == SLIDING else None for kind in sorted(kinds)}


@dataclass
class Block:
    """B spans of like size: attention runs on them as on a padded batch, each with a copy of its prefix's keys.

    A query for each of Q tokens (a shorter span repeats its last), a key for the prefix's and the span's own, K in all.
    """

    places: Tensor
    """[B, Q, 1] how many of its keys a query sees, less one: its true position."""
    length: int
    """K"""
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """[B, 1, Q, K] bool: True where a query sees a key."""
        if window not in self.masks:
            back = self.places - torch.arange(self.length, device=self.places.device)
            self.masks[window] = (back >= 0 if window is None else (back >= 0) & (back < window))[:, None]
        return self.masks[window]


@dataclass
class Layout:
    """A packed line's blocks, and which tokens' vectors they read."""

    blocks: list[Block]
    queries: Tensor
    """Tokens of all blocks' [B, Q] queries, one block after the other."""
    keys: Tensor
    """Tokens of all blocks' [B, K] keys."""
    order: Tensor
    """[N] where each token stands in `queries`."""
    inner: str
    """The attention that runs within a block: the model's own."""
    seen: list[int | None] = field(default_factory=list)
    """The window of each layer that has asked."""

    def of_blocks(self, x: Tensor, index: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """x [N, H, d] at `queries` or `keys`, for each block as [B, H, its length, d]."""
        rows = [len(block.places) for block in self.blocks]
        parts = Gather.apply(x, index).split([b * n for b, n in zip(rows, lengths, strict=True)])
        return [part.unflatten(0, (b, -1)).transpose(1, 2) for part, b in zip(parts, rows, strict=True)]


def layout_of(spans: Tensor, inner: str, device: torch.device) -> Layout:
    """A packed line's spans [S, 4] in blocks in which no row is padded by half its size."""
    sizes = torch.stack([spans[:, 1], spans[:, 1] + spans[:, 3]], 1)
    steps = (2 * sizes.double().log2()).ceil()  # two sizes of blocks per doubling
    blocks, order, offset = [], torch.empty(int(spans[:, 1].sum()), dtype=torch.long), 0
    queries, keys = [], []
    for step in steps.unique(dim=0):
        start, length, prefix_start, prefix = spans[(steps == step).all(1)].unsqueeze(-1).unbind(1)
        within = torch.arange(int(length.max()))
        places = within.minimum(length - 1)
        k = torch.arange(int((length + prefix).max())).minimum(length + prefix - 1)
        queries.append((start + places).flatten())
        keys.append(torch.where(k < prefix, prefix_start + k, start + k - prefix).flatten())
        real = within < length
        order[(start + places)[real]] = offset + real.flatten().nonzero().squeeze(-1)
        offset += real.numel()
        blocks.append(Block((prefix + places).unsqueeze(-1).to(device, non_blocking=True), k.shape[1]))
    read, kept, order = (part.to(device, non_blocking=True) for part in (torch.cat(queries), torch.cat(keys), order))
    return Layout(blocks, read, kept, order, inner)


class Gather(torch.autograd.Function):
    """x [N, H, d] at index [L] -> [L, H, d]; backward adds in a fixed order, on a GPU too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        """Copy the rows."""
        ctx.save_for_backward(index)
        ctx.size = x.shape
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Add the gradients of a row's copies."""
        (index,) = ctx.saved_tensors
        total = grads[0].new_zeros(ctx.size)
        if total.is_cuda:  # index_add_ has no fixed order there
            return total.index_put_((index,), grads[0], accumulate=True), None
        return total.index_add_(0, index, grads[0]), None


_layouts: list[Layout] = []


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Transformers' attention interface: query, key, value [1, H, N, d] -> [1, N, H, d], block by block."""
    layout, window = _layouts[-1], more.get("sliding_window")
    layout.seen.append(window)
    inner = _inner(module, layout.inner)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    lengths = [block.length for block in layout.blocks]
    rows = (
        layout.of_blocks(q, layout.queries, [block.places.shape[1] for block in layout.blocks]),
        layout.of_blocks(k, layout.keys, lengths),
        layout.of_blocks(v, layout.keys, lengths),
    )
    parts = []
    for block, *qkv in zip(layout.blocks, *rows, strict=True):
        mask = _as_wanted(block.mask(window), layout.inner, query.dtype)
        parts.append(inner(module, *qkv, mask, **more)[0].flatten(0, 1))
    return torch.cat(parts).index_select(0, layout.order).unsqueeze(0), None


AttentionInterface.register(BLOCKS, _attend)


def _inner(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Any]]:
    """The model's own attention function; eager ones are written beside the model, with its own soft caps and sinks."""
    if name == "eager":
        found: Callable[..., tuple[Tensor, Any]] = sys.modules[type(module).__module__].eager_attention_forward
        return found
    return ALL_ATTENTION_FUNCTIONS["sdpa"]


def _as_wanted(mask: Tensor, inner: str, dtype: torch.dtype) -> Tensor:
    """Eager attention adds its mask to the scores; the others take it as it is."""
    if inner != "eager":
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@contextlib.contextmanager
def in_blocks(model: PreTrainedModel, layout: Layout) -> Iterator[None]:
    """Within the block, the model's attention runs over a packed line laid out so; checkpoints need backward in it."""
    config = model.config.get_text_config()
    config._attn_implementation = BLOCKS
    _layouts.append(layout)
    try:
        yield
    finally:
        _layouts.pop()
        config._attn_implementation = layout.inner


def takes_blocks(model: PreTrainedModel) -> bool:
    """Whether every layer's attention goes through transformers' attention interface and says its window.

    Else the line gets one mask, which costs N^2. Raises InputError where that would be wrong too.
    """
    wanted = windows(model)
    config = model.config.get_text_config()
    one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    spans = torch.tensor([[0, 1, 0, 0]])
    layout = layout_of(spans, config._attn_implementation, model.device)
    with contextlib.suppress(AttributeError, TypeError), torch.no_grad(), in_blocks(model, layout):
        model(input_ids=one, position_ids=one, attention_mask=None, use_cache=False)
    if len(layout.seen) == config.num_hidden_layers and set(layout.seen) == set(wanted.values()):
        return True
    check_packing(model)
    return False


def check_packing(model: PreTrainedModel) -> None:
    """Raise InputError unless the model can be given masks of our own: one per kind of layer where these differ."""
    if len(windows(model)) == 1:
        return
    one = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    mask = as_wanted(model, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device))
    try:
        with torch.no_grad():
            model(input_ids=one, attention_mask={FULL: mask, SLIDING: mask}, use_cache=False)
    except (AttributeError, TypeError) as error:
        name = type(model).__name__
        raise InputError([f"{name} takes no mask per kind of layer; packed training cannot keep its window"]) from error


def as_wanted(model: PreTrainedModel, mask: Tensor) -> Tensor:
    """A mask as the model's own attention takes it."""
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype  # type: ignore[assignment]
    return _as_wanted(mask, model.config.get_text_config()._attn_implementation, dtype)


def attention_mask(model: PreTrainedModel, packed: Packed) -> Tensor | dict[str, Tensor]:
    """A packed line's mask for a model that takes no blocks, [1, 1, N, N]; one per kind where its layers differ."""
    masks = {kind: as_wanted(model, packed.mask(window)) for kind, window in windows(model).items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


@contextlib.contextmanager
def attention_over(model: PreTrainedModel, packed: Packed, blocks: bool) -> Iterator[Tensor | dict[str, Tensor] | None]:
    """Within the block, the model may run over the packed line; yields the attention_mask it must be given."""
    if not blocks:
        yield attention_mask(model, packed)
        return
    inner = model.config.get_text_config()._attn_implementation
    with in_blocks(model, layout_of(packed.spans, inner, packed.input_ids.device)):
        yield None
