"""The report's text: sentences and tables made from numbers by rules, rendered as HTML, Markdown and plain text.

`build` makes the content once, as strings and tables; the templates only lay it out and escape it, since names of
classes and variants, titles and notes are never trusted.
"""

import base64
import hashlib
import json
import math
import re
import struct
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from tabulate import tabulate

from ablation_lab import params
from ablation_lab.params import Params
from ablation_lab.report.drawing import short
from ablation_lab.report.figures import QUICK, Drawn
from ablation_lab.report.results import BINARY, Material, Shown, validation_means

NONE = "–"
VERDICT_ORDER = ("better", "worse", "indistinguishable", "undetermined", "diverged")
SYMBOLS = {"better": "▲", "worse": "▼", "indistinguishable": "●", "undetermined": "◆", "diverged": "✕"}
SEALED = (
    "The test part is sealed: all accuracies are those of the validation part, on which epochs and perhaps settings "
    "were chosen. `study.test: scored` scores the test part, once the choice is made; nothing is trained for it."
)
EMPHASIS = r"`([^`]+)`|(?<!\w)\*(?=\S)([^*`]+)(?<=\S)\*(?!\w)"  # of a note: `code` and *emphasis*, as in Markdown
NUMBER = re.compile(r"((?:(?<!\d)[+-])?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(?:\s?([kMG])\b)?")
UNITS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}
UI = "http://127.0.0.1:5000"  # where `ablab ui` is
LISTED = 20  # classes up to which tables list all of them


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


def build(study: Params, material: Material) -> dict[str, Any]:
    """All content of the report but the figures, by section."""
    results, card = material.results, material.card
    text = _Format(card["counts"]["test"])
    quick = QUICK if study.study.quick else None
    return {
        "quick": quick,
        "title": study.study.title or study.study.name,
        "name": study.study.name,
        "notes": [part for part in re.split(r"\n\s*\n", study.study.notes or "") if part.strip()],
        "facts": _facts(study, material),
        "sealed": SEALED if material.shown is None else None,
        "headline": _headline(study, results, text) + _selected(material, text),
        "findings": [] if material.shown is None else _findings(study, results, text),
        "limits": _limits(study, material, text),
        "lints": [(name, lint) for name, network in material.networks.items() for lint in network["lints"]],
        "variants": _variants(study, material, text),
        "selection": _selection(material, text),
        "steps": _steps(study, material, text),
        "reported": _reported(study, material, text),
        "binary": _binary(study, material, text),
        "errors": _errors(study, material, text),
        "cells": _cells(study, material, text),
        "layers": {name: _layers(name, network) for name, network in material.networks.items()},
        "data": _data(material),
        "digest": card["digest"],
        "commands": _commands(study),
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


def _plain(text: str) -> str:
    """A note without the signs of its emphasis."""
    return re.sub(EMPHASIS, lambda m: m[1] or m[2], text)


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
    shown = ("Variant", "Test", "Difference", "Verdict", "Validation", "Parameters", "s/epoch", "Best epoch")
    columns = [(i, head) for i, head in enumerate(table.columns) if head in shown]
    rows = []
    for row in table.rows:
        cells = [(head, row[i]) for i, head in columns]
        rows.append([cell if isinstance(cell, str) else _line(head, cell) for head, cell in cells])
    align = ["left" if table.columns[head] in "lv" else "right" for _, head in columns]
    lines = tabulate(rows, [head for _, head in columns], disable_numparse=True, colalign=align)
    lines = lines.replace("\xa0", " ")
    return f"{page['quick']}\n\n{lines}" if page["quick"] else lines


def _line(head: str, lines: list[str]) -> str:
    return lines[0] if head in ("Variant", "Parameters") else " ".join(lines)


def escape_markdown(value: Any) -> Any:
    """Text that Markdown shows as it is, inside a table too; Markup is left alone."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    value = re.sub(r"[^\S\xa0]+", " ", value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    value = re.sub(r"([\\`*|~\[\]])", r"\\\1", value).replace("$", "&#36;")
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", value)


class _Format:
    """Numbers as text, with as many decimals as the number of test pictures can carry."""

    def __init__(self, pictures: int):
        self.digits = 1 if pictures < 2000 else 2

    def percent(self, value: float | None) -> str:
        return NONE if value is None else f"{100 * value:.{self.digits}f}\xa0%"

    def points(self, value: float | None, sign: bool = True) -> str:
        if value is None:
            return NONE
        shown = f"{100 * value:{'+' if sign else ''}.{self.digits}f}"
        return _minus(shown) if float(shown) else shown.lstrip("+-")

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


def _facts(study: Params, material: Material) -> list[tuple[str, str]]:
    card, counts = material.card, material.card["counts"]
    height, width, channels = card["image_shape"]
    seeds = ", ".join(map(str, study.seeds))
    devices = sorted({one["device"] for one in material.timings["variants"].values()})
    threads = sorted({n for one in material.timings["variants"].values() for n in one["threads"]})
    facts = [
        ("Data", f"{card['name']}: {len(card['classes'])} classes, pictures of {height} × {width} × {channels}"),
        (
            "Pictures",
            f"{counts['train']:,} training, {counts['validation']:,} validation, {counts['test']:,} test "
            + (
                "(sealed)" if material.shown is None else "(the test part is scored once, after training and selection)"
            ),
        ),
        ("Split", ", ".join(f"{key} {_value(value)}" for key, value in card["split"].items())),
        ("Baseline", f"{study.study.baseline}: {_length(study.baseline)}"),
        ("Trainings", f"{_count(len(study.variants), 'variant')} × {_count(len(study.seeds), 'seed')} ({seeds})"),
        ("Trained on", f"{', '.join(devices)}, {' or '.join(_count(n, 'thread') for n in threads)} a training"),
    ]
    if "skipped" in card:
        facts.insert(2, ("Left out", _count(card["skipped"]["count"], "unreadable picture")))
    return [*facts, ("Source", study.study.source)] if study.study.source else facts


def _length(variant: params.Variant) -> str:
    """How long a variant is trained, and on what part of the training pictures."""
    train, fraction = variant.train, variant.input.fraction
    told = f"{'up to ' if train.early_stopping else ''}{_count(train.epochs, 'epoch')}"
    told += f" of {_count(train.steps_per_epoch, 'batch')}" if train.steps_per_epoch else ""
    told += f", {_count(train.batch_size, 'picture')} a batch"
    return told + (f", {100 * fraction:g} % of the training part" if fraction < 1 else "")


def _headline(study: Params, results: dict[str, Any], text: _Format) -> list[str]:
    if study.study.test == "sealed":
        return _first_on_validation(results, text)
    base = results["variants"][study.study.baseline]["test_accuracy"]
    verdicts = [one["delta"]["verdict"] for one in results["variants"].values() if one["delta"]["verdict"]]
    name = "The baseline" + (f" ({study.study.baseline})" if study.study.baseline != "baseline" else "")
    if base["mean"] is None:
        first = f"{name} diverged, so nothing can be compared with it."
    else:
        first = f"{name} reaches a test accuracy of {text.percent(base['mean'])}"
        if base["ci95"]:
            low, high = (text.percent(value) for value in base["ci95"])
            first += f" (95 % interval {low} to {high}, {_count(len(study.seeds), 'seed')})"
        first += "."
    counted = [(verdict, verdicts.count(verdict)) for verdict in VERDICT_ORDER if verdict in verdicts]
    if not counted:
        return [first]
    listed = ", ".join(f"{n} {verdict}" for verdict, n in counted)
    return [first, f"Of {_count(len(verdicts), 'change')} to it: {listed}."]


def _first_on_validation(results: dict[str, Any], text: _Format) -> list[str]:
    means = validation_means(results)
    if not means:
        return ["Every variant diverged in some seed."]
    best = max(means, key=lambda name: means[name])
    first = f"{best} reaches a validation accuracy of {text.percent(means[best])}"
    return [first + (f", the highest of {len(results['variants'])} variants." if len(results["variants"]) > 1 else ".")]


def _selected(material: Material, text: _Format) -> list[str]:
    """What became of the first phase, where there is a second."""
    choice = material.choice
    if choice is None:
        return []
    accuracy = text.percent(choice["candidates"][choice["variant"]]["validation_accuracy"])
    return [
        f"Of phase one, {choice['variant']} was selected for phase two: with a validation accuracy of {accuracy} it is "
        f"the first of {_count(len(choice['candidates']), 'candidate')} on the validation part."
    ]


def _selection(material: Material, text: _Format) -> Table | None:
    """By what the second phase's start was chosen."""
    if material.choice is None:
        return None
    rows = []
    for name, means in material.choice["candidates"].items():
        loss = means["validation_loss"]
        chosen = "selected" if name == material.choice["variant"] else NONE
        accuracy = text.percent(means["validation_accuracy"]) if loss is not None else "diverged"
        rows.append([name, accuracy, NONE if loss is None else f"{loss:.3f}", chosen])
    columns = {"Candidate": "l", "Validation": "r", "Validation loss": "r", "Phase two": "l"}
    note = "Means over seeds, on the validation part alone; of equal accuracies the lower loss is taken."
    return Table("Selection for phase two", columns, rows, note)


def _findings(study: Params, results: dict[str, Any], text: _Format) -> list[dict[str, str]]:
    """One sentence a variant, the clearest first."""
    findings = []
    for name, variant in results["variants"].items():
        delta = variant["delta"]
        if not delta["verdict"]:
            continue
        said = _sentence(study, variant, text)
        change = "; ".join(_changes(variant["differences"]))
        findings.append({"variant": name, "change": change, "text": said, "verdict": delta["verdict"]})
    size = {name: abs(one["delta"]["mean"] or 0) for name, one in results["variants"].items()}
    return sorted(findings, key=lambda one: (VERDICT_ORDER.index(one["verdict"]), -size[one["variant"]]))


def _sentence(study: Params, variant: dict[str, Any], text: _Format) -> str:
    delta, seeds = variant["delta"], len(study.seeds)
    if delta["verdict"] == "diverged":
        lost = [seed for seed, cell in variant["cells"].items() if cell["status"] == "diverged"]
        return f"training diverged in {len(lost)} of {_count(seeds, 'seed')} ({', '.join(lost)}): no mean is given"
    if delta["mean"] is None:
        mean = text.percent(variant["test_accuracy"]["mean"])
        return f"test accuracy {mean}, with nothing to compare it with, since the baseline diverged"
    if delta["mean"]:
        points = text.points(abs(delta["mean"]), sign=False)
        said = f"test accuracy {points} points {'higher' if delta['mean'] > 0 else 'lower'}"
    else:
        said = "the same test accuracy"
    if seeds == 1:
        return f"{said} in the one seed"
    if delta["ci95"]:
        interval, p = text.interval(delta["ci95"]), text.p(delta["p_adjusted"])
        return f"{said} (95 % interval {interval} points, adjusted {p}, {seeds} seeds)"
    return f"{said} in each of {seeds} seeds, so the spread over seeds can't be estimated"


def _limits(study: Params, material: Material, text: _Format) -> list[str]:
    """What the numbers do not say."""
    verdicts = {one["delta"]["verdict"] for one in material.results["variants"].values()}
    seeds, test = len(study.seeds), material.card["counts"]["test"]
    limits = []
    if material.shown is None:
        return [
            "The validation accuracy of whatever was chosen by it is too good: only the test part can say by how much."
        ]
    if seeds == 1:
        limits.append(
            "One seed was trained, so chance can't be told from effect: no difference has an interval, a p value or a "
            "verdict. Two seeds are the least, five or more are better."
        )
    else:
        limits.append(
            "The intervals (Student's t over seeds, paired by seed) count the chance of training only, not that of "
            f"which pictures are in the test part: with other test pictures (there are {test:,}) the numbers would "
            "move more than the intervals say."
        )
        if seeds < 5:
            limits.append(f"{seeds} seeds give wide intervals: small effects stay hidden.")
    if "indistinguishable" in verdicts:
        limits.append(
            "Indistinguishable does not mean equal: any difference inside the interval agrees with what was seen."
        )
    if len(material.results["variants"]) > 2 and verdicts & {"better", "worse", "indistinguishable"}:
        limits.append(
            "p values are adjusted after Holm for all comparisons with the baseline, the intervals are not; a verdict "
            "of better or worse needs an adjusted p below 0.05."
        )
    hidden = [
        name
        for name, one in material.results["variants"].items()
        if one["delta"]["verdict"] == "indistinguishable" and (ci95 := one["delta"]["ci95"]) and ci95[0] * ci95[1] > 0
    ]
    if hidden:
        limits.append(
            f"The interval of {', '.join(hidden)} leaves out zero and yet the adjusted p is not below 0.05: with so "
            "many comparisons and so few seeds this is a hint, which more seeds would settle."
        )
    validation = validation_means(material.results)
    if len(validation) > 1:
        best = max(validation, key=lambda name: validation[name])
        limits.append(
            f"To choose a variant, use the validation part: there {best} is first with "
            f"{text.percent(validation[best])}. Choosing by test accuracy would make that number too good."
        )
    return limits


def _variants(study: Params, material: Material, text: _Format) -> Table:
    results = material.results["variants"]
    base = results[study.study.baseline]
    scored = material.shown is not None
    reported = scored and any("test_accuracy" in one["reported"] for one in results.values())
    columns = {"Variant": "l", "Change": "l"} | ({"Test": "r", "Difference": "r", "Verdict": "v"} if scored else {})
    columns |= {"Reported test": "r"} if reported else {}
    columns |= {"Validation": "r", "Training": "r", "Parameters": "r", "MACs": "r", "s/epoch": "r", "Best epoch": "r"}
    rows = []
    for name, one in results.items():
        delta, cells, note = one["delta"], list(one["cells"].values()), _plain(study.variants[name].note or "")
        epochs = [cell["best_epoch"] for cell in cells if cell["best_epoch"] is not None]
        difference = [text.points(delta["mean"])] if delta["verdict"] else ["baseline"]
        if delta["ci95"]:
            difference.append(f"[{text.interval(delta['ci95'], ', ')}]")
        row: list[str | list[str]] = [
            [name, note] if note else name,
            _changes(one["differences"]) or NONE,
        ]
        if scored:
            diverged = "diverged" if one["test_accuracy"]["mean"] is None else NONE
            verdict = text.verdict(delta) if delta["verdict"] else diverged
            row += [text.spread([cell["test_accuracy"] for cell in cells]), difference, verdict]
        row += [text.percent(one["reported"].get("test_accuracy"))] if reported else []
        row += [
            text.spread([cell["validation_accuracy"] for cell in cells]),
            text.spread([cell["train_accuracy"] for cell in cells]),
            _relative(one["parameters"], base["parameters"], f"{one['parameters']:,}"),
            _relative(one["macs"], base["macs"], _si(one["macs"])),
            _seconds(material.timings["variants"][name]["seconds_per_epoch"]),
            _range(epochs),
        ]
        rows.append(row)
    note = "Accuracies are measured after training, with dropout off"
    note += ", and are means over seeds ± standard deviation." if len(study.seeds) > 1 else "."
    if scored:
        note += " Differences are in percentage points"
        note += ", with their 95 % interval and p adjusted after Holm." if len(study.seeds) > 1 else "."
    note += " MACs are the multiply–accumulate operations of one picture."
    return Table("Variants", columns, rows, note)


def _steps(study: Params, material: Material, text: _Format) -> Table | None:
    """Changes from another variant than the baseline, for studies that build step by step."""
    rows = []
    for name, delta in material.steps.items():
        before = str(study.variants[name].compared_with)
        parameters = material.networks[name]["parameters"] - material.networks[before]["parameters"]
        changes = _changes(params.differences(study.variants[before], study.variants[name]))
        interval = [f"[{text.interval(delta['ci95'], ', ')}]"] if delta["ci95"] else []
        difference = [text.points(delta["mean"]), *interval]
        row = [name, before, changes or NONE, _minus(f"{parameters:+,}"), difference]
        rows.append([*row, text.verdict(delta), _epochs_to_reach(material, name, before)])
    columns = {"Variant": "l", "Compared with": "l", "Change": "l", "Parameters": "r", "Difference": "r"}
    columns |= {"Verdict": "v", "Epochs to reach it": "r"}
    note = (
        "Each variant against the one that it is built on; p adjusted after Holm for these comparisons. Epochs to "
        "reach it: after how many epochs the validation accuracy was first as high as the best of the variant compared "
        "with, and how many that one took, over the seeds."
    )
    return Table("Step by step", columns, rows, note) if rows else None


def _epochs_to_reach(material: Material, name: str, before: str) -> str | list[str]:
    """Epochs until a variant's validation accuracy is the best of another one's, seed by seed; `> n` where it never is
    in n epochs."""
    curves = material.curves
    mine: list[int] = []
    theirs: list[int] = []
    never: list[int] = []
    for seed in sorted(set(curves["seed"])):
        ours, other = (curves[(curves["variant"] == one) & (curves["seed"] == seed)] for one in (name, before))
        best = other["val_accuracy"].max()
        if not best > 0:
            return NONE
        theirs.append(int(other.loc[other["val_accuracy"].idxmax(), "epoch"]))
        reached = ours[ours["val_accuracy"] >= best]["epoch"]
        (mine if len(reached) else never).append(int(reached.min()) if len(reached) else len(ours))
    told = [_range(mine)] if mine else []
    told += [f"> {_range(never)}"] if never else []
    return [", ".join(told), f"{before}: {_range(theirs)}"]


def _reported(study: Params, material: Material, text: _Format) -> Table | None:
    rows = []
    for name, one in material.results["variants"].items():
        cells = list(one["cells"].values())
        for key, figure in one["reported"].items():
            if key == "seconds":
                here = material.timings["variants"][name]["total_seconds"]
                rows.append([name, "seconds of a training", _seconds(figure), _seconds(here), NONE])
                continue
            values = [cell.get(key) for cell in cells]
            known = None if None in values else float(np.mean(values))
            if "accuracy" in key or key == "macro_f1":
                difference = NONE if known is None else f"{text.points(known - figure)} points"
                rows.append([name, key, text.percent(figure), " ".join(text.spread(values)), difference])
            else:
                shown = NONE if known is None else f"{known:.4g}"
                rows.append(
                    [name, key, f"{figure:.4g}", shown, NONE if known is None else _minus(f"{known - figure:+.3g}")]
                )
    columns = {"Variant": "l", "Figure": "l", "Reported": "r", "Reproduced": "r", "Difference": "r"}
    note = "Reported: by the study's authors. Reproduced: the mean over seeds ± standard deviation."
    return Table("Reported and reproduced", columns, rows, note) if rows else None


def _binary(study: Params, material: Material, text: _Format) -> Table | None:
    names = material.card["classes"]
    if len(names) != 2 or material.shown is None:
        return None
    rows: list[list] = []
    for name, one in material.results["variants"].items():
        rows.append([name, *(text.spread([cell.get(key) for cell in one["cells"].values()]) for key in BINARY)])
    columns = {"Variant": "l", "Precision": "r", "Recall": "r", "ROC AUC": "r"}
    return Table("Two classes", columns, rows, f"On the test part; the positive class is “{names[1]}”.")


def _errors(study: Params, material: Material, text: _Format) -> dict[str, Any] | None:
    """What the networks get wrong on the test part; nothing while it is sealed."""
    if material.shown is None:
        return None
    return {
        "pairs": _pairs(study, material),
        "classes": _class_scores(study, material, text),
        "scores": {name: _classification(name, material) for name in study.variants},
        "probabilities": _probabilities(study, material, material.shown),
    }


def _pairs(study: Params, material: Material) -> Table:
    """The three most frequent confusions of each variant."""
    names = material.card["classes"]
    rows: list[list[str | list[str]]] = []
    for variant in study.variants:
        counts = material.confusion(variant)
        lines = [NONE]
        if counts is not None:
            wrong = counts - np.diag(np.diag(counts))
            places = np.argsort(-wrong.ravel(), kind="stable")[:3]
            lines = [
                f"{_short(names[actual])} → {_short(names[predicted])}: {100 * n / counts[actual].sum():.0f} % ({n:,})"
                for actual, predicted in (divmod(int(place), len(names)) for place in places)
                if (n := int(wrong[actual, predicted]))
            ] or ["no mistakes"]
        rows.append([variant, lines])
    columns = {"Variant": "l", "Actual → predicted: share of the actual class (pictures, all seeds)": "l"}
    return Table("Most confused pairs", columns, rows)


def _class_scores(study: Params, material: Material, text: _Format) -> Table:
    names = material.card["classes"]
    f1 = {variant: material.class_scores(variant, "f1") for variant in study.variants}
    order = range(len(names))
    note = "F1 on the test part, the mean over seeds, in per cent."
    if len(names) > LISTED:
        known = [scores for scores in f1.values() if scores is not None]
        hard = np.argsort(np.mean(known, axis=0), kind="stable") if known else np.arange(len(names))
        order = hard[:LISTED].tolist()
        note += f" The {LISTED} classes of {len(names)} with the lowest mean."
    rows = [
        [_short(names[i]), *(NONE if scores is None else f"{100 * scores[i]:.1f}" for scores in f1.values())]
        for i in order
    ]
    return Table("F1 of each class", {"Class": "l"} | dict.fromkeys(study.variants, "r"), rows, note)


def _classification(name: str, material: Material) -> Table:
    """Precision, recall and F1 of each class, as scikit-learn's classification report has them."""
    names = material.card["classes"]
    support = [material.card["class_counts"]["test"].get(one, 0) for one in names]
    scores = [material.class_scores(name, which) for which in ("precision", "recall", "f1")]
    rows = []
    for i, one in enumerate(names):
        shown = [NONE if values is None else f"{values[i]:.3f}" for values in scores]
        rows.append([_short(one), *shown, f"{support[i]:,}"])
    means = [NONE if values is None else f"{np.mean(values):.3f}" for values in scores]
    rows.append(["macro average", *means, f"{sum(support):,}"])
    weighted = [NONE if values is None else f"{np.average(values, weights=support):.3f}" for values in scores]
    rows.append(["weighted average", *weighted, f"{sum(support):,}"])
    columns = {"Class": "l", "Precision": "r", "Recall": "r", "F1": "r", "Test pictures": "r"}
    note = "On the test part, the mean over seeds."
    return Table(f"Classification report of {name}", columns, rows, note, totals=2)


def _probabilities(study: Params, material: Material, shown: Shown) -> Table:
    """What each variant made of the shown test pictures' actual classes."""
    names = material.card["classes"]
    rows: list[list[str | list[str]]] = []
    for i, label in enumerate(shown.labels.tolist()):
        row: list[str | list[str]] = [_short(names[label])]
        for name in study.variants:
            before, after = shown.before[name][i], shown.after[name][i]
            if not np.isfinite(after).all():
                row.append(NONE)
                continue
            chosen = int(after.argmax())
            told = f"{100 * before[label]:.0f} → {100 * after[label]:.0f}\xa0%"
            row.append(told if chosen == label else [told, f"took it for {_short(names[chosen])}"])
        rows.append(row)
    note = (
        "The probability of the actual class before and after training, first seed; a few fixed test pictures, the "
        "first of each class."
    )
    columns = {"Picture of": "l"} | dict.fromkeys(study.variants, "r")
    return Table("Probability of the actual class", columns, rows, note)


def _cells(study: Params, material: Material, text: _Format) -> Table:
    rows = []
    for name, one in material.results["variants"].items():
        for seed, cell in one["cells"].items():
            accuracies = [text.percent(cell[f"{part}_accuracy"]) for part in ("train", "validation", "test")]
            loss, f1 = cell["test_loss"], cell["macro_f1"]
            rows.append(
                [
                    f"{name}-{seed}",
                    cell["status"],
                    str(cell["epochs"]),
                    str(cell["best_epoch"] or NONE),
                    *accuracies,
                    NONE if loss is None else f"{loss:.3f}",
                    NONE if f1 is None else f"{f1:.3f}",
                    _seconds(material.timings["variants"][name]["cells"][seed]["total_seconds"]),
                    [cell["cell_hash"][:8], f"{UI}/cells/{cell['cell_hash']}/{name}"],
                ]
            )
    columns = {"Cell": "l", "Status": "l", "Epochs": "r", "Best epoch": "r", "Training": "r", "Validation": "r"}
    columns |= {"Test": "r", "Test loss": "r", "Macro F1": "r", "Seconds": "r", "In MLflow": "a"}
    note = "One variant trained with one seed is a cell. The links lead to its run while `ablab ui` runs."
    return Table("Cells", columns, rows, note)


def _layers(name: str, network: dict[str, Any]) -> Table:
    rows = [
        [
            layer["name"],
            layer["type"],
            " × ".join("any" if size is None else str(size) for size in layer["output_shape"]),
            f"{layer['parameters']:,}",
            f"{layer['macs']:,}",
        ]
        for layer in network["layers"]
    ]
    columns = {"Layer": "l", "Type": "l", "Output": "r", "Parameters": "r", "MACs": "r"}
    note = f"{network['parameters']:,} parameters, {network['trainable_parameters']:,} of them trained."
    return Table(f"Layers of {name}", columns, rows, note)


def _data(material: Material) -> Table:
    card = material.card
    names, counts = card["classes"], card["class_counts"]
    columns = {"Class": "l", "Number": "r"} | ({"One-hot": "l"} if len(names) <= 10 else {})
    rows = []
    for i, name in enumerate(names):
        one_hot = [" ".join("1" if j == i else "0" for j in range(len(names)))] if len(names) <= 10 else []
        numbers = [f"{counts[part].get(name, 0):,}" for part in ("train", "validation", "test")]
        rows.append([_short(name), str(i), *one_hot, *numbers])
    return Table("Pictures of each class", columns | {"Training": "r", "Validation": "r", "Test": "r"}, rows)


def _commands(study: Params) -> list[tuple[str, str]]:
    if study.study.quick:
        return [("ablab quick", "this check"), ("make repro", "the real thing")]
    return [
        ("make repro", "set up from the lock file and run the study of params.yaml; what is up to date is kept"),
        ("dvc exp run -S 'seeds=[0,1,2,3,4]'", "more seeds: only the new cells are trained"),
    ]


def _changes(differences: list[dict[str, Any]]) -> list[str]:
    lines = []
    for one in differences:
        path, before, after = one["path"], one["baseline"], one["variant"]
        if after is None:
            lines.append(f"without {path}" + ("" if isinstance(before, dict) else f" ({_value(before)})"))
        elif before is None:
            lines.append(f"with {path}: {_value(after)}")
        else:
            lines.append(f"{path}: {_value(before)} → {_value(after)}")
    return lines


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(inside)}" for key, inside in value.items()) or "{}"
    if isinstance(value, list):
        return " · ".join(_value(inside) for inside in value) or "[]"
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _relative(value: int, base: int, shown: str) -> list[str]:
    if value == base or not base:
        return [shown]
    return [shown, f"{_minus(f'{100 * (value / base - 1):+.0f}')}\xa0%"]


def _si(value: int) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}\xa0{unit}"
    return str(value)


def _seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def _range(values: list[int]) -> str:
    if not values:
        return NONE
    return str(values[0]) if min(values) == max(values) else f"{min(values)}–{max(values)}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}{'es' if what == 'batch' else 's'}"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _short(name: str) -> str:
    """A class's name in one line; one that has letters or marks from right to left doesn't turn what is beside it."""
    shown = short(name, 40)
    turned = any(unicodedata.bidirectional(letter) in ("R", "AL", "RLE", "RLO", "RLI", "LRO") for letter in shown)
    return f"\u2068{shown}\u2069" if turned else shown


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
