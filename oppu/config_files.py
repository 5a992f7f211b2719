"""Reading a configuration from its files, as Snakemake does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from oppu.config import Config, load
from oppu.records import InputError


def read_config(files: Sequence[Path]) -> Config:
    """A configuration from files as Snakemake merges them: later values stand over earlier ones. Raises InputError."""
    values: dict[str, Any] = {}
    for file in files:
        try:
            read = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise InputError([f"{file}: cannot be read: {error.strerror}"]) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError([f"{file}: is not YAML: {error}"]) from None
        if not isinstance(read, dict):
            raise InputError([f"{file}: holds no keys and values; config/README.md lists every key"])
        values = _merged(values, read)
    return load(values)


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {k: _merged(old[k], v) for k, v in new.items() if isinstance(v, dict) and isinstance(old.get(k), dict)}
    return old | new | both
