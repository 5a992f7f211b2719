"""Answers to prompts, each under its own user's adapter: greedy or sampled, the same whatever the batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from oppu.attention import check_packing
from oppu.bank import Bank
from oppu.cache import left_padded
from oppu.config import Generation
from oppu.decoding import Asked, batches, decode
from oppu.records import InputError

log = logging.getLogger(__name__)


def sample(settings: Generation, scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """A token [B] for each row of scores [B, V], from the row's own generator.

    Temperature, top-k and top-p as usual; then Gumbel noise, one number per rank: the likeliest perturbed token is a
    sample of the distribution.
    """
    ranked, tokens = scores.float().topk(min(settings.top_k, scores.shape[-1]))
    ranked = ranked / settings.temperature
    shares = ranked.softmax(-1)
    ranked[shares.cumsum(-1) - shares >= settings.top_p] = -torch.inf  # the best token always stays
    uniform = torch.stack([torch.rand(ranked.shape[-1], generator=g) for g in generators])
    noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
    best = (ranked + noise.to(ranked.device)).argmax(-1, keepdim=True)
    return tokens.gather(1, best)[:, 0]


class SeededSampling(LogitsProcessor):
    """Sampling that depends on a row's own seed only, so that a batch's make-up changes no answer.

    For transformers' greedy decoding: all tokens but the sampled one are ruled out.
    """

    def __init__(self, settings: Generation, seeds: Sequence[int]) -> None:
        self.settings = settings
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] -> 0 for the sampled token of each row and -inf for the others."""
        tokens = sample(self.settings, scores, self.generators)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: Generation,
    max_new_tokens: int,
    bank: Bank | None = None,
    users: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    lean: bool = True,
    share: bool = True,
    progress: Callable[[int, int, int], object] | None = None,
) -> list[str]:
    """The answers to tokenised prompts, in their order; greedy, or sampled with one seed per prompt.

    Prompt n is answered with the adapter of `users[n]` of the bank, or by the base model alone without a bank.
    An answer is what follows the prompt's last token, less special tokens and outer white space. Raises ValueError
    for an empty prompt, or where users or seeds are needed and missing.

    `lean` and `share` change the time only: whether our own loop is used wherever it serves the model, or transformers'
    `generate`; and whether that loop reads once what a user's prompts begin with. `progress` is told of (prompts
    answered, prompts in all, their tokens).
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("generate: a prompt has no tokens")
    if bank is not None and (users is None or len(users) != len(prompts)):
        raise ValueError("generate: a bank needs one user per prompt")
    if settings.sample and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError("generate: sampling needs one seed per prompt")
    asked = Asked(model, prompts, bank, users, progress)
    if lean and _serves(model):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds or []]

        def choose(numbers: Sequence[int], logits: Tensor) -> Tensor:
            if settings.sample:
                return sample(settings, logits, [generators[n] for n in numbers])
            return logits.float().argmax(-1)  # in float32, as transformers does

        ends = end_tokens(model, tokenizer)
        answers = decode(asked, choose, ends, max_new_tokens, settings.tokens_per_batch, share)
    else:
        answers = _by_transformers(asked, tokenizer, settings, max_new_tokens, seeds)
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)).strip() for tokens in answers]


def end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """What ends an answer: the tokenizer's end-of-text token, and any that the model itself ends with."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return sorted(ends)


def _serves(model: PreTrainedModel) -> bool:
    """Whether our own loop can keep this model's keys and values: as packed training, it needs plain attention."""
    try:
        check_packing(model)
    except InputError as error:
        log.info("%s; answers are made by transformers' own generate", error)
        return False
    return True


def _by_transformers(
    asked: Asked, tokenizer: Tokenizer, settings: Generation, max_new_tokens: int, seeds: Sequence[int] | None
) -> list[list[int]]:
    """The answers' tokens by Hugging Face's `generate`: any model, one padded batch at a time, nothing shared."""
    answers: list[list[int]] = [[] for _ in asked.prompts]
    for batch in batches([len(p) for p in asked.prompts], settings.tokens_per_batch):
        sampling = LogitsProcessorList()
        if settings.sample and seeds is not None:
            sampling.append(SeededSampling(settings, [seeds[n] for n in batch]))
        prompts = [asked.prompts[n] for n in batch]
        ids = left_padded(prompts, _pad(tokenizer), asked.model.device)
        with asked.adapters(batch):
            output = asked.model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=left_padded([[1] * len(p) for p in prompts], 0, asked.model.device),
                generation_config=_greedy(asked.model, tokenizer, max_new_tokens),
                logits_processor=sampling,
            )
        for number, tokens in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            answers[number] = tokens
        asked.told([n for n, tokens in enumerate(answers) if tokens])
    return answers


def _pad(tokenizer: Tokenizer) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ValueError("generate: the tokenizer has neither a pad nor an end-of-text token")
    return int(pad)


def _greedy(model: PreTrainedModel, tokenizer: Tokenizer, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding; `load_model` has dropped the model's other settings, which `generate` would fall back on."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=end_tokens(model, tokenizer) or None,
        pad_token_id=_pad(tokenizer),
    )
