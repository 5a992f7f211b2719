"""A tiny random Llama in the place of an instruction-tuned model, with the shipped tokenizer; recipes and users."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oppu.config import load
from oppu.recipe import profile_recipe
from oppu.records import Item, User
from tests.tiny_models import tiny_config

ROOT = Path(__file__).resolve().parents[1]
TEXT = "the senate voted on a new film about climate and schools after long talks with singers in Paris"
WORDS = TEXT.split()
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
CHAT += "{% if add_generation_prompt %} [assistant]{% endif %}"


def save_model(folder: Path, chat: str | None = None, context: int = 512) -> Path:
    """A model folder; its weights are large, so that answers differ from prompt to prompt."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data/models/oppu-tiny")
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), max_position_embeddings=context, initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def recipe_for(folder: Path, name: str = "LaMP_2N", seed: int = 0, **changes: object) -> dict:
    """The profile recipe of a config with this model."""
    settings = {"backend": "llm", "path": str(folder), "history_tokens": 60, "max_new_tokens": 8} | changes
    return profile_recipe(load({"tasks": [name], "seed": seed, "profiles": settings}), name)


def user(number: int, items: int = 8, mark: str = "") -> User:
    """A made-up news reader; item n says so in its text."""
    history = tuple(
        Item(str(n), None, {"text": f"item{n} {mark}{' '.join(WORDS[(number + n) % 9 :][:6])}.", "category": "crime"})
        for n in range(items)
    )
    return User(f"u-{number:012x}", f"someone {number}", history, ())
