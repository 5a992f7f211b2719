"""The words of a setting's name: augmentation, kind of adapter, number of training seed.

Without pydantic: a check that nothing is stale reads them, and must take well under a second.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from oppu.records import InputError

AUGMENTATION = re.compile(r"(?P<profile>profile-)?(?:(?P<other>recency|dense)-(?=k[1-9]))?k(?P<k>\d+)|random")
AUGMENTATIONS = "k0, k1, …, random, profile-k0, profile-k1, …, recency-k1, …, dense-k1, …"
OWN = ("lora", "ia3", "prompt")
"""PEFT words of a user's own adapter: low-rank matrices, scaled activations, and virtual tokens before the prompt."""
CONTROLS = ("pooled", "swapped")
"""PEFT words of adapters that are not the user's own: one trained on all test users' histories, and another user's."""


@dataclass(frozen=True)
class Augmentation:
    """What a prompt carries: a profile or not, and k items of the history by a retriever, or one random item (k 1)."""

    profile: bool
    k: int
    random: bool = False
    retriever: Literal["bm25", "recency", "dense"] = "bm25"


def parse_augmentation(name: str) -> Augmentation:
    """`k0`, `k4`, `profile-k1`, `recency-k2`, `random` as a record; InputError for any other name."""
    match = AUGMENTATION.fullmatch(name)
    if match is None:
        raise InputError([f"augmentation {name!r} is none of {AUGMENTATIONS}"])
    if match["k"] is None:
        return Augmentation(False, 1, random=True)
    return Augmentation(match["profile"] is not None, int(match["k"]), retriever=match["other"] or "bm25")  # type: ignore[arg-type]


def seeded(name: str) -> tuple[str, int]:
    """A setting's augmentation and number of training seed: `k0` -> k0, 0; `k0-s2` -> k0, 2."""
    augmentation, _, number = name.partition("-s")
    return augmentation, int(number or 0)
