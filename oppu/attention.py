"""What packed rows ask of a model's attention: its windows kept by true positions, or the model refused."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel

from oppu.packing import Packed
from oppu.records import InputError

FULL, SLIDING = "full_attention", "sliding_attention"


def windows(model: PreTrainedModel) -> dict[str, int | None]:
    """The kinds of attention layers the model has, and how many tokens back each sees (None: all of them).

    Raises InputError for a model whose layers mix what stands side by side in a packed row: it would train wrong.
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


def check_packing(model: PreTrainedModel) -> None:
    """Raise InputError unless packed rows can be trained with this model as if each example stood alone."""
    if len(windows(model)) == 1:
        return
    one = torch.ones(1, 1, dtype=torch.long, device=model.device)
    mask = as_wanted(model, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device))
    try:
        with torch.no_grad():
            model(input_ids=one, attention_mask={FULL: mask, SLIDING: mask}, use_cache=False)
    except (AttributeError, TypeError) as error:
        name = type(model).__name__
        raise InputError([f"{name} takes no mask per kind of layer; packed training cannot keep its window"]) from error


def attention_mask(model: PreTrainedModel, packed: Packed) -> Tensor | dict[str, Tensor]:
    """The packed batch's mask as the model takes it, [R, 1, T, T]; one per kind where its layers differ."""
    masks = {kind: as_wanted(model, packed.mask_within(window)) for kind, window in windows(model).items()}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def as_wanted(model: PreTrainedModel, mask: Tensor) -> Tensor:
    """Eager attention adds its mask to the scores; the others take it as it is."""
    if model.config.get_text_config()._attn_implementation != "eager":
        return mask
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype  # type: ignore[assignment]
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
