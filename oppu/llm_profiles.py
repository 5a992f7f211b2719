"""Profiles written by an instruction-tuned model, asked with appendix J's prompts (section 2.2).

The history in a prompt is a random sample of the user's own items: drawn by a seed that depends on no other user, as
many as have room, back in time order.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator

from oppu.config import Generation
from oppu.decoding import batches
from oppu.generation import generate
from oppu.models import load_model, load_tokenizer
from oppu.progress import Stage
from oppu.prompts import ids, one_line, shorten
from oppu.records import InputError, User
from oppu.seeds import seed_of
from oppu.tasks import render, tasks

log = logging.getLogger(__name__)


class Writer:
    """The model of a profile recipe, loaded. Raises InputError where its context is too short for the task's prompt."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.task, self.seed = tasks()[recipe["task"]["name"]], recipe["seed"]
        self.settings, self.tokens_per_batch = recipe["settings"], recipe["runtime"]["tokens_per_batch"]
        where = recipe["runtime"]["model"]
        self.tokenizer = load_tokenizer(where["path"], where["revision"])
        device = Accelerator().device
        self.model = load_model(**where, dtype=self.settings["dtype"], device=device)
        context = getattr(self.model.config, "max_position_embeddings", None)
        self.room = self.settings["history_tokens"]
        self.longest: int | None = None
        if context is not None:
            self.longest = context - self.settings["max_new_tokens"]
            self.room = min(self.room, self.longest - len(self._chat("")))
        if self.room <= 0:
            found = f"the context of {where['path']} ({context} tokens) has no room for a history"
            raise InputError([f"profiles: {found}; lower profiles.max_new_tokens, or take another model"])

    def prompt(self, user: User) -> list[int]:
        """Token ids of what the model is asked about a user: at most the model's context less the answer."""
        room = self.room
        while True:
            tokens = self._chat("\n".join(self.lines(user, room)))
            # The whole can take a token or two more than its parts do, so room goes until it fits.
            if self.longest is None or len(tokens) <= self.longest:
                return tokens
            room -= len(tokens) - self.longest

    def lines(self, user: User, room: int) -> list[str]:
        """The items that a user's prompt carries, one line each, oldest first; together at most `room` tokens.

        At most `items` are drawn at random, each cut to `item_words`; one that no longer has room is passed over.
        Where none has, the first drawn is cut.
        """
        draw = random.Random(seed_of(self.seed, self.task.name, user.key, "profile items"))
        order = draw.sample(range(len(user.history)), len(user.history))[: self.settings["items"]]
        lines: dict[int, str] = {}
        left = room
        for n in order:
            line = self._line(self.task.item_text(user.history[n]))
            if (cost := self._cost(line)) <= left:
                lines[n] = line
                left -= cost
        if not lines:
            line = self._line(self.task.item_text(user.history[order[0]]))
            lines[order[0]], _ = shorten(self.tokenizer, line, self._cost(line) - max(room, 0))
        return [lines[n] for n in sorted(lines)]

    def answers(self, prompts: dict[str, list[int]]) -> Iterator[dict[str, str]]:
        """The greedy answers to these users' prompts, by user key, in batches of `tokens_per_batch` prompt tokens."""
        keys, done, tokens = list(prompts), 0, 0
        settings = Generation(tokens_per_batch=self.tokens_per_batch)
        with Stage(f"{self.task.name} profiles", unit="users") as stage:
            for batch in batches([len(prompts[key]) for key in keys], self.tokens_per_batch):
                asked = [prompts[keys[n]] for n in batch]
                texts = generate(self.model, self.tokenizer, asked, settings, self.settings["max_new_tokens"])
                done, tokens = done + len(batch), tokens + sum(map(len, asked))
                stage(done, len(keys), tokens)
                yield {keys[n]: text for n, text in zip(batch, texts, strict=True)}

    def _line(self, text: str) -> str:
        line, most = one_line(text), self.settings["item_words"]
        words = line.split()
        return " ".join(words[:most]) if most and len(words) > most else line

    def _cost(self, line: str) -> int:
        return len(ids(self.tokenizer, line + "\n", special=False))

    def _chat(self, history: str) -> list[int]:
        """The task's prompt as a chat: by the config's template, else the tokenizer's own, else as it is.

        Texts are put in as they are: braces in them are never read as fields. A template that begins with the
        beginning-of-text token gets no second one.
        """
        prompt = render(self.task.profile_prompt, {"history": history})
        template = self.settings["chat_template"]
        if template is not None:
            started = self.tokenizer.bos_token and template.startswith(self.tokenizer.bos_token)
            return ids(self.tokenizer, template.replace("{prompt}", prompt), special=not started)
        if self.tokenizer.chat_template:
            chat = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
            return ids(self.tokenizer, str(text), special=False)
        return ids(self.tokenizer, prompt)
