"""Tokenised examples: what a base or a personal adapter learns from, and what a query asks (sections 2.2 and 3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from oppu.prompts import Prompt, Tokenizer, fit, ids
from oppu.records import InputError, Item, Query, User
from oppu.retrieval import BM25, Draws, Search, retrieve_for_history, retrieve_for_queries
from oppu.rows import Example
from oppu.setting import Augmentation
from oppu.tasks import Task


@dataclass(frozen=True)
class Context:
    """What turns a user's items and queries into prompts, the same for every user of a setting."""

    task: Task
    augmentation: Augmentation
    tokenizer: Tokenizer
    eos: int
    max_length: int
    seed: int
    pool: Sequence[Item] | None = None
    """Items of base-training users, for the augmentation `random`; None: the user's own past."""
    search: Search = BM25
    lead: tuple[int, ...] = ()
    """Virtual tokens before every prompt (prompt tuning, `rows.virtual`); they take their part of `max_length`."""

    @property
    def room(self) -> int:
        """Tokens that a prompt and its answer may take."""
        return self.max_length - len(self.lead)

    def draws(self, user: User) -> Draws:
        """Where a user's random items come from."""
        return Draws(self.seed, user.key, self.pool)


def history_examples(
    context: Context,
    user: User,
    profile: str | None,
    counts: Counter[str],
    max_items: int | None = None,
    chosen: Collection[int] | None = None,
) -> list[Example]:
    """One example per history item, oldest first; retrieval sees only items strictly before each (section 3).

    With `max_items`, only the newest so many items become examples, with `chosen` those at these places in the history;
    what is retrieved for them is any earlier item.

    A pair (x, y) is learned as phi(x, D^{<t}, s_u) -> y, a plain text as its label -> x. An item whose answer alone
    is over the budget is left out and counted.
    """
    task = context.task
    retrieved = retrieve_for_history(task, user.history, context.augmentation, context.draws(user), context.search)
    examples = []
    first = max(len(user.history) - max_items, 0) if max_items else 0
    wanted = range(first, len(user.history)) if chosen is None else set(chosen)
    for place, (item, items) in enumerate(zip(user.history, retrieved, strict=True)):
        if place not in wanted:
            continue
        if task.pair:
            prompt = Prompt(task, task.item_fields(item), items, profile)
            example = _example(context, prompt, item.fields[task.y or ""], counts)
        else:
            prompt = Prompt(task, {}, items, profile, label=task.plain_label)
            text = task.item_text(item)[len(task.plain_label) :].strip()
            example = _example(context, prompt, text, counts, cut_answer=True)
        if example is None:
            counts["items_too_long"] += 1
        else:
            examples.append(example)
    return examples


def query_examples(context: Context, user: User, profile: str | None, counts: Counter[str]) -> list[Example]:
    """One example per query with its gold, for the base (section 2.2)."""
    prompts = _query_prompts(context, user, profile)
    found = [_example(context, p, q.gold or "", counts) for q, p in zip(user.queries, prompts, strict=True)]
    counts["items_too_long"] += found.count(None)
    return [example for example in found if example is not None]


def query_prompts(
    context: Context, user: User, profile: str | None, answer_tokens: int, counts: Counter[str]
) -> list[tuple[Query, Prompt, list[int]]]:
    """Each query of a user with its prompt and token ids, room being left for the answer."""
    out = []
    for query, prompt in zip(user.queries, _query_prompts(context, user, profile), strict=True):
        try:
            fitted = fit(prompt, context.tokenizer, context.room - answer_tokens)
        except ValueError as error:
            raise InputError([f"{user.key}: query {query.id}: {error}; raise model.max_length"]) from None
        counts["cut_history_tokens"] += fitted.cut_history
        counts["cut_query_tokens"] += fitted.cut_query
        out.append((query, fitted, [*context.lead, *ids(context.tokenizer, str(fitted))]))
    return out


def _query_prompts(context: Context, user: User, profile: str | None) -> list[Prompt]:
    task = context.task
    retrieved = retrieve_for_queries(
        task, user.history, user.queries, context.augmentation, context.draws(user), context.search
    )
    return [
        Prompt(task, task.query_fields(query.input), items, profile)
        for query, items in zip(user.queries, retrieved, strict=True)
    ]


def _example(
    context: Context, prompt: Prompt, answer: str, counts: Counter[str], cut_answer: bool = False
) -> Example | None:
    target = [*ids(context.tokenizer, " " + answer, special=False), context.eos]
    room = context.room - len(target)
    if cut_answer and room < context.room // 2:
        shorter = target[: context.room // 2 - 1]
        counts["cut_history_tokens"] += len(target) - len(shorter) - 1
        target = [*shorter, context.eos]
        room = context.room - len(target)
    try:
        fitted = fit(prompt, context.tokenizer, room)
    except ValueError:
        return None
    counts["cut_history_tokens"] += fitted.cut_history
    counts["cut_query_tokens"] += fitted.cut_query
    text = str(fitted)
    start = ids(context.tokenizer, text)
    return Example((*context.lead, *start), tuple(target if cut_answer else _target(context, text, start, answer)))


def _target(context: Context, text: str, start: list[int], answer: str) -> list[int]:
    """An answer as tokens behind a prompt (its text, its tokens), end-of-text token included."""
    whole = ids(context.tokenizer, f"{text} {answer}")
    if whole[: len(start)] == start and len(whole) > len(start):
        return [*whole[len(start) :], context.eos]
    return [*ids(context.tokenizer, " " + answer, special=False), context.eos]


def label_targets(context: Context) -> list[list[int]]:
    """The task's labels as tokens, as they are learned behind a prompt; empty for a task without labels.

    All prompts of a task end with the same words, and only these are before the label here.
    """
    text = context.task.prompt[context.task.prompt.rindex("}") + 1 :]
    start = ids(context.tokenizer, text)
    return [_target(context, text, start, label) for label in context.task.labels or []]
