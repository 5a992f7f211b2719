"""Pre-training of the tiny language model that the demonstration runs on (`oppu tiny-lm`)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from oppu.files import new_folder
from oppu.tiny_lm_examples import Lessons
from oppu.tiny_lm_rows import Row, Weights, block, collate, make_tokenizer
from oppu.tiny_lm_teacher import labels
from oppu.tiny_lm_texts import training_texts
from oppu.tiny_lm_vectors import topical_vectors

log = logging.getLogger(__name__)

# How often a lesson is drawn. Categories with and without context are over half of the tokens.
DRAWS = {
    "plain_news": 0.20,
    "plain_paper": 0.15,
    "category": 1.00,
    "category_user": 1.60,
    "headline": 0.30,
    "title": 0.12,
    "headline_user": 0.80,
    "title_user": 0.08,
    "citation": 0.05,
    "tag": 0.05,
    "rating": 0.05,
    "paraphrase": 0.05,
}


@dataclass(frozen=True)
class TinyLM:
    """Shape and training of the model; the defaults made the committed one."""

    vocabulary: int = 8192
    width: int = 192
    layers: int = 4
    heads: int = 6
    inner: int = 512
    positions: int = 1024
    steps: int = 2400
    seed: int = 0
    lr: float = 2e-3
    weight_decay: float = 0.1
    warmup: int = 50
    clip: float = 1.0
    dropout: float = 0.05
    average: float = 0.995
    """Decay of the running mean of the weights; the mean is what is saved."""
    row_tokens: int = 512
    batch_tokens: int = 2048
    long_every: int = 6
    """Every so many steps the rows are of `positions` tokens, so that all positions are learned."""
    weights: Weights = field(default_factory=Weights)


def train_tiny_lm(
    corpus: Path,
    data: Path,
    out: Path,
    steps: int | None = None,
    seed: int | None = None,
    config: TinyLM | None = None,
    card: bool = True,
) -> list[dict[str, float]]:
    """Train the model and write its folder (bf16 safetensors, tokenizer, config, training.json, model card).

    `corpus` is the gzipped JSON lines of texts, `data` the sample folder that has `lamp/`; `steps` and `seed`
    take the place of the config's. Without `card` nothing is measured and no card is written. The same
    config gives the same weights on one thread, and on more to rounding. Returns the loss every hundred steps.
    """
    import torch

    config = config or TinyLM()
    config = replace(config, steps=config.steps if steps is None else steps, seed=config.seed if seed is None else seed)
    documents = training_texts(corpus, data)
    log.info("%d documents to learn from", len(documents))
    tokenizer = make_tokenizer(documents, config.vocabulary, config.positions)
    lessons = Lessons(documents, config.seed)
    torch.manual_seed(config.seed)
    model = _model(config, tokenizer)
    with torch.no_grad():
        vectors = topical_vectors(documents, tokenizer, config.width, config.seed)
        model.model.embed_tokens.weight.copy_(torch.from_numpy(vectors))
    began = time.monotonic()
    losses, tokens = _train(model, _batches(lessons, tokenizer, config), label_tokens(tokenizer), config)
    seconds = time.monotonic() - began
    log.info("%d tokens in %.0f s", tokens, seconds)
    from oppu.tiny_lm_card import save, write_card

    facts = {"documents": len(documents), "tokens": tokens, "config": asdict(config), "losses": losses}
    with new_folder(out) as folder:
        save(model, tokenizer, folder, facts)
        if card:
            from oppu.tiny_lm_validate import references, validate

            write_card(folder, references(corpus, data) | validate(folder, data))
    return losses


def label_tokens(tokenizer: Any) -> list[int]:
    """The first token of each category as an answer; they differ, so that one token decides the category."""
    first = [tokenizer(f" {name}", add_special_tokens=False)["input_ids"][0] for name in labels()]
    if len(set(first)) != len(first):
        raise ValueError("two categories begin with the same token: train the tokenizer on more of the instructions")
    return first


def _model(config: TinyLM, tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        intermediate_size=config.inner,
        max_position_embeddings=config.positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(shape)


def _batches(lessons: Lessons, tokenizer: Any, config: TinyLM) -> Iterator[dict[str, Any]]:
    """One batch for each step, each from its own generator."""
    names = list(DRAWS)
    chances = np.array(list(DRAWS.values()))
    first = label_tokens(tokenizer)
    for step in range(config.steps):
        rng = np.random.default_rng([config.seed, 2, step])
        length = config.positions if step % config.long_every == config.long_every - 1 else config.row_tokens
        rows: list[Row] = []
        row, blocks = Row(), 0
        while len(rows) < max(1, config.batch_tokens // length):
            name = names[int(rng.choice(len(names), p=chances / chances.sum()))]
            found = block(tokenizer, getattr(lessons, name)(rng), config.weights, length, rng)
            if found is None:
                continue
            if len(row.ids) + len(found) > length:
                rows.append(row)
                row = Row()
            row.add(found, blocks)
            blocks += 1
        yield collate(rows, length, tokenizer.pad_token_id, first)


def _drop(model: Any, share: float) -> list[Any]:
    """Dropout on the embeddings and on what each layer adds; Llama itself has none there."""
    from torch import nn

    drop = nn.Dropout(share)
    places = [model.model.embed_tokens]
    places += [part for layer in model.model.layers for part in (layer.self_attn.o_proj, layer.mlp)]
    return [place.register_forward_hook(lambda module, args, out: drop(out)) for place in places]


def batch_loss(model: Any, batch: dict[str, Any], first: list[int]) -> tuple[Any, Any]:
    """Weighted mean of the losses, and the losses of the categories alone.

    Where a label is a distribution, its cross-entropy counts, over the whole vocabulary. The head runs only where
    something is predicted.
    """
    import torch
    from torch.nn.functional import log_softmax

    hidden = model.model(input_ids=batch["ids"], position_ids=batch["positions"], attention_mask=batch["mask"])[0]
    logits = model.lm_head(hidden.flatten(0, 1)[batch["sources"]])
    chances = log_softmax(logits, dim=-1)
    losses = -chances.gather(1, batch["labels"][:, None])[:, 0]
    soft = -(chances[batch["soft"]][:, first] * batch["targets"]).sum(1)
    losses = torch.index_put(losses, (batch["soft"],), soft)
    return (losses * batch["weights"]).sum() / batch["weights"].sum(), losses[batch["soft"]].detach()


def _train(model: Any, batches: Iterator[dict[str, Any]], first: list[int], config: TinyLM) -> tuple[list, int]:
    """The training loop; leaves the mean weights in the model. Returns losses and the number of tokens."""
    import torch

    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share_of_lr(step, config))
    mean = [p.detach().clone() for p in model.parameters()]
    hooks = _drop(model, config.dropout)
    losses: list[dict[str, float]] = []
    recent, tokens = 0.0, 0
    soft: list[float] = []
    model.train()
    for step, batch in enumerate(batches, start=1):
        loss, categories = batch_loss(model, batch, first)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        keep = min(config.average, step / (step + 10))
        with torch.no_grad():
            for kept, now in zip(mean, model.parameters(), strict=True):
                kept.lerp_(now, 1 - keep)
        recent += loss.item()
        soft += [float(categories.mean())] if len(categories) else []
        tokens += batch["ids"].numel()
        if step % 100 == 0 or step == config.steps:
            count = step - (losses[-1]["step"] if losses else 0)
            category = round(float(np.mean(soft)), 4) if soft else float("nan")
            losses.append({"step": step, "loss": round(recent / count, 4), "category_loss": category})
            log.info("step %d of %d: loss %.3f, categories %.3f", step, config.steps, recent / count, category)
            recent, soft = 0.0, []
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for kept, now in zip(mean, model.parameters(), strict=True):
            now.copy_(kept)
    model.eval()
    return losses, tokens


def _share_of_lr(step: int, config: TinyLM) -> float:
    if step < config.warmup:
        return (step + 1) / config.warmup
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
