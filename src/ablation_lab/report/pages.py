"""The report's text: sentences and tables made from numbers by rules, rendered as HTML, Markdown and plain text.

`build` makes the content once, as strings and tables; the templates only lay it out and escape it, since names of
classes and variants, titles and notes are never trusted.
"""

import base64
import hashlib
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from tabulate import tabulate

from ablation_lab.params import Params
from ablation_lab.report import budget, summary, tables
from ablation_lab.report.figures import Drawn, mark
from ablation_lab.report.results import Material
from ablation_lab.report.wording import EMPHASIS, VERDICT_ORDER, Format, decimals

NUMBER = re.compile(r"((?:(?<!\d)[+-])?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(?:\s?([kMG])\b)?")
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
SYMBOLS = {"better": "▲", "worse": "▼", "indistinguishable": "●", "undetermined": "◆", "diverged": "✕"}
SEALED = (
    "The test part is sealed: all accuracies are those of the validation part, on which epochs and perhaps settings "
    "were chosen. `study.test: scored` scores the test part, once the choice is made; nothing is trained for it."
)


def build(study: Params, material: Material) -> dict[str, Any]:
    """All content of the report but the figures, by section."""
    results, card = material.results, material.card
    text = Format(decimals(results, card["counts"]["test"]))
    went = {name: tables.seen(study, material, name) for name in study.variants}
    cut = budget.told(study, material.source, card)
    return {
        "cut": cut,
        "mark": mark(study, material),
        "missing": summary.missing(results),
        "folder": "reports/partial/" if results["partial"] else "reports/",
        "title": study.study.title or study.study.name,
        "name": study.study.name,
        "notes": [part for part in re.split(r"\n\s*\n", study.study.notes or "") if part.strip()],
        "facts": summary.facts(study, material),
        "sealed": SEALED if material.shown is None else None,
        "headline": [*cut, *summary.headline(study, results, text), *summary.selected(material, text)],
        "findings": [] if material.shown is None else summary.findings(study, results, text),
        "limits": summary.limits(study, material, text),
        "checks": summary.checks(study, material, went, text),
        "variants": tables.variants(study, material, text),
        "selection": tables.selection(material, text),
        "steps": tables.steps(study, material, text),
        "costs": tables.costs(study, material),
        "timing": tables.timing(study, material),
        "timing_of_cells": tables.timing_of_cells(material),
        "behaviour": tables.behaviour(study, material, went),
        "reported": tables.reported(study, material, text),
        "timing_reported": tables.timing_reported(material),
        "binary": tables.binary(study, material, text),
        "errors": tables.mistakes(study, material, text),
        "cells": tables.cells(study, material, text),
        "layers": {name: tables.layers(study, material, name) for name in study.variants},
        "data": tables.data(material),
        "digest": card["digest"],
        "commands": summary.commands(study),
    }


def html(page: dict[str, Any], drawn: Mapping[str, Drawn], reports: Path) -> str:
    """One self-contained file: styles inline, pictures from `reports/figures/` embedded."""
    environment = _environment(autoescape=True)
    environment.filters["breakable"] = lambda text: Markup(re.sub(r"(?<=[_.])(?=[A-Za-z])", "<wbr>", str(escape(text))))
    environment.filters["emphasised"] = _emphasised
    environment.filters["data_url"] = lambda figure: _data_url(reports / "figures" / figure.file)
    environment.filters["size"] = lambda figure: _size(reports / "figures" / figure.file)
    environment.filters["sort_key"] = _data_sort
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("style.css", "script.js"))
    # The one script that a browser may run in the page, whatever else should get into it.
    script_hash = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html.jinja").render(
        page, figures=drawn, style=Markup(style), script=Markup(script), script_hash=script_hash, symbols=SYMBOLS
    )


def markdown(page: dict[str, Any], drawn: Mapping[str, Drawn]) -> str:
    """Markdown as code hosts render it; pictures are linked from `figures/`."""
    environment = _environment(autoescape=False, finalize=escape_markdown)
    environment.filters["emphasised"] = _markdown_note
    text = environment.get_template("report.md.jinja").render(page, figures=drawn, symbols=SYMBOLS)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _emphasised(text: str) -> Markup:
    """A note's `code` and *emphasis*, as Markdown has them; all else is text."""
    shown = re.sub(EMPHASIS, lambda m: f"<code>{m[1]}</code>" if m[1] else f"<em>{m[2]}</em>", str(escape(text)))
    return Markup(shown)


def _markdown_note(text: str) -> Markup:
    """A note with its emphasis, all else escaped."""
    pieces, end = [], 0
    for found in re.finditer(EMPHASIS, text):
        pieces += [str(escape_markdown(text[end : found.start()])), found[0].replace("<", "&lt;")]
        end = found.end()
    return Markup("".join([*pieces, str(escape_markdown(text[end:]))]))


def text_table(page: dict[str, Any]) -> str:
    """The table of variants for a terminal, notes and changes left out."""
    table = page["variants"]
    shown = ("Variant", "Test", "Difference", "Verdict", "Validation", "Parameters", "Best epoch")
    columns = [(i, head) for i, head in enumerate(table.columns) if head in shown]
    rows = []
    for row in table.rows:
        cells = [(head, row[i]) for i, head in columns]
        rows.append([cell if isinstance(cell, str) else _line(head, cell) for head, cell in cells])
    seconds = page["timing"].rows  # of the same variants
    rows = [[*row, timing[1]] for row, timing in zip(rows, seconds, strict=True)]
    align = [*("left" if table.columns[head] in "lv" else "right" for _, head in columns), "right"]
    lines = tabulate(rows, [*(head for _, head in columns), "s/epoch"], disable_numparse=True, colalign=align)
    lines = lines.replace("\xa0", " ")
    above = [*([page["mark"]] if page["mark"] else []), *page["cut"]]
    return "\n\n".join([*above, lines])


def _line(head: str, lines: list[str]) -> str:
    return lines[0] if head in ("Variant", "Parameters") else " ".join(lines)


def escape_markdown(value: Any) -> Any:
    """Text that Markdown shows as it is, inside a table too; Markup is left alone."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    value = re.sub(r"[^\S\xa0]+", " ", value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    value = re.sub(r"([\\`*|~\[\]])", r"\\\1", value).replace("$", "&#36;")
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", value)


def _environment(autoescape: bool, finalize=None) -> Environment:
    return Environment(
        loader=PackageLoader("ablation_lab", "report"),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def sort_key(cell: str | list[str], kind: str) -> float | None:
    """The number that a table is sorted by where a cell of numbers (`r`) or a verdict (`v`) stands in it, told by its
    first line.

    Of `9 → 97 %` it is the last number, of `8 × 8` the product, of a range the middle; `> 6` comes right after 6; the
    baseline has no difference from itself. Else it is the first number, so that a spread doesn't count; `–` is none.
    """
    text = cell if isinstance(cell, str) else cell[0]
    if kind == "v":
        return VERDICT_ORDER.index(text) if text in VERDICT_ORDER else None
    if kind != "r":
        return None
    if text == "baseline":
        return 0
    numbers = [float(number.replace(",", "")) * UNITS[unit] for number, unit in NUMBER.findall(text.replace("−", "-"))]
    if not numbers:
        return None
    if ">" in text:
        return max(numbers) + 0.5
    if "→" in text:
        return numbers[-1]
    if "×" in text:
        return math.prod(numbers)
    return sum(numbers) / len(numbers) if "–" in text else numbers[0]


def _data_sort(cell: str | list[str], kind: str) -> Markup:
    key = sort_key(cell, kind)
    return Markup("") if key is None else Markup(' data-sort="{}"').format(f"{key:.12g}")


def _data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG file, so that the page doesn't jump while pictures are decoded."""
    return struct.unpack(">II", path.read_bytes()[16:24])
