"""How adapters are trained: the parts base, personal, ia3 and prompt of the configuration (oppu/config.py)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from oppu.tasks import Closed

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(ge=0, lt=1)]


class Training(Closed):
    """What trains an adapter of any kind."""

    epochs: Positive | None = Field(None, description="passes over the examples; null: the task's own")
    lr: float | None = Field(None, gt=0, description="peak learning rate; null: the task's own")
    weight_decay: float | None = Field(None, ge=0, description="AdamW's weight decay ('R2 reg.'); null: the task's own")
    batch_size: Positive | None = Field(None, description="examples per optimiser step; null: the task's own")
    max_items: Positive | None = Field(
        None, description="learn from at most this many of a user's newest history items (retrieval sees all)"
    )
    warmup: Rate = Field(
        0.1, description="share of the steps over which the learning rate rises; then it falls linearly"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm, per user")
    tokens_per_batch: Positive | None = Field(
        None, description="tokens of one forward pass; null: found from free memory. Does not change results"
    )
    checkpoint_minutes: float | None = Field(
        10.0,
        ge=0,
        description="unfinished adapters are kept every so many minutes (0: after every pass; null: never), so that a"
        " job that was cut off goes on from there. Does not change results",
    )


class Lora(Training):
    """Settings of one LoRA training."""

    rank: Positive | None = Field(None, description="r; null: the task's own (Table 4)")
    alpha: float | None = Field(None, description="LoRA's alpha; null: the rank, so a scale of 1")
    dropout: Rate = Field(0.0, description="dropout on the LoRA branch")
    target_modules: list[str] | None = Field(
        None,
        min_length=1,
        description="layers it is added to, by name; null: the query and value projections, found per architecture",
    )


class Own(Closed):
    """What a kind of adapter other than LoRA has of its own; all else is as in `personal`."""

    epochs: Positive | None = Field(None, description="passes over the examples; null: as in `personal`")
    batch_size: Positive | None = Field(None, description="examples per optimiser step; null: as in `personal`")


class Ia3(Own):
    """(IA)3: learned vectors scale keys, values and the input of the down projection."""

    # PEFT's guide to (IA)3 with AdamW; T-Few has 3e-3 with Adafactor.
    lr: float = Field(8e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's; it pulls to 0, while a scale of 1 changes nothing")
    target_modules: list[str] | None = Field(
        None, min_length=1, description="layers that are scaled, by name; null: k_proj, v_proj and down_proj, or PEFT's"
    )
    feedforward_modules: list[str] | None = Field(
        None, description="those of them whose input is scaled, not the output; null: down_proj, or PEFT's"
    )


class VirtualPrompt(Own):
    """Prompt tuning: learned virtual tokens before every prompt, counted in `model.max_length`."""

    virtual_tokens: Positive = Field(20, description="their number; 20 are .001 % of Llama-2-7B, the paper's share")
    init: Literal["random", "vocabulary"] = Field(
        "random", description="they begin as normal noise (PEFT's default), or as embeddings of tokens drawn at random"
    )
    # PEFT's guide to prompt tuning of causal models, with AdamW.
    lr: float = Field(3e-2, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's")


class Ia3Training(Ia3, Training):
    """All settings of one (IA)3 training."""


class PromptTraining(VirtualPrompt, Training):
    """All settings of one prompt tuning."""


class Base(Lora):
    """Task adaption of the base model (section 2.2)."""

    examples: Literal["queries", "queries+history"] = Field(
        "queries", description="what the base learns from: base users' queries (the paper), or their histories too"
    )


TRAININGS: dict[str, type[Training]] = {"ia3": Ia3Training, "prompt": PromptTraining}
"""PEFT word -> its settings; all others are LoRA's."""


class Personal(Lora):
    """Training of the personal adapters (section 2.3)."""

    start: Literal["initial", "pooled", "previous"] = Field(
        "initial",
        description="where a user's adapter begins: as every other (the paper); `pooled`, one trained on all test"
        " users; or `previous`: items added to a history are learned by the adapter that is there, anything else anew",
    )
    replay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="start `previous`: so many of the user's old items, drawn, are learned again per new one",
    )
