"""How many tokens one pass may have: found from free memory, halved where memory runs out, never a crash.

No result depends on it: rows of one step that are computed in several passes add up to the same gradient.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from oppu.records import InputError
from oppu.rows import Chunk, Piece, passes

log = logging.getLogger(__name__)

MOST = {"cpu": 2048, "cuda": 32768}
"""Tokens of a pass that more would not make faster: a CPU's caches hold no more (benchmarks/train.py --tokens)."""
SHARE = 0.8
"""Of what is free: the rest is for what is there for a moment only."""
LABELS = 0.25
"""Target tokens per token, at most: the head runs at those alone."""
COPIES = 2
"""Copies of a token's queries, keys and values in attention's blocks: padding, and a prefix's once per item."""
PIECE = 200
"""Tokens per copy of an adapter in a pass, at least on average."""
CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device; on a CPU within the control group that a batch system sets."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    free: int = psutil.virtual_memory().available
    try:
        limit, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no such file, or "max": no limit
        return free
    return min(free, max(limit - used, 0))


def training_bytes(model: PreTrainedModel, adapter: int = 0) -> float:
    """Bytes that one token of a training pass keeps for the backward pass.

    Frozen layers keep nothing of their inputs. What is kept, per layer: the norms' inputs in float32; queries, keys and
    values as attention's blocks copy them (COPIES), and attention's output; three vectors of the MLP; the inputs of all
    layers that may carry LoRA. Besides: the logits of the labels, and an adapter of `adapter` parameters with its
    gradient for each piece.
    """
    text: Any = model.config.get_text_config()
    embedding: Any = model.get_input_embeddings()
    size: int = embedding.weight.dtype.itemsize
    hidden, heads = text.hidden_size, text.num_attention_heads
    head = getattr(text, "head_dim", None) or hidden // heads
    q, kv = heads * head, (getattr(text, "num_key_value_heads", None) or heads) * head
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    attention = 2 * q + COPIES * (q + 2 * kv)
    layer = 2 * hidden * 4 + (attention + 3 * inner + 2 * hidden + q + inner) * size
    return text.num_hidden_layers * layer + LABELS * 16 * text.vocab_size + adapter / PIECE * (12 + 2 * size)


def tokens_that_fit(model: PreTrainedModel, free: int, adapter: int = 0) -> int:
    """Tokens of a training pass that `free` bytes have room for; at least one, as one example is always tried."""
    return max(int(SHARE * free / training_bytes(model, adapter)), 1)


@dataclass
class Budget:
    """Tokens of one pass. It shrinks where memory runs out, and does not grow again."""

    tokens: int

    @classmethod
    def found(cls, configured: int | None, model: PreTrainedModel, adapter: int = 0, users: int = 0) -> Budget:
        """What the config says, or, where it says nothing, what has room beside AdamW's state of `users` adapters."""
        if configured is not None:
            return cls(configured)
        most = MOST.get(model.device.type, MOST["cpu"])
        free = free_memory(model.device) - users * adapter * 2 * 4
        return cls(min(most, tokens_that_fit(model, free, adapter)))

    def passes(
        self,
        chunks: Sequence[Chunk],
        run: Callable[[Sequence[Piece]], None],
        sparing: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        """Have `run` do all these chunks in passes that fit; `run` keeps nothing of a pass that fails.

        Where memory runs out, the budget is halved, with a warning, and what is left is laid out anew. An example that
        does not fit alone is tried once more in the `sparing` context; InputError where that fails too.
        """
        todo = passes(chunks, self.tokens)
        while todo:
            pieces = todo.pop(0)
            if _fits(run, pieces):
                continue
            tokens = sum(piece.tokens for piece in pieces)
            if len(pieces) == 1 and len(pieces[0].items) == 1:
                self._alone(pieces, tokens, run, sparing)
                continue
            self.tokens = tokens // 2
            log.warning("out of memory in a pass of %d tokens; from here on at most %d", tokens, self.tokens)
            todo = passes(chunks, self.tokens, [piece for several in (pieces, *todo) for piece in several])

    def _alone(
        self,
        pieces: Sequence[Piece],
        tokens: int,
        run: Callable[[Sequence[Piece]], None],
        sparing: Callable[[], AbstractContextManager[None]] | None,
    ) -> None:
        if sparing is not None:
            log.warning("out of memory in a single example of %d tokens; it is done with checkpoints", tokens)
            with sparing():
                if _fits(run, pieces):
                    return
        raise InputError(
            [f"an example of {tokens} tokens does not fit into memory, even alone; lower model.max_length"]
        )


def _fits(run: Callable[[Sequence[Piece]], None], pieces: Sequence[Piece]) -> bool:
    """Run it; False where memory ran out, with what it had taken given back."""
    try:
        run(pieces)
        return True
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    # Only here is the traceback gone, and with it the pass's tensors.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return False


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in the host."""
    said = ("out of memory", "DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in said)


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, each decoder layer keeps its input alone and is computed again in the backward pass.

    The model stays in eval mode; hooks within the layers run again too, so a bank must still be in use then. Nothing is
    drawn at random in a frozen model, and a bank's dropout is counted, so the second time equals the first. Raises
    InputError for a model without such layers.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise InputError([f"{type(model).__name__} has no layers that can be checkpointed"])
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
