"""Seeds: each random draw comes from (run seed, task, user key, purpose): a user's result depends on nobody else."""

from __future__ import annotations

import hashlib


def seed_text(*parts: object) -> str:
    """The parts as one text, none of them able to run into its neighbour."""
    return "\x1f".join(str(part) for part in parts)


def seed_of(*parts: object) -> int:
    """A seed of 63 bits from the parts."""
    return int.from_bytes(hashlib.sha256(seed_text(*parts).encode()).digest()[:8], "big") >> 1
