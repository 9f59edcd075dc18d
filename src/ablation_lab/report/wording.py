"""Numbers and settings as the report's texts have them, and the tables that they stand in."""

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ablation_lab import params
from ablation_lab.report.drawing import short
from ablation_lab.words import counted, percent_change

NONE = "–"
VERDICT_ORDER = ("better", "worse", "indistinguishable", "undetermined", "diverged")
EMPHASIS = r"`([^`]+)`|(?<!\w)\*(?=\S)([^*`]+)(?<=\S)\*(?!\w)"  # of a note: `code` and *emphasis*, as in Markdown


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Args:
        name: what it shows, for its caption.
        columns: heading → kind: `l` text, `r` numbers, `v` a verdict, `a` a link: its text and its address.
        rows: a cell is a text or a list of lines; the first cell heads its row.
        note: how to read it.
        totals: how many of the last rows sum the others up; they stay where they are when a reader sorts the rest.
    """

    name: str
    columns: Mapping[str, str]
    rows: Sequence[Sequence[str | list[str]]]
    note: str = ""
    totals: int = 0


def decimals(results: dict[str, Any], pictures: int) -> int:
    """Decimals of a per cent: half an interval, the median of all, keeps two digits that count."""
    intervals = [one["delta"]["ci95"] for one in results["variants"].values()]
    halves = [50 * (high - low) for low, high in (one for one in intervals if one) if high > low]
    if not halves:
        return 1 if pictures < 2000 else 2
    return int(np.clip(1 - np.floor(np.log10(np.median(halves))), 1, 3))


class Format:
    """Numbers as text; `digits` are the decimals of a per cent."""

    def __init__(self, digits: int):
        self.digits = digits

    def percent(self, value: float | None) -> str:
        return NONE if value is None else f"{100 * value:.{self.digits}f}\xa0%"

    def points(self, value: float | None, sign: bool = True) -> str:
        if value is None:
            return NONE
        shown = f"{100 * value:{'+' if sign else ''}.{self.digits}f}"
        return minus(shown) if float(shown) else shown.lstrip("+-")

    def spread(self, values: Sequence[float | None]) -> list[str]:
        """Mean, and ± the standard deviation where there are two values or more."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return [NONE]
        mean = self.percent(float(np.mean(known)))
        return [mean, f"±\xa0{self.points(float(np.std(known, ddof=1)), sign=False)}"] if len(known) > 1 else [mean]

    def interval(self, interval: Sequence[float], joint: str = " to ") -> str:
        return joint.join(self.points(value) for value in interval)

    def p(self, value: float) -> str:
        return "p\xa0<\xa00.001" if value < 0.001 else f"p\xa0=\xa0{value:.3f}"

    def verdict(self, delta: dict[str, Any]) -> str | list[str]:
        p = delta["p_adjusted"]
        return delta["verdict"] if p is None else [delta["verdict"], self.p(p)]


def length(variant: params.Variant) -> str:
    """How long a variant is trained, on what part of the training pictures, and in what precision."""
    train, fraction = variant.train, variant.input.fraction
    told = f"{'up to ' if train.early_stopping else ''}{counted(train.epochs, 'epoch')}"
    told += f" of {counted(train.steps_per_epoch, 'batch')}" if train.steps_per_epoch else ""
    told += f", {counted(train.batch_size, 'picture')} a batch"
    told += f", {100 * fraction:g} % of the training part" if fraction < 1 else ""
    return told + (f", in {train.precision}" if train.precision != "float32" else "")


def changes(differences: list[dict[str, Any]]) -> list[str]:
    lines = []
    for one in differences:
        path, before, after = one["path"], one["baseline"], one["variant"]
        if after is None:
            lines.append(f"without {path}" + ("" if isinstance(before, dict) else f" ({setting(before)})"))
        elif before is None:
            lines.append(f"with {path}: {setting(after)}")
        else:
            lines.append(f"{path}: {setting(before)} → {setting(after)}")
    return lines


def setting(value: Any) -> str:
    """A value of params.yaml."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {setting(inside)}" for key, inside in value.items()) or "{}"
    if isinstance(value, list):
        return " · ".join(setting(inside) for inside in value) or "[]"
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def relative(value: int, base: int, shown: str) -> list[str]:
    if value == base or not base:
        return [shown]
    return [shown, percent_change(value, base)]


def si(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}\xa0{unit}"
    return f"{value:.3g}"


def seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def span(values: list[int]) -> str:
    if not values:
        return NONE
    return str(values[0]) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def minus(text: str) -> str:
    return text.replace("-", "−")


def short_name(name: str) -> str:
    """A class's name in one line; one that has letters or marks from right to left doesn't turn what is beside it."""
    shown = short(name, 40)
    turned = any(unicodedata.bidirectional(letter) in ("R", "AL", "RLE", "RLO", "RLI", "LRO") for letter in shown)
    return f"\u2068{shown}\u2069" if turned else shown


def plain(note: str) -> str:
    """A note without the signs of its emphasis."""
    return re.sub(EMPHASIS, lambda m: m[1] or m[2], note)
