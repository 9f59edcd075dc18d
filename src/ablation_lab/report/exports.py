"""The report's tables as files: CSV for spreadsheets and programs, LaTeX for papers.

Both are made from the tables that the page shows. Names of classes come from folders and are never trusted: they must
become neither a spreadsheet's formula nor a command of TeX's.
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ablation_lab.report.wording import NONE, Table

# What makes a spreadsheet read a cell as a formula (OWASP, "CSV Injection"), full-width signs too.
FORMULA = tuple("=+-@＝＋－＠")
# A number as the report writes it: what may begin with a sign all the same.
NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]\d+)?( %| points)?( \[[-+\d.]+, [-+\d.]+\])?")
THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+")
LONG = 30  # letters of a line from which LaTeX may break it
RAGGED = r"\rightskip=0pt plus 1fil\relax "  # what \raggedright does, without its other meaning of \\

# In OT1, TeX's own encoding, < > | are other letters, and after \\ a [ or * would be an option.
TEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "`": r"\`{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\xa0": "~",
    "–": "--",
    "—": "---",
    "…": r"\dots{}",
    "“": "``",
    "”": "''",
    "‘": "`",
    "’": "'",
    "−": "$-$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "→": r"$\to$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "°": r"$^\circ$",
    "µ": r"$\mu$",
    "μ": r"$\mu$",
    "σ": r"$\sigma$",
    "χ": r"$\chi$",
    "Δ": r"$\Delta$",
    "▲": r"$\triangle$",
    "▼": r"$\bigtriangledown$",
    "●": r"$\bullet$",
    "◆": r"$\diamond$",
    "✕": r"$\times$",
}
# All but ASCII and the letters that LaTeX has without a package.
FOREIGN = re.compile(r"[^\x00-\x7fÀ-ÏÑ-ÖØ-Ýßà-ïñ-öø-ýÿ]+")
LETTERS = r"""% Letters pdfLaTeX lacks: XeLaTeX and LuaLaTeX print them in a font that has them, pdfLaTeX as codes.
\providecommand{\ablabletters}[2]{\ifdefined\Umathchar#1\else#2\fi}
"""


def write_tables(page: Mapping[str, Any], folder: Path) -> None:
    """Write each table of a page as `<slug>.csv` and `<slug>.tex`, called by what the table is called."""
    folder.mkdir(parents=True)
    taken: set[str] = set()
    for table in _tables(page):
        slug = first = re.sub(r"[^a-z0-9]+", "_", table.name.lower()).strip("_") or "table"
        number = 1
        while slug in taken:  # variants may differ in what a slug leaves out: A-b and a_b
            number += 1
            slug = f"{first}_{number}"
        taken.add(slug)
        (folder / f"{slug}.csv").write_text(csv(table), encoding="utf-8", newline="\n")
        (folder / f"{slug}.tex").write_text(latex(table, slug, page["mark"]), encoding="utf-8", newline="\n")


def numbers(results: Mapping[str, Any]) -> str:
    """The main numbers of each variant as CSV to compute with: not rounded, one to a column, accuracies of 0 to 1."""
    rows = []
    for name, one in results["variants"].items():
        test, delta = one["test_accuracy"], one["delta"]
        row = {"variant": _field(name, "l"), "parameters": one["parameters"], "macs": one["macs"]}
        row |= {"test_accuracy": test["mean"], "test_accuracy_std": test["std"]}
        row |= dict(zip(("test_accuracy_low", "test_accuracy_high"), test["ci95"] or (None, None), strict=True))
        row |= {"difference": delta["mean"]}
        row |= dict(zip(("difference_low", "difference_high"), delta["ci95"] or (None, None), strict=True))
        rows.append(row | {key: delta[key] for key in ("p_adjusted", "verdict", "seeds_needed")})
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")


def csv(table: Table) -> str:
    """A table as CSV: one row of headings; a cell's lines in one; a link's cell hash in full; nothing for “–”."""
    rows = [[_field(*one) for one in zip(row, table.columns.values(), strict=True)] for row in table.rows]
    columns = [_field(head, "l") for head in table.columns]
    return pd.DataFrame(rows, columns=columns, dtype=object).to_csv(index=False, lineterminator="\n")


def latex(table: Table, slug: str, warning: str | None = None) -> str:
    """A table as a LaTeX float with `booktabs` rules, labelled `tab:<slug>`.

    Args:
        warning: what the caption has to say besides.
    """
    kinds = list(table.columns.values())
    long = [
        kind == "l" and any(len(line) > LONG for row in table.rows for line in _lines(row[i], kind))
        for i, kind in enumerate(kinds)
    ]
    rows = [[_typeset(*one) for one in zip(row, kinds, long, strict=True)] for row in table.rows]
    heads = zip(table.columns, "l" * len(kinds), long, strict=True)
    frame = pd.DataFrame(rows, columns=[_typeset(*one) for one in heads], dtype=object)
    caption = ". ".join(part.rstrip(".") for part in (table.name, table.note, warning) if part)
    text = frame.style.hide(axis="index").to_latex(
        column_format="".join(
            r"p{0.25\linewidth}" if broken else "r" if kind == "r" else "l"
            for kind, broken in zip(kinds, long, strict=True)
        ),
        hrules=True,
        position_float="centering",
        caption=(f"{tex(caption)}.", tex(table.name)),
        label=f"tab:{slug}",
    )
    return LETTERS + text if r"\ablabletters" in text else text


def tex(text: str) -> str:
    """A text as LaTeX prints it, whatever is in it."""
    parts = re.split("(?<=-)(?=-)", _clean(unicodedata.normalize("NFC", text)))  # -- would be a dash
    return FOREIGN.sub(_foreign, "{}".join("".join(TEX.get(letter, letter) for letter in part) for part in parts))


def _foreign(found: re.Match) -> str:
    numbers = " ".join(f"U+{ord(letter):04X}" for letter in found[0])
    return f"\\ablabletters{{{found[0]}}}{{{numbers}}}"


def _tables(content: Any) -> Iterator[Table]:
    """All tables of a page, in its order."""
    if isinstance(content, Table):
        yield content
    elif isinstance(content, Mapping | list | tuple):
        for one in content.values() if isinstance(content, Mapping) else content:
            yield from _tables(one)


def _lines(cell: str | list[str], kind: str) -> list[str]:
    """A cell's lines; of a link only its text."""
    return [cell] if isinstance(cell, str) else cell[:1] if kind == "a" else list(cell)


def _clean(text: str) -> str:
    """A text in one line without control characters and marks of direction; no-break spaces stay."""
    text = re.sub("[\u2066-\u2069]", "", text)
    return re.sub(r"(?:[^\S\xa0]|[\x00-\x1f\x7f-\x9f])+", " ", text).strip()


def _field(cell: str | list[str], kind: str) -> str:
    lines = _lines(cell, kind)
    if kind == "a" and not isinstance(cell, str) and (whole := re.search("[0-9a-f]{64}", cell[1])):
        lines = [whole[0]]
    lines = [" ".join(_clean(line).split()).replace("−", "-") for line in lines]
    if kind == "r":
        lines = [line.replace(",", "") if THOUSANDS.fullmatch(line) else line for line in lines]
    text = " ".join(lines)
    if text == NONE:
        return ""
    return f"'{text}" if text.startswith(FORMULA) and not NUMBER.fullmatch(text) else text


def _typeset(cell: str | list[str], kind: str, broken: bool) -> str:
    lines = [tex(line) for line in _lines(cell, kind)]
    if kind == "a":
        return rf"\texttt{{{lines[0]}}}"
    if broken:
        return RAGGED + r" \newline ".join(lines)
    if len(lines) < 2:
        return "".join(lines)
    side = "r" if kind == "r" else "l"
    return rf"\begin{{tabular}}[t]{{@{{}}{side}@{{}}}}" + r" \\ ".join(lines) + r"\end{tabular}"
