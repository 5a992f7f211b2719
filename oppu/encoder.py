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
        tokens = self.tokenizer(list(texts), truncation=True, max_length=self.longest)["input_ids"] if texts else []
        order = sorted((n for n, ids in enumerate(tokens) if ids), key=lambda n: len(tokens[n]))
        vectors = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        for start in range(0, len(order), ROWS):
            rows = order[start : start + ROWS]
            batch = self.tokenizer.pad({"input_ids": [tokens[n] for n in rows]}, return_tensors="pt")
            ids, mask = (batch[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            mean = (hidden * mask[..., None].to(hidden.dtype)).sum(1) / mask.sum(1, keepdim=True)
            vectors[rows] = F.normalize(mean.float(), dim=-1).cpu().numpy()
        return vectors
