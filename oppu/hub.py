"""Models on the Hugging Face hub: the token comes from the environment, and refusals say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

# Else transformers may ask the hub for a bot's conversion, whose commit is not the pinned one.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")

# Some versions of transformers ask side questions without the token they were given, and would send a stored login.
constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True


def token() -> str | Literal[False]:
    """HF_TOKEN's value, or False: no token, and none is looked for elsewhere."""
    return os.environ.get("HF_TOKEN") or False


def refusal(path: str, error: BaseException) -> str:
    """Why a model could not be loaded and what to do about it; never the token."""
    causes = list(_causes(error))
    status = next((c.response.status_code for c in causes if isinstance(c, HfHubHTTPError)), None)
    if any(isinstance(c, GatedRepoError) for c in causes) or status == 403:
        why = f"it is gated: accept its licence at https://huggingface.co/{path}, then set HF_TOKEN to your token"
    elif any(isinstance(c, RepositoryNotFoundError) for c in causes) or status == 401:
        why = "no local folder, and the hub shows no such model: check the name; if it is private, set HF_TOKEN"
    elif any(isinstance(c, (LocalEntryNotFoundError, OfflineModeIsEnabled)) for c in causes):
        why = (
            f"no local folder, not in the cache, and the hub is out of reach: run `hf download {path}` with a network,"
            " or give a local folder (HF_HUB_OFFLINE=1 forbids the network)"
        )
    elif "safetensors" in str(error):
        why = (
            "it has no safetensors weights; if they exist only as pytorch_model*.bin, set model.convert (or"
            " profiles.convert) to true: they are then read once, safely, and rewritten"
        )
    else:
        why = str(error)
    return f"model {path!r}: could not be loaded: {why}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
