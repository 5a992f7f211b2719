"""Table 1 to be read: markdown, and a page of its own for the report (HTML, nothing loaded from elsewhere)."""

from __future__ import annotations

from html import escape
from itertools import groupby

from oppu.significance import TESTS
from oppu.table1 import Cell, Line, columns_of
from oppu.tasks import tasks

HEADS = {
    "non_personalized_k0": ("Non-personalized", "k=0"),
    "random": ("Non-personalized", "random"),
    "rag_k1": ("RAG", "k=1"),
    "rag_k2": ("RAG", "k=2"),
    "rag_k4": ("RAG", "k=4"),
    "pag_k0": ("PAG", "k=0"),
    "pag_k1": ("PAG", "k=1"),
    "oppu_k0": ("RAG + OPPU", "k=0"),
    "oppu_k1": ("RAG + OPPU", "k=1"),
    "oppu_k2": ("RAG + OPPU", "k=2"),
    "oppu_k4": ("RAG + OPPU", "k=4"),
    "pag_oppu_k0": ("PAG + OPPU", "k=0"),
    "pag_oppu_k1": ("PAG + OPPU", "k=1"),
}
"""Column -> its two heads in the paper."""

ARROWS = {"higher": "↑", "lower": "↓"}

STYLE = """
body { font: 14px/1.35 system-ui, sans-serif; margin: 1.5rem; color: #1b2127; background: #fff }
h1 { font-size: 1.1rem } p { max-width: 60rem; color: #3f4852 }
div { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; text-align: center; vertical-align: top; white-space: nowrap }
th:first-child, th.task { text-align: left }
thead { border-top: 2px solid; border-bottom: 1px solid } table { border-bottom: 2px solid }
tbody tr.first { border-top: 1px solid #c9d0d6 }
.group { border-bottom: 1px solid #8a94a0 }
small { display: block; color: #5b6770; font-weight: normal }
"""


def markdown(lines: list[Line], test: str = "bootstrap", made: str = "") -> str:
    """Table 1 in markdown; a cell is `value ± spread (the paper's)`, as far as there is one. `made` stands below."""
    shown = columns_of(lines)
    text = ["| task | metric | " + " | ".join(f"{HEADS[n][0]} {HEADS[n][1]}" for n in shown) + " |"]
    text.append("|---|---|" + "---:|" * len(shown))
    for line in lines:
        cells = [_markdown(line.cells.get(name)) for name in shown]
        text.append(f"| {line.task} | {line.metric} {ARROWS[line.better]} | " + " | ".join(cells) + " |")
    return "\n".join([*text, "", note(lines, test), "", *([made, ""] if made else [])])


def html(lines: list[Line], test: str = "bootstrap", made: str = "") -> str:
    """Table 1 as a page that stands alone, its columns grouped as in the paper; `made` stands below it."""
    shown = columns_of(lines)
    groups = [(group, len(list(names))) for group, names in groupby(shown, key=lambda name: HEADS[name][0])]
    head = "".join(f'<th class="group" colspan="{span}" scope="colgroup">{group}</th>' for group, span in groups)
    heads = "".join(f'<th scope="col">{HEADS[name][1]}</th>' for name in shown)
    body = "\n".join(_html_line(line, shown, lines) for line in lines)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Table 1</title><style>{STYLE}</style></head><body>
<h1>Table 1: every setting of this run</h1>
<div><table>
<thead>
<tr><th rowspan="2" scope="col">Task</th><th rowspan="2" scope="col">Metric</th>{head}</tr>
<tr>{heads}</tr>
</thead>
<tbody>
{body}
</tbody>
</table></div>
<p>{escape(note(lines, test))}</p>{f"{chr(10)}<p>{escape(made)}</p>" if made else ""}
</body></html>
"""


def note(lines: list[Line], test: str) -> str:
    """What the marks of these rows mean, and what the paper's values may be compared with."""
    cells = [cell for line in lines for cell in line.cells.values()]
    text = (
        "Per row the best value is bold, the second best underlined. *: significantly better than the same prompt"
        f" without OPPU ({TESTS[test]}, p < .05); †: also after Holm's correction, whose family is all comparisons of"
        " users' own adapters against none in scores.csv, over tasks, metrics and augmentations."
    )
    if any(cell.spread for cell in cells):
        text += " ±: standard deviation over training seeds (seeds.csv); the value itself is the first seed's."
    if any(cell.paper for cell in cells):
        text += (
            " In brackets: the paper's value, of Llama-2-7B on LaMP's 100 users with the longest histories. Ours are of"
            " whatever model and data were run here: the two compare only where both are the same."
        )
    return text + " Blank: not run."


def _markdown(cell: Cell | None) -> str:
    if cell is None:
        return ""
    value = cell.text + (r"\*" if cell.star else "") + ("†" if cell.holm else "")
    parts = [{1: f"**{value}**", 2: f"<u>{value}</u>"}.get(cell.place, value)]
    parts += [f"± {cell.spread}"] if cell.spread else []
    parts += ["({})".format(cell.paper.replace("*", r"\*"))] if cell.paper else []
    return " ".join(parts)


def _html_line(line: Line, shown: list[str], lines: list[Line]) -> str:
    """A row; the task is named on its first row only."""
    rows = [other for other in lines if other.task == line.task]
    first = line is rows[0]
    name = f"{escape(line.task)}<small>{escape(tasks()[line.task].title)}</small>"
    task = f'<th class="task" rowspan="{len(rows)}" scope="rowgroup">{name}</th>' if first else ""
    metric = f'<th scope="row">{line.metric} {ARROWS[line.better]}</th>'
    cells = "".join(f"<td>{_html(line.cells.get(name))}</td>" for name in shown)
    row = '<tr class="first">' if first else "<tr>"
    return f"{row}{task}{metric}{cells}</tr>"


def _html(cell: Cell | None) -> str:
    if cell is None:
        return ""
    value = escape(cell.text) + "*" * cell.star + "†" * cell.holm
    text = {1: f"<b>{value}</b>", 2: f"<u>{value}</u>"}.get(cell.place, value)
    text += f"<small>± {escape(cell.spread)}</small>" if cell.spread else ""
    return text + (f"<small>({escape(cell.paper)})</small>" if cell.paper else "")
