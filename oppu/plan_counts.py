"""What each step of a task computes, counted by the code that the step itself will run: examples, prompts, rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from oppu.config import Config
from oppu.examples import Context, history_examples, query_examples, query_prompts
from oppu.plan_data import Data, spread
from oppu.profiles import extractive
from oppu.prompts import Tokenizer
from oppu.records import User
from oppu.retrieval import Search
from oppu.rows import Chunk, Example, next_batch, passes, plan, virtual
from oppu.seeds import seed_text
from oppu.setting import parse_augmentation
from oppu.tasks import task as task_named
from oppu.training_settings import PromptTraining, Training

USERS = 16
"""Users that a count is taken from, where it is taken from a part."""
PASS = 16384
"""Tokens of a pass, where the run is to find them from free memory."""
EARLIER = 64
"""Items before those that are counted, there: enough to retrieve from."""


@dataclass(frozen=True)
class Work:
    """What a step computes. Of examples that are trained on, every epoch counts."""

    examples: float = 0
    tokens: float = 0
    """Each example by itself."""
    packed: float = 0
    """A prompt's beginning that a user's examples of a step share, once per pass: what the model runs on."""
    pairs: float = 0
    """Pairs of tokens in attention: every token of an example with all of it."""
    labels: float = 0
    """Places at which the head runs."""

    def times(self, count: float, tokens: float = 1.0) -> Work:
        """So many times the work, with so many tokens in place of each."""
        each = count * tokens
        return Work(
            examples=self.examples * count,
            tokens=self.tokens * each,
            packed=self.packed * each,
            pairs=self.pairs * each * tokens,
            labels=self.labels * each,
        )

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def training_work(examples: Sequence[Sequence[Example]], plans: Sequence[list[list[int]]], budget: int) -> Work:
    """What `training.train` computes for adapters with these examples and steps; exact."""
    left = {user: len(steps) for user, steps in enumerate(plans) if steps}
    chunks: dict[int, Chunk] = {}
    work = Work()
    while left:
        for user in left.keys() - chunks.keys():
            step = plans[user][len(plans[user]) - left[user]]
            chunks[user] = Chunk(user, tuple(examples[user][n] for n in step))
        batch = next_batch(chunks, left, budget)
        for piece in (piece for pieces in passes(batch, budget) for piece in pieces):
            chunk = batch[piece.chunk]
            items = [len(chunk.examples[n]) for n in piece.items]
            pairs = chunk.prefix**2 + sum((n - chunk.prefix) * n for n in items)
            work += Work(packed=piece.tokens, pairs=pairs)
        for chunk in batch:
            work += Work(len(chunk.examples), sum(map(len, chunk.examples)), labels=chunk.labels)
            del chunks[chunk.user]
            left[chunk.user] -= 1
        left = {user: steps for user, steps in left.items() if steps}
    return work


@dataclass(frozen=True)
class Task:
    """A task whose steps are counted: on users with about `limit` examples a step, the others being like them."""

    config: Config
    name: str
    data: Data
    tokenizer: Tokenizer
    per_token: float
    """Tokens that each of the tokenizer's stands for."""
    limit: int

    def _context(self, augmentation: str, peft: str = "none") -> Context:
        what = parse_augmentation(augmentation)
        if what.retriever == "dense":  # an encoder would have to run; BM25's items are about as long
            what = replace(what, retriever="bm25")
        own = self.config.retrieval.random == "own" or not what.random
        pool = None if own else [item for user in self.data.base for item in user.history]
        room = int(self.config.model.max_length / self.per_token)
        search = Search(self.config.retrieval.query)
        training = self.config.training(peft, self.name)
        count = training.virtual_tokens if isinstance(training, PromptTraining) else 0
        lead = virtual(round(count / self.per_token))
        return Context(task_named(self.name), what, self.tokenizer, 0, room, self.config.seed, pool, search, lead)

    def _profile(self, augmentation: str, user: User) -> str | None:
        if not parse_augmentation(augmentation).profile:
            return None
        if self.config.profiles.backend == "llm":  # not written yet: as long as it may become
            return " ".join(["word"] * int(self.config.profiles.max_new_tokens / self.per_token))
        return extractive(task_named(self.name), user.history)

    def items(self, users: Sequence[User], lora: Training) -> int:
        """History items of these users that one epoch trains on."""
        return sum(min(len(user.history), lora.max_items or len(user.history)) for user in users)

    def base(self, augmentation: str) -> Work:
        """Training the base of an augmentation (section 2.2)."""
        lora, context = self.config.base_lora(self.name), self._context(augmentation)
        histories = lora.examples == "queries+history"

        def size(user: User, most: int | None = None) -> int:
            items = self.items([user], lora) if histories else 0
            return len(user.queries) + min(items, items if most is None else most)

        most = None if sum(map(size, self.data.base)) <= self.limit else -(-self.limit // USERS)
        chosen = spread(self.data.base, lambda user: size(user, most), self.limit)
        examples: list[Example] = []
        for user in chosen:
            profile = self._profile(augmentation, user)
            examples += query_examples(context, user, profile, Counter())
            if size(user, most) > len(user.queries):
                examples += history_examples(context, user, profile, Counter(), size(user, most) - len(user.queries))
        order = seed_text(self.config.seed, self.name, augmentation, "base", "data order")
        work = self._trained([examples], [order], lora)
        counted = sum(size(user, most) for user in chosen)
        return work.times(self.data.base_times * sum(map(size, self.data.base)) / max(counted, 1), self.per_token)

    def personal(self, augmentation: str, peft: str = "lora") -> Work:
        """Training all test users' adapters of an augmentation, or the one that they share (section 2.3)."""
        lora, context = self.config.training(peft, self.name), self._context(augmentation, peft)
        chosen, most = self.data.test, lora.max_items
        if self.items(chosen, lora) > self.limit:  # several users still: their steps fill passes together
            chosen, batch = spread(chosen, lambda _: 1, USERS), int(lora.batch_size or 1)
            whole_steps = max(self.limit // len(chosen) // batch, 1) * batch
            most = min(whole_steps, lora.max_items or whole_steps)
            chosen = [replace(user, history=user.history[-most - EARLIER :]) for user in chosen]
        examples = [
            history_examples(context, user, self._profile(augmentation, user), Counter(), most) for user in chosen
        ]
        names = [user.key for user in chosen]
        if peft == "pooled":
            examples, names = [[example for own in examples for example in own]], ["pooled"]
        orders = [seed_text(self.config.seed, self.name, name, "data order") for name in names]
        work = self._trained(examples, orders, lora)
        counted = self.items(chosen, lora.model_copy(update={"max_items": most}))
        times = self.data.test_times * self.items(self.data.test, lora) / max(counted, 1)
        return work.times(times, self.per_token)

    def _trained(self, examples: Sequence[Sequence[Example]], orders: Sequence[str], lora: Training) -> Work:
        steps = [
            plan(len(own), int(lora.epochs or 0), int(lora.batch_size or 0), order)
            for own, order in zip(examples, orders, strict=True)
        ]
        return training_work(examples, steps, max(int((lora.tokens_per_batch or PASS) / self.per_token), 1))

    @property
    def answer(self) -> int:
        """Tokens of the longest answer."""
        return self.config.generation.max_new_tokens or task_named(self.name).output_tokens

    def prompts(self, augmentation: str, peft: str = "none") -> Work:
        """Reading the prompts of all queries in one setting, one prompt at a time."""
        context = self._context(augmentation, peft)
        chosen = spread(self.data.test, lambda user: len(user.queries), self.limit)
        work = Work()
        for user in chosen:
            profile, answer = self._profile(augmentation, user), int(self.answer / self.per_token)
            for *_, tokens in query_prompts(context, user, profile, answer, Counter()):
                n = len(tokens)
                work += Work(1, n, n, n * n, 1 / self.per_token)
        return work.times(self.data.queries / max(work.examples, 1), self.per_token)
