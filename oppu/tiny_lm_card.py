"""The tiny language model's folder: weights, tokenizer, and the model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oppu.files import read_json, write_bytes, write_json

CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# oppu-tiny

A toy Llama of {parameters:,} parameters ({embedding:,} of them the tied embedding), pre-trained from scratch by this
project so that its demonstration runs on a laptop. It knows the seven instruction formats of `oppu/tasks.yaml`, with
and without retrieved items and profiles. It is good for showing personal adapters at work, and for nothing else.

Made by

    oppu tiny-lm data/corpus.jsonl.gz data/sample data/models/oppu-tiny --steps {steps} --seed {seed}

with the defaults of `oppu.tiny_lm.TinyLM` ({tokens:,} tokens, fp32, AdamW, saved as bf16; `training.json` has its
values, `DRAWS` the shares of the lessons). On one thread the same command gives the same weights (a test
of a few steps); on two, a second run agreed only to rounding (losses at step 200: 3.484 and 3.485).

## What it read
{documents:,} documents: news of the News Category Dataset v2 (R. Misra, 2018, doi 10.13140/RG.2.2.20331.18729; CC0) and
papers' titles and abstracts of the ACL Anthology (CC BY 4.0), from `data/corpus.jsonl.gz` and the train files of
`data/sample`. Left out, by normalised text: everything that a dev (test) user of any task wrote, and everything that
the {validation_users} base users with the longest histories of each task wrote.

For news categories a bag-of-words model (TF-IDF, logistic regression) on the same articles gave soft labels to cut,
thinned and mixed texts. Users were made up from the corpus: each prefers one category, so that retrieved labels and
profiles tell something. The instructions of LaMP_1, LaMP_2M, LaMP_3 and LaMP_7 carry made-up answers.

## Loss while training
The weighted mean over all lessons, and that of categories against their soft labels, each over the last hundred steps.

| step | loss | categories |
|---|---|---|
{losses}

## On the validation users
Users it has not read; every history item and query with something before it (LaMP_2N: {cases} texts). Losses are nats
per token of the true headline or title. `oppu.tiny_lm_validate.validate` computes them.

| measure | value |
|---|---|
{measures}

## Limits
A toy: it writes headlines that are hardly sentences. English only; news of February to May 2018 and papers on language
processing. Of the news it read, most are politics and entertainment, and five of LaMP's fifteen categories do not
occur, so it answers with them almost never. The tags, ratings and paraphrases it was shown are made up. It repeats the
biases of its sources.

Licence of the model: Apache-2.0.
"""


def save(model: Any, tokenizer: Any, folder: Path, facts: dict[str, Any]) -> None:
    """Write bf16 weights, tokenizer, config and training.json."""
    import torch

    counts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "embedding": model.get_input_embeddings().weight.numel(),
    }
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / "training.json", facts | counts)


def write_card(model_folder: Path, measures: dict[str, float]) -> None:
    """Write README.md from training.json and what `validate` and `references` measured."""
    from oppu.tiny_lm_texts import VALIDATION_USERS

    facts = read_json(model_folder / "training.json")
    text = CARD.format(
        parameters=facts["parameters"],
        embedding=facts["embedding"],
        documents=facts["documents"],
        tokens=facts["tokens"],
        steps=facts["config"]["steps"],
        seed=facts["config"]["seed"],
        validation_users=VALIDATION_USERS,
        cases=round(measures["LaMP_2N cases"]),
        losses="\n".join(
            f"| {row['step']} | {row['loss']:.2f} | {row['category_loss']:.2f} |"
            for row in facts["losses"]
            if row["step"] % 400 == 0 or row is facts["losses"][-1]
        ),
        measures="\n".join(f"| {name} | {value:.3f} |" for name, value in measures.items() if "cases" not in name),
    )
    write_bytes(model_folder / "README.md", text.encode(), 0o644)
