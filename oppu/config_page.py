"""config/README.md: every key of the configuration, from the schema itself."""

from __future__ import annotations

import json
from typing import Any

from oppu.config import Config
from oppu.tasks import Closed


def describe() -> str:
    """config/README.md: every key with its default and meaning, from the schema itself."""
    return "\n".join([_HEAD, *_rows(Config, "")]) + "\n"


_HEAD = """# Configuration

One file is one experiment: `config.yaml` (the default: the shipped sample), or another given by `--configfile`, of
which nothing of the default shines through. The schema is closed: an unknown key is an error. Single values can be set
on the command line: `snakemake --cores all --config seed=1`. Threads, memory and cohort placement belong to Snakemake
profiles (`workflow/profiles/`), not here. YAML reads `1e-4` as text: write `1.0e-4`.

This page is made by `oppu schema --readme`.

| key | default | meaning |
|---|---|---|"""


def _rows(model: type[Closed], prefix: str) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, Closed):
            rows += [f"| **{prefix}{name}** | | {field.description or type(default).__doc__} |"]
            values = default.model_dump()
            inner = _rows(type(default), f"{prefix}{name}.")
            rows += [_with_default(row, f"{prefix}{name}.", values) for row in inner]
        else:
            rows.append(f"| `{prefix}{name}` | `{_plain(default)}` | {field.description} |")
    return rows


def _with_default(row: str, prefix: str, values: dict[str, Any]) -> str:
    """The row with the default that the enclosing part gives, which may differ from the part's own."""
    for name, value in values.items():
        if row.startswith(f"| `{prefix}{name}` |"):
            return f"| `{prefix}{name}` | `{_plain(value)}` |" + row.split("|", 3)[3]
    return row


def _plain(value: Any) -> str:
    return json.dumps(value)
