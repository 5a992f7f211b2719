"""Answers: batched generation around Hugging Face's `generate`, each prompt under its own user's adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from oppu.bank import Bank
from oppu.config import Generation


class SeededSampling(LogitsProcessor):
    """Sampling that depends on a row's own seed only, so that a batch's make-up changes no answer.

    Temperature, top-k and top-p as usual; then Gumbel noise from the row's own generator, one number per rank. The
    likeliest perturbed token is a sample of the distribution; all others are ruled out, so greedy decoding takes it.
    """

    def __init__(self, settings: Generation, seeds: Sequence[int]) -> None:
        self.settings = settings
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] -> 0 for the sampled token of each row and -inf for the others."""
        ranked, tokens = scores.float().topk(min(self.settings.top_k, scores.shape[-1]))
        ranked = ranked / self.settings.temperature
        shares = ranked.softmax(-1)
        ranked[shares.cumsum(-1) - shares >= self.settings.top_p] = -torch.inf  # the best token always stays
        uniform = torch.stack([torch.rand(ranked.shape[-1], generator=g) for g in self.generators])
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        best = (ranked + noise.to(ranked.device)).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens.gather(1, best), 0.0)


def batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Prompt numbers in batches of like length, longest first: rows * longest <= budget, one row at least."""
    result: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if result and (len(result[-1]) + 1) * lengths[result[-1][0]] <= budget:
            result[-1].append(number)
        else:
            result.append([number])
    return result


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
) -> list[str]:
    """The answers to tokenised prompts, in their order; greedy, or sampled with one seed per prompt.

    Prompt n is answered with the adapter of `users[n]` of the bank, or by the base model alone without a bank.
    An answer is what follows the prompt's last token, less special tokens and outer white space. Raises ValueError
    for an empty prompt, or where users or seeds are needed and missing.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("generate: a prompt has no tokens")
    if bank is not None and (users is None or len(users) != len(prompts)):
        raise ValueError("generate: a bank needs one user per prompt")
    if settings.sample and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError("generate: sampling needs one seed per prompt")
    answers = [""] * len(prompts)
    for batch in batches([len(p) for p in prompts], settings.tokens_per_batch):
        sampling = LogitsProcessorList()
        if settings.sample and seeds is not None:
            sampling.append(SeededSampling(settings, [seeds[n] for n in batch]))
        if bank is not None and users is not None:
            adapters = bank.use(torch.tensor([users[n] for n in batch], device=model.device))
        else:
            adapters = nullcontext()  # type: ignore[assignment]
        ids, mask = _left_padded([prompts[n] for n in batch], _pad(tokenizer), model.device)
        with adapters:
            output = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                generation_config=_greedy(model, tokenizer, max_new_tokens),
                logits_processor=sampling,
            )
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        for number, text in zip(batch, texts, strict=True):
            answers[number] = text.strip()
    return answers


def _pad(tokenizer: Tokenizer) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ValueError("generate: the tokenizer has neither a pad nor an end-of-text token")
    return int(pad)


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [B, T], every prompt ending in the last column."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _greedy(model: PreTrainedModel, tokenizer: Tokenizer, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding that ends at the tokenizer's end-of-text token or at any that the model itself ends with.

    `load_model` has dropped the model's other settings, which `generate` would fall back on.
    """
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=sorted(ends) or None,
        pad_token_id=_pad(tokenizer),
    )
