"""Prompt construction: phi_t, phi_r and phi_p of section 2.2, in the shape of appendix I, within a token budget."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

from oppu.records import Item
from oppu.tasks import Task, render


class Tokenizer(Protocol):
    """What the budget needs of a Hugging Face fast tokenizer."""

    def __call__(self, text: str, **options: object) -> dict[str, list]:
        """`input_ids`, and with `return_offsets_mapping` each token's (start, end) in the text."""
        ...

    def __hash__(self) -> int:
        """Tokenizers are told apart by identity."""
        ...


@dataclass(frozen=True)
class Prompt:
    """One prompt in parts: profile, retrieved items (best first), and the named fields of the query."""

    task: Task
    query: dict[str, str]
    items: tuple[Item, ...] = ()
    profile: str | None = None
    label: str | None = None
    """For a plain history item in training: its field's label stands where the query would (section 3)."""
    cut_history: int = 0
    cut_query: int = 0
    """Tokens that the budget took from history texts and from the query's own text."""

    def __str__(self) -> str:
        lines = [one_line(self.profile)] if self.profile else []
        lines += [one_line(self.task.item_text(item)) for item in self.items]
        return "\n".join([*lines, self.label if self.label is not None else render(self.task.prompt, self.query)])


def one_line(text: str) -> str:
    """The text with its line breaks as spaces: one profile, one item, one line each."""
    return re.sub(r"\s*[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+\s*", " ", text)


def ids(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """Token ids of a text, with the tokenizer's own beginning-of-text token when it has one."""
    return list(_ids(tokenizer, text, special))


@lru_cache(maxsize=8)
def _ids(tokenizer: Tokenizer, text: str, special: bool) -> tuple[int, ...]:
    """A prompt is asked for twice in a row: to see whether it fits, and as what is learned."""
    return tuple(tokenizer(text, add_special_tokens=special)["input_ids"])


def shorten(tokenizer: Tokenizer, text: str, excess: int) -> tuple[str, int]:
    """The text less its last `excess` tokens (all of it at most), and how many went."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    kept = max(len(offsets) - excess, 0)
    # Where the first token to go begins: several tokens can share one character, which then goes whole.
    end = min(offsets[kept][0], len(text) - 1) if kept < len(offsets) else 0
    return text[:end].rstrip(), len(offsets) - kept


def fit(prompt: Prompt, tokenizer: Tokenizer, budget: int) -> Prompt:
    """The prompt cut to `budget` tokens.

    What is cut is the longest history text (a retrieved item's longest field, or the profile), then the query's
    longest text, each from its end; never the instruction. Raises ValueError when the instruction alone is over.
    """
    while (excess := len(ids(tokenizer, str(prompt))) - budget) > 0:
        shorter = _cut_history(prompt, tokenizer, excess) or _cut_query(prompt, tokenizer, excess)
        if shorter is None:
            raise ValueError(f"{prompt.task.name}: the instruction alone takes {excess} tokens over {budget}")
        prompt = shorter
    return prompt


def _cut_history(prompt: Prompt, tokenizer: Tokenizer, excess: int) -> Prompt | None:
    texts = {(n, name): i.fields[name] for n, i in enumerate(prompt.items) for name in prompt.task.history}
    texts = {place: text for place, text in texts.items() if place[1] != prompt.task.y}
    if prompt.profile:
        texts[-1, ""] = prompt.profile
    if not any(texts.values()):
        return None
    number, name = max(texts, key=lambda place: len(texts[place]))
    text, gone = shorten(tokenizer, texts[number, name], excess)
    gone = max(gone, 1)
    if number < 0:
        return replace(prompt, profile=text or None, cut_history=prompt.cut_history + gone)
    item = prompt.items[number]
    item = replace(item, fields=item.fields | {name: text})
    items = (*prompt.items[:number], item, *prompt.items[number + 1 :])
    return replace(prompt, items=items, cut_history=prompt.cut_history + gone)


def _cut_query(prompt: Prompt, tokenizer: Tokenizer, excess: int) -> Prompt | None:
    if not any(prompt.query.values()):
        return None
    name = max(prompt.query, key=lambda field: len(prompt.query[field]))
    text, gone = shorten(tokenizer, prompt.query[name], excess)
    return replace(prompt, query=prompt.query | {name: text}, cut_query=prompt.cut_query + max(gone, 1))
