"""Cost before you start: what a configuration will train and predict, by task and step, before anything has run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from oppu.config import Config
from oppu.plan_counts import PASS, Task, Work
from oppu.plan_data import PAPER_USERS, data_of, tokenizer_of
from oppu.records import InputError
from oppu.setting import OWN, parse_augmentation, seeded
from oppu.shape import BYTES, Shape, known, shape_of
from oppu.tasks import task as task_named
from oppu.training_settings import Training

HOUR = 3600.0
TRAINED = 4
"""Bytes of a personal parameter, on disk and at work: float32."""


@dataclass(frozen=True)
class Gpu:
    """What a GPU does: dense TFLOP/s in the model's dtype, GB/s, GB; and the share of the FLOP/s one gets."""

    name: str
    tflops: float
    bandwidth: float
    memory: float
    utilisation: float

    def hours(self, flops: float, bytes_read: float = 0.0) -> float:
        """Hours for so many FLOPs, or for reading so many bytes of memory where that takes longer."""
        return max(flops / (self.tflops * 1e12 * self.utilisation), bytes_read / (self.bandwidth * 1e9)) / HOUR


@dataclass(frozen=True)
class Step:
    """One step of a task in one setting. FLOPs, hours and bytes are None where the model's shape is unknown."""

    task: str
    step: str
    setting: str
    jobs: int
    examples: float
    tokens: float
    packed: float
    flops: float | None
    hours: float | None
    disk: float | None


def gpu_named(name: str, utilisation: float, dtype: str) -> Gpu:
    """A GPU of plan.yaml, by name in any case; InputError lists those there are."""
    table = {known_name.lower(): known_name for known_name in known()["gpus"]}
    problems = []
    if name.lower() not in table:
        problems.append(f"--gpu: no GPU {name!r}; there are {', '.join(table.values())}")
    if not 0 < utilisation <= 1:
        problems.append(f"--utilisation: {utilisation} is not above 0 and at most 1")
    if dtype == "float64":
        problems.append("model.dtype: float64 has no GPU figures here; plan with float32")
    if problems:
        raise InputError(problems)
    values = known()["gpus"][table[name.lower()]]
    tflops = values["single" if dtype == "float32" else "half"]
    return Gpu(table[name.lower()], tflops, values["bandwidth"], values["memory"], utilisation)


@dataclass(frozen=True)
class Plan:
    """All steps of a configuration, and what was assumed for them."""

    steps: list[Step]
    notes: list[str]
    gpu: Gpu
    totals: dict[str, float | None]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "gpu": asdict(self.gpu),
            "steps": [asdict(step) for step in self.steps],
            "totals": self.totals,
            "notes": self.notes,
        }


def make_plan(config: Config, gpu: Gpu, limit: int = 200) -> Plan:
    """Count every step of a configuration; on all examples of a step up to about `limit`, then on a part of them.

    Reads files only; never the network, and never a model's weights.
    """
    shape, source = shape_of(config.model.path, config.model.revision)
    tokenizer, per_token, counted = tokenizer_of(config)
    notes = [f"model {config.model.path}: shape from {source}; tokens by {counted}"]
    steps: list[Step] = []
    memory: list[float] = []
    for name in config.tasks:
        data = data_of(config, name)
        if data is None:
            where = f"{config.folder(name)}/{name}"
            notes.append(f"{name}: UNKNOWN, not in the totals: no files in {where}, no row in Table 5")
            continue
        users = round(len(data.test) * data.test_times)
        notes.append(f"{name}: {users} test users, {round(len(data.base) * data.base_times)} base users; {data.note}")
        task = Task(config, name, data, tokenizer, per_token, limit)
        steps += _Steps(task, gpu, shape, users).all()
        memory += [_memory(config, name, shape, users)] if shape else []
    if any("Table 5" in note for note in notes):
        notes.append(
            "Table 5 has no lengths of plain items (taken: the input's), no base users' histories (taken: 8 items each)"
            f" and, for `dev`, no number of users (taken: {PAPER_USERS}, as in the paper)"
        )
    notes += _assumptions(config, gpu, limit)
    return Plan(steps, notes, gpu, _totals(config, steps, shape, memory))


@dataclass(frozen=True)
class _Steps:
    """The steps of one task."""

    task: Task
    gpu: Gpu
    shape: Shape | None
    users: int

    def all(self) -> Iterator[Step]:
        config, name = self.task.config, self.task.name
        base, personal, prompts = (cache(f) for f in (self.task.base, self.task.personal, self.task.prompts))
        cohorts = -(-self.users // config.users_per_job)
        if any(parse_augmentation(a).profile for a in config.augmentations):
            yield self._profiles()
        for augmentation in dict.fromkeys(a for a, *_ in config.settings):
            lora = config.base_lora(name)
            yield self._trained("base", augmentation, 1, base(seeded(augmentation)[0]), lora, 1)
        for augmentation, peft, history in config.settings:
            setting, what = f"{augmentation}/{peft}/{history}", seeded(augmentation)[0]
            if peft == "lora" and config.lora(name).start == "pooled" and "pooled" not in config.peft:
                pooled = f"{augmentation}/pooled/{history}"
                yield self._trained("personal", pooled, 1, personal(what, "pooled"), config.lora(name), 1)
            if peft in (*OWN, "pooled"):
                jobs, adapters = (1, 1) if peft == "pooled" else (cohorts, self.users)
                training = config.training(peft, name)
                yield self._trained("personal", setting, jobs, personal(what, peft), training, adapters)
            yield self._predicted(setting, cohorts, prompts(what, peft if peft == "prompt" else "none"))

    def _trained(self, step: str, setting: str, jobs: int, work: Work, lora: Training, adapters: int) -> Step:
        flops = hours = disk = None
        if self.shape is not None:
            size = self.shape.adapter(lora)
            flops = self.shape.training(work.packed, work.pairs, work.labels, size)
            hours, disk = self.gpu.hours(flops), float(adapters * size * TRAINED)
        return Step(self.task.name, step, setting, jobs, work.examples, work.tokens, work.packed, flops, hours, disk)

    def _predicted(self, setting: str, jobs: int, work: Work) -> Step:
        budget = self.task.config.generation.tokens_per_batch
        batches = max(-(-work.tokens // budget), jobs)
        flops, hours = self._generated(self.shape, work, self.task.answer, batches, self.task.config.model.dtype)
        return Step(
            self.task.name, "prediction", setting, jobs, work.examples, work.tokens, work.packed, flops, hours, 0.0
        )

    def _generated(
        self, shape: Shape | None, work: Work, answer: int, batches: float, dtype: str
    ) -> tuple[float | None, float | None]:
        """FLOPs and hours of reading prompts and writing answers of full length; each token reads all weights."""
        if shape is None:
            return None, None
        read = shape.forward(work.packed, work.pairs, work.labels)
        new = work.examples * (answer - 1)
        wrote = shape.forward(new, answer * work.tokens + new * answer / 2, new)
        weights = batches * answer * shape.parameters * BYTES[dtype]
        return read + wrote, self.gpu.hours(read) + self.gpu.hours(wrote, weights)

    def _profiles(self) -> Step:
        """Profiles s_u of test and base users: counting costs nothing; a model reads and writes as much as it may."""
        settings, task = self.task.config.profiles, task_named(self.task.name)
        users = self.users + len(self.task.data.base) * self.task.data.base_times
        if settings.backend == "extractive":
            return Step(task.name, "profiles", "extractive", 0, users, 0, 0, 0.0, 0.0, 0.0)
        length = settings.history_tokens + len(task.profile_prompt.split()) * self.task.per_token
        tokens = users * length
        work = Work(users, tokens, tokens, tokens * length, users)
        shape, _ = shape_of(settings.path or "", settings.revision)
        batches = -(-tokens // settings.tokens_per_batch)
        flops, hours = self._generated(shape, work, settings.max_new_tokens, batches, settings.dtype)
        return Step(task.name, "profiles", "llm", 1, users, tokens, tokens, flops, hours, 0.0)


def _memory(config: Config, name: str, shape: Shape, users: int) -> float:
    """Bytes at the peak of personal training: weights, a cohort's adapters with AdamW's state, one pass's activations.

    An estimate. Of each token and layer, about sixteen vectors of the hidden width and four of the MLP's are kept.
    """
    lora = config.lora(name)
    dtype = BYTES[config.model.dtype]
    weights = shape.parameters * BYTES[config.model.quantization or config.model.dtype]
    kinds = [config.training(peft, name) for peft in config.peft if peft in OWN] or [lora]
    cohort = min(users, config.users_per_job) * max(map(shape.adapter, kinds)) * TRAINED * 4
    token = shape.layers * (16 * shape.hidden + 4 * shape.intermediate) * dtype
    return weights + cohort + (lora.tokens_per_batch or PASS) * token


def _totals(config: Config, steps: Sequence[Step], shape: Shape | None, memory: list[float]) -> dict[str, float | None]:
    totals: dict[str, float | None] = {
        name: _sum([getattr(step, name) for step in steps]) for name in ("jobs", "tokens", "packed", "flops", "hours")
    }
    totals["personal_adapter_bytes"] = _sum([step.disk for step in steps if step.step == "personal"])
    totals["base_adapter_bytes"] = _sum([step.disk for step in steps if step.step == "base"])
    totals["weight_bytes"] = shape.parameters * BYTES[config.model.dtype] if shape else None
    totals["memory_bytes"] = max(memory, default=None)
    merged_here = config.model.quantization in ("8bit", "4bit")
    host = (shape.parameters * BYTES[config.model.dtype] if merged_here else shape.head * 4.0) if shape else None
    totals["host_memory_bytes"] = host
    return totals


def _sum(values: Sequence[float | None]) -> float | None:
    known_values = [value for value in values if value is not None]
    return sum(known_values) if len(known_values) == len(values) else None


def _assumptions(config: Config, gpu: Gpu, limit: int) -> list[str]:
    notes = [
        f"a step with over {limit} examples is counted on about so many of them, of users spread evenly",
        "tokens: every example by itself; packed: the beginning that a user's prompts of a step share once per pass",
        "FLOPs of training: 4 per parameter and packed token (frozen weights get no gradient), attention 12 per pair of"
        " tokens, layer and width; of prediction: 2 and 4, answers of full length",
        f"hours: {gpu.tflops:g} TFLOP/s in {config.model.dtype} at {gpu.utilisation:.0%}; writing answers reads all"
        " weights for each token. Start-up and loading come on top: a small model takes longer than this",
        "memory is a rough estimate; the base goes from its files to the GPU tensor by tensor, merged there layer"
        " by layer (8bit and 4bit: in the host's memory)",
    ]
    if any("dense" in a for a in config.augmentations):
        notes.append("dense retrieval: items counted as BM25 finds them, the encoder not at all")
    if config.profiles.backend == "llm":
        notes.append("profiles: history_tokens read and max_new_tokens written for each user, at most")
    return notes
