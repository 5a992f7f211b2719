"""Vectors of texts for dense retrieval, by any Hugging Face encoder in a local folder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from oppu.records import InputError

ROWS = 64
LONGEST = 512


class Encoder:
    """Mean of the last hidden states over a text's tokens, made length 1: cosine similarity is a dot product.

    Texts are cut to 512 tokens, or to what the model reads. Raises InputError when the folder holds no such model.
    """

    def __init__(self, folder: str, device: str | torch.device = "cpu") -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model = AutoModel.from_pretrained(folder, trust_remote_code=False, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise InputError([f"retrieval.encoder {folder!r}: could not be loaded: {error}"]) from error
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = model.eval().requires_grad_(False).to(device)
        self.longest = min(LONGEST, getattr(model.config, "max_position_embeddings", LONGEST))

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """One vector for each text: [n, d] float32, of length 1, or zero where a text has no token.

        A text's vector does not depend on the others, up to rounding.
        """
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            batch = self.tokenizer(
                [texts[n] or " " for n in rows],
                padding=True,
                truncation=True,
                max_length=self.longest,
                return_tensors="pt",
            ).to(self.model.device)
            hidden = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            mask = batch["attention_mask"][..., None].to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            found |= dict(zip(rows, F.normalize(mean.float(), dim=-1).cpu().numpy(), strict=True))
        return np.stack([found[n] for n in range(len(texts))])
