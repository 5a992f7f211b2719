"""Table 5: how much there is to learn from, and how long it is (appendix B).

Lengths are of LaMP's raw input and output (no prompt, no retrieved items), in words between white space: that is what
the paper's 'tokens' are, since LaMP_1's answer `[1]` has length 1.0. Personal lengths are of the test users' queries
and golds, not of history items: LaMP_1's items have no answer that could be of length 1.0. Beside them stand the same
lengths in the model's own tokens, without special ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from oppu import provenance
from oppu.files import read_json, read_jsonl, read_user, sweep, write_bytes, write_json
from oppu.records import InputError

if TYPE_CHECKING:  # a task's row needs no tables
    import polars as pl

Lengths = Callable[[Sequence[str]], list[int]]

WORDS = [
    *("base_queries", "base_in_tokens", "base_out_tokens"),
    *("personal_queries", "personal_history", "personal_in_tokens", "personal_out_tokens"),
]
"""The paper's columns; its `tokens` are words."""
TOKENS = [f"{part}_{side}_model_tokens" for part in ("base", "personal") for side in ("in", "out")]
HEADS = ["#Q", "L_in", "L_out", "#Q", "#history", "L_in", "L_out"]


def statistics(
    base: Sequence[tuple[str, str | None]],
    personal: Sequence[tuple[str, str | None]],
    histories: Sequence[int],
    model_tokens: Lengths,
) -> dict[str, float | int | None]:
    """A task's row of Table 5. base, personal: (input, gold) of base and test users' queries; histories: items per test
    user. A mean of nothing is None; unknown golds are left out of it."""
    row: dict[str, float | int | None] = {"personal_history": _mean(histories)}
    for part, queries in (("base", base), ("personal", personal)):
        row[f"{part}_queries"] = len(queries)
        texts = {"in": [text for text, _ in queries], "out": [gold for _, gold in queries if gold is not None]}
        for side, own in texts.items():
            row[f"{part}_{side}_tokens"] = _mean([len(text.split()) for text in own])
            row[f"{part}_{side}_model_tokens"] = _mean(model_tokens(own))
    return row


def model_lengths(path: str, revision: str | None = None) -> Lengths:
    """How many tokens a model's tokenizer makes of each text. Needs no torch where there is a tokenizer.json."""
    from tokenizers import Tokenizer

    from oppu.hub import token

    local = Path(path) / "tokenizer.json"
    if Path(path).is_dir() and not local.exists():
        from oppu.models import load_tokenizer

        slow = load_tokenizer(path, revision)
        return lambda texts: [len(ids) for ids in slow(list(texts), add_special_tokens=False)["input_ids"]]
    try:
        found = local.exists()
        fast = (
            Tokenizer.from_file(str(local))
            if found
            else Tokenizer.from_pretrained(path, revision or "main", token() or None)
        )
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError([f"model {path!r}: no tokenizer could be loaded: {error}"]) from error
    fast.no_truncation()
    return lambda texts: [len(encoded.ids) for encoded in fast.encode_batch(list(texts), add_special_tokens=False)]


def run(
    out: Path, task: str, base_users: Path, queries: Path, histories: Sequence[Path], model: str, revision: str | None
) -> None:
    """Write statistics.json of a task from the files of its split."""
    personal = [(query["input"], query["gold"]) for query in read_jsonl(queries)]
    items = [len(read_user(path).history) for path in histories]
    row = statistics(list(_base_queries(base_users)), personal, items, model_lengths(model, revision))
    sweep(out)
    write_json(out, {"task": task, "personal_users": len(items)} | row, mode=0o644)


def table5(statistics: Iterable[dict[str, Any]], paper: pl.DataFrame | None = None) -> pl.DataFrame:
    """table5.csv: the paper's columns, the same lengths in model tokens, and the paper's own row as `paper_…`."""
    import polars as pl

    schema: dict[str, Any] = {"task": pl.String} | {
        name: pl.Int64 if name.endswith("queries") else pl.Float64 for name in (*WORDS, *TOKENS)
    }
    table = pl.DataFrame([{name: row[name] for name in schema} for row in statistics], schema=schema)
    if paper is None:
        return table
    theirs = paper.select("task", *(pl.col(n).cast(schema[n]).alias(f"paper_{n}") for n in WORDS))
    return table.join(theirs, on="task", how="left", maintain_order="left")


def markdown(table: pl.DataFrame, made: str = "") -> str:
    """Table 5 in markdown: a row per task and, where the paper has the task, the paper's row below it.

    `made` stands below.
    """
    text = ["| task | " + " | ".join(f"{'base' if n < 3 else 'test'} {head}" for n, head in enumerate(HEADS))]
    text[0] += " | " + " | ".join(name.removesuffix("_tokens").replace("_", " ") + " tokens" for name in TOKENS) + " |"
    text.append("|---|" + "---:|" * (len(WORDS) + len(TOKENS)))
    for row in table.iter_rows(named=True):
        text.append(f"| {row['task']} | " + " | ".join(_shown(row[name]) for name in (*WORDS, *TOKENS)) + " |")
        if row.get("paper_base_queries") is not None:
            theirs = [_shown(row[f"paper_{name}"]) for name in WORDS] + [""] * len(TOKENS)
            text.append(f"| {row['task']}, the paper | " + " | ".join(theirs) + " |")
    note = (
        "#Q: queries; L_in, L_out: mean length of LaMP's raw input and output in words between white space, as in the"
        " paper's Table 5; #history: mean items per test user; model tokens: the same texts in the model's own tokens."
        " The paper's rows are of the whole of LaMP: other data give other numbers."
    )
    return "\n".join([*text, "", note, "", *([made, ""] if made else [])])


def write_table5(out: Path, files: Sequence[Path], paper: pl.DataFrame | None = None, made: str = "") -> None:
    """Write table5.csv and, beside it, table5.md, from every task's statistics.json."""
    from oppu.tables import write_csv

    table = table5([read_json(path) for path in files], paper)
    write_csv(out, table)
    write_bytes(out.with_suffix(".md"), markdown(table, made).encode(), mode=0o644)


def run_table5(out: Path, files: Sequence[Path], paper: pl.DataFrame | None = None) -> None:
    """`write_table5` from each results/{task}/statistics.json, and what it was made from (oppu/provenance.py)."""
    made = {"data": {path.parent.name: provenance.data_of(path.parent / "split") for path in files}}
    record, text = out.with_suffix(".provenance.json"), out.with_suffix(".md")
    sweep(out, text, record)
    write_table5(out, files, paper, provenance.line_of(made, record))
    provenance.write(record, made, [out, text], files[0].parent.parent)


def _base_queries(path: Path) -> Iterable[tuple[str, str | None]]:
    """The queries of base.jsonl, one user at a time: all base users' histories together may be gigabytes."""
    with path.open(encoding="utf-8") as f:
        for line in f:
            for query in json.loads(line)["queries"]:
                yield query["input"], query["gold"]


def _mean(lengths: Sequence[int]) -> float | None:
    return fmean(lengths) if lengths else None


def _shown(value: float | int | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
