"""The report's pictures. Colours after Okabe and Ito (2008); line styles and markers say the same once more."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from ablation_lab.params import Params
from ablation_lab.report import budget, drawing, style
from ablation_lab.report.results import EXAMPLES, Material, lacking, mean_of, validation_means
from ablation_lab.report.wording import si
from ablation_lab.words import counted, percent

QUICK = "QUICK CHECK: a sliver of data, not a result"
BASELINE = "#000000"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
LINES = ("-", "--", "-.", (0, (1, 1.2)))
MARKERS = "os^DvPX"
VERDICTS = {
    "better": ("#009E73", "^", "better"),
    "worse": ("#D55E00", "v", "worse"),
    "indistinguishable": ("#666666", "o", "indistinguishable"),
    "undetermined": ("#E69F00", "D", "undetermined"),
}
FRONT: dict[str, Any] = {"color": "#bbbbbb", "linewidth": 5, "solid_capstyle": "round", "zorder": 0}
FEW_PICTURES = 10  # below which an accuracy of a range of confidence says nothing
LONG = 50  # epochs from which curves are smoothed
WINDOW = 9  # epochs of the moving mean
FEW, SMALL = 12, 64  # variants, and pixels of a picture, up to which the mistakes of each variant are shown
ROWS = 50  # variants up to which a figure has a row for each: two pages of a screen
DISTINCT = len(COLORS) * len(LINES)  # variants up to which a figure has a line for each
BOXES = 400  # in all drawings of networks of more than a few variants: at most 3 MB of the page


@dataclass(frozen=True)
class Drawn:
    """A picture on disk: its file in `figures/`, its heading, what it shows (for alt), how to read it."""

    file: str
    title: str
    alt: str
    caption: str


def mark(study: Params, material: Material) -> str | None:
    """What every table and figure says of a report that is not the whole study's."""
    partial = material.results["partial"]
    told = [QUICK] if study.study.quick else []
    told += [f"PARTIAL REPORT: {partial['cells']} of {counted(partial['of'], 'cell')}"] if partial else []
    return "; ".join(told) or None


def draw(study: Params, material: Material, folder: Path) -> dict[str, Drawn]:
    """Draw all figures into a folder, each as PNG and as SVG, by the name of their files without the suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    marked = mark(study, material)
    overview = OVERVIEW if material.shown else UNSCORED
    makes: dict[str, Callable[..., tuple[Figure | None, str, str, str]]] = {make.__name__: make for make in overview}
    makes |= {f"mistakes_{name}": partial(mistakes, name=name) for name in _detailed(study, material)}
    makes |= {
        f"network_{name}": partial(network, name=name, same=same) for name, same in _networks(study, material).items()
    }
    with matplotlib.rc_context(style.STYLE), style.any_glyphs():
        for name, make in makes.items():
            figure, title, alt, caption = make(study, material)
            if figure is None:
                continue
            if marked and not name.startswith("network_"):
                figure.suptitle(marked, color="#B00020", fontsize=13 if len(marked) < 50 else 9, fontweight="bold")
                alt = f"{marked}. {alt}"
            _save(figure, folder / f"{name}.png", photographs=name.split("_")[0] in PHOTOGRAPHS)
            drawn[name] = Drawn(f"{name}.png", title, alt, caption)
    return drawn


def accuracy(study: Params, material: Material) -> tuple[Figure, str, str, str]:
    names, which = telling(study, material, ROWS)
    figure, axes = _rows(names)
    reported, part = False, "test" if material.shown else "validation"
    key = f"{part}_accuracy"
    for row, name in enumerate(names):
        variant = material.results["variants"][name]
        color = _looks(study, name)["color"]
        values = [cell[key] for cell in variant["cells"].values() if cell[key] is not None]
        axes.plot(values, _spread(row, len(values)), "o", color=color, alpha=0.55, markersize=6, markeredgewidth=0)
        mean, interval = mean_of(variant, key), variant["test_accuracy"]["ci95"]  # the validation part has none
        if interval:
            axes.plot(interval, [row, row], color=color, linewidth=2, solid_capstyle="butt")
        if mean is not None:
            axes.plot([mean, mean], [row - 0.27, row + 0.27], color=color, linewidth=3, solid_capstyle="butt")
        elif not values:
            axes.text(0.02, row, lacking(variant), transform=axes.get_yaxis_transform(), va="center", color="#B00020")
        else:
            text = f"{len(variant['cells']) - len(values)} of {len(variant['cells'])} diverged"
            low: dict[str, Any] = {"xytext": (0, -15), "textcoords": "offset points", "ha": "center", "fontsize": 9}
            axes.annotate(text, (np.mean(values), row), color="#B00020", **low)
        if key in variant["reported"]:
            reported = True
            axes.plot(variant["reported"][key], row, "*", color="white", markeredgecolor="#B00020", ms=13)
    base = mean_of(material.results["variants"][study.study.baseline], key)
    if base is not None:
        axes.axvline(base, color=BASELINE, linewidth=1, linestyle="--")
    axes.xaxis.set_major_formatter(style.PERCENT)
    axes.set_xlabel(f"{part} accuracy")
    axes.margins(x=0.06)
    caption = "Dots: seeds. Upright bar: their mean."
    if material.shown and len(study.seeds) > 1:
        caption += " Line: 95 % interval of the mean, over seeds and test pictures."
    caption += " Dashed: the baseline."
    caption += " Star: what the authors reported." if reported else ""
    if reported and any(budget.cuts(study, material.source, material.card, name) for name in names):
        caption += f" {budget.NO_FAILURE}"
    means = {name: mean_of(material.results["variants"][name], key) for name in names}
    gone = {name: lacking(material.results["variants"][name]) for name in names}
    told = "; ".join(f"{name} {gone[name] if mean is None else f'{mean:.2%}'}" for name, mean in means.items())
    title = f"{part.capitalize()} accuracy"
    return figure, title, f"{title} of each variant, mean over seeds: {told}.", caption + which


def difference(study: Params, material: Material) -> tuple[Figure, str, str, str]:
    names, which = telling(study, material, ROWS)
    deltas = {name: material.results["variants"][name]["delta"] for name in names}
    others = {name: delta for name, delta in deltas.items() if delta["verdict"]}
    figure, axes = _rows(others or ["no other variant"])
    seen = []
    for row, delta in enumerate(others.values()):
        if delta["mean"] is None:
            base = material.results["variants"][study.study.baseline]
            text = "diverged" if delta["verdict"] == "diverged" else f"the baseline {_gone(base)}"
            white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            transform = axes.get_yaxis_transform()
            axes.text(0.02, row, text, transform=transform, va="center", color="#B00020", bbox=white)
            continue
        color, marker, label = VERDICTS[delta["verdict"]]
        if delta["ci95"]:
            axes.plot(np.multiply(delta["ci95"], 100), [row, row], color=color, linewidth=2.5, solid_capstyle="butt")
        label = "_" if label in seen else label
        seen.append(label)
        axes.plot(100 * delta["mean"], row, marker, color=color, markersize=9, linestyle="", label=label)
    axes.axvline(0, color=BASELINE, linewidth=1, linestyle="--")
    low, high = axes.get_xlim()
    if not any(delta["mean"] for delta in others.values()):
        low, high = min(low, -1), max(high, 1)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:+g}".replace("-", "−") if x else "0"))
    axes.set_xlabel("difference from the baseline in test accuracy, points")
    if seen:
        figure.legend(loc="outside lower center", ncols=2 if len(set(seen)) > 3 else 3, columnspacing=1, fontsize=10)
    caption = "Variant minus baseline, in the one seed."
    if len(study.seeds) > 1:
        caption = (
            "Variant minus baseline, paired by seed and picture, with its 95 % interval over seeds and test pictures. "
            "The verdicts are adjusted for the number of comparisons, the intervals are not."
        )
    told = "; ".join(
        f"{name} {delta['verdict']}" + ("" if delta["mean"] is None else f" ({100 * delta['mean']:+.2f} points)")
        for name, delta in others.items()
    )
    alt = f"Difference of each variant from the baseline: {told}."
    return figure, "Difference from the baseline", alt, caption + which


def _gone(baseline: dict[str, Any]) -> str:
    """Why nothing can be compared with the baseline."""
    if not baseline["cells"]:
        return "is missing"
    return "diverged" if baseline["test_accuracy"]["mean"] is None else "has other seeds"


def curves(study: Params, material: Material) -> tuple[Figure, str, str, str]:
    """Validation accuracy and loss of all variants on the same axes."""
    names, which = telling(study, material, DISTINCT)
    labels = {name: _wrap(name, 26) for name in names}
    columns = 2 if max(len(label) for label in labels.values()) > 14 else 3
    lines = sum(label.count("\n") + 1 for label in labels.values())
    figure = Figure(figsize=(style.WIDTH, 6.4 + 0.24 * -(-lines // columns)), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    window, bands = _window(study, material), len(study.variants) <= 8
    for axes, key in ((top, "val_accuracy"), (bottom, "val_loss")):
        for name in names:
            looks = _looks(study, name)
            table = _table(material, name, key)
            mean = np.mean(table, axis=1)  # NaN once a seed has stopped: a mean over fewer seeds would jump
            epochs = np.arange(1, len(table) + 1)
            if bands and table.shape[1] > 1:
                axes.fill_between(epochs, table.min(1), table.max(1), color=looks["color"], alpha=0.15, linewidth=0)
            for seed in table.T:
                axes.plot(epochs, np.where(np.isnan(mean), seed, np.nan), color=looks["color"], alpha=0.35, linewidth=1)
            line = _moving_mean(mean, window)
            every = max(1, len(table) // 8)
            looks |= {"marker": looks["marker"] or "o"} if len(table) == 1 else {}  # one epoch makes no line
            axes.plot(epochs, line, label=labels[name], markevery=every, markersize=5, **looks)
    top.yaxis.set_major_formatter(style.PERCENT)
    top.set_ylabel("validation accuracy")
    bottom.set_ylabel("validation loss")
    bottom.set_xlabel("epoch")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _tame(bottom, material.curves["val_loss"])
    handles = top.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=columns, columnspacing=1.2, fontsize=10)
    caption = "Lines: mean over seeds, as long as all seeds train; thin: seeds that go on alone."
    caption += " Bands: lowest to highest seed." if bands and len(study.seeds) > 1 else ""
    caption += f" Moving mean over {window} epochs." if window > 1 else ""
    alt = f"Validation accuracy and validation loss per epoch of {len(names)} variants on the same axes."
    return figure, "Learning curves", alt, caption + which


def train_validation(study: Params, material: Material) -> tuple[Figure, str, str, str]:
    """Training against validation, a panel a variant for accuracy and one for loss, axes shared by all."""
    names, which = telling(study, material, FEW)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(style.WIDTH, 1 + 2 * rows * 1.75), layout="constrained")
    panels = figure.subplots(2 * rows, columns, sharex=True, squeeze=False)
    window = _window(study, material)
    for key, block in (("accuracy", panels[:rows]), ("loss", panels[rows:])):
        for axes in block.flat[1:]:
            axes.sharey(block[0, 0])
        for index, (name, axes) in enumerate(zip([*names, *[""] * columns], block.flat, strict=False)):
            if not name:
                axes.set_axis_off()
                continue
            for prefix, color, line, label in style.SIDES:
                column = prefix + key
                mean = np.mean(_table(material, name, column), axis=1)
                epochs = np.arange(1, len(mean) + 1)
                shown = _moving_mean(mean, window)
                marker = "o" if len(mean) == 1 else ""  # one epoch makes no line
                axes.plot(epochs, shown, line, marker=marker, color=color, label=label, linewidth=2)
            axes.set_title(_wrap(name, 18), loc="left", fontsize=10, fontweight="bold")
            last = index + columns >= len(names)
            axes.tick_params(labelleft=index % columns == 0, labelbottom=key == "loss" and last)
            if index % columns == 0:
                axes.set_ylabel(key)
            if key == "loss" and last:
                axes.set_xlabel("epoch")
    panels[0, 0].yaxis.set_major_formatter(style.PERCENT)
    panels[0, 0].xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    _tame(panels[rows, 0], np.concatenate([material.curves["loss"], material.curves["val_loss"]]))
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    caption = "Means over seeds. Training values are measured during the epoch, with dropout and augmentation on."
    alt = "Accuracy and loss per epoch on training and validation data, one panel a variant, all on shared axes."
    return figure, "Training against validation", alt, caption + which


def confusions(study: Params, material: Material) -> tuple[Figure, str, str, str]:
    """Row-normalised confusion matrices, one a variant, in one scale."""
    names = material.card["classes"]
    variants, which = telling(study, material, FEW)
    columns = 1 if 10 < len(names) <= style.MANY or len(variants) == 1 else 2
    rows = -(-len(variants) // columns)
    side = style.WIDTH / columns if columns == 2 else 6.2 if len(names) > 10 else 4.6
    figure = Figure(figsize=(style.WIDTH, rows * (side + 0.1) + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    image = None
    for index, (name, axes) in enumerate(zip([*variants, *[""] * columns], panels.flat, strict=False)):
        if not name:
            axes.set_axis_off()
            continue
        axes.set_title(_wrap(name, 30), fontweight="bold")
        counts = material.confusion(name)
        shares = np.full((len(names), len(names)), np.nan) if counts is None else style.row_shares(counts)
        image = style.confusion(axes, shares, names)
        if counts is None:
            gone = lacking(material.results["variants"][name])
            axes.text(0.5, 0.5, gone, transform=axes.transAxes, ha="center", va="center", color="#B00020")
        if index % columns:
            axes.set_ylabel("")
        if index < len(variants) - columns:
            axes.set_xlabel("")
    if image is not None:
        style.confusion_scale(figure, image, panels)
    caption = "Per cent of each actual class, the test part, all seeds together. Shares below 0.5 % are left blank."
    alt = f"Confusion matrices of {len(variants)} variants; the most confused pairs are in the table above."
    return figure, "Confusion matrices", alt, caption + which


def roc(study: Params, material: Material) -> tuple[Figure | None, str, str, str]:
    """ROC curves of two classes, the seeds of a variant averaged at equal rates of false positives."""
    title, names = "ROC curves", material.card["classes"]
    if not material.roc:
        return None, title, "", ""
    variants, which = telling(study, material, DISTINCT)
    labels = {name: _wrap(name, 26) for name in variants if name in material.roc}
    figure = Figure(figsize=(style.WIDTH, 5.2 + 0.24 * -(-len(labels) // 2)), layout="constrained")
    axes = figure.subplots()
    rates = np.linspace(0, 1, 201)
    for name in labels:
        mean = np.mean([np.interp(rates, *curve) for curve in material.roc[name]], axis=0)
        looks = _looks(study, name) | {"marker": ""}
        axes.plot([0, *rates], [0, *mean], label=labels[name], **looks)
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
    axes.set_aspect("equal")
    axes.xaxis.set_major_formatter(style.PERCENT)
    axes.yaxis.set_major_formatter(style.PERCENT)
    axes.set_xlabel(f"{drawing.short(names[0], 20)} taken for {drawing.short(names[1], 20)}")
    axes.set_ylabel(f"{drawing.short(names[1], 20)} found")
    figure.legend(loc="outside lower center", ncols=2, columnspacing=1.2, fontsize=10)
    caption = "Both rates as the threshold moves, the test part, means over seeds. Dotted: guessing."
    alt = f"ROC curves of {len(labels)} variants; the areas under them are in the table above."
    return figure, title, alt, caption + which


def pareto(study: Params, material: Material) -> tuple[Figure, str, str, str]:
    """Accuracy against two sizes, and the variants that no other one beats in both."""
    costs = {
        "parameters": {name: one["parameters"] for name, one in material.networks.items()},
        "MACs a picture": {name: one["macs"] for name, one in material.networks.items()},
    }
    return _against(study, material, costs, "Accuracy against cost")


def timing_pareto(study: Params, material: Material) -> tuple[Figure, str, str, str]:
    """The same against what a clock measured, in a file of its own."""
    spent = {name: one["seconds_per_epoch"] for name, one in material.timings["variants"].items()}
    return _against(study, material, {"seconds an epoch": spent}, "Accuracy against time")


def _against(
    study: Params, material: Material, costs: dict[str, dict[str, float]], title: str
) -> tuple[Figure, str, str, str]:
    part = "test" if material.shown else "validation"
    names, which = telling(study, material, DISTINCT)
    labels = {name: _wrap(name, 26) for name in names}
    figure = Figure(figsize=(style.WIDTH, 3.4 + 0.24 * -(-len(labels) // 2)), layout="constrained")
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    means = {name: mean_of(material.results["variants"][name], f"{part}_accuracy") for name in names}
    told = []
    for axes, (what, cost_of) in zip(panels, costs.items(), strict=True):
        points = {name: (cost_of[name], mean) for name, mean in means.items() if mean is not None and cost_of[name]}
        best = [
            name
            for name, (cost, mean) in points.items()
            if not any((c <= cost and m >= mean) and (c, m) != (cost, mean) for c, m in points.values())
        ]
        best.sort(key=lambda name: points[name])
        axes.step(*zip(*(points[name] for name in best), strict=True) if best else ([], []), where="post", **FRONT)
        for name, point in points.items():
            looks = _looks(study, name)
            marker = looks["marker"] or "*"
            axes.plot(*point, marker, color=looks["color"], markersize=11 if marker == "*" else 8, label=labels[name])
        axes.set_xlabel(what, fontsize=10)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))
        axes.xaxis.set_major_locator(MaxNLocator(3))
        axes.margins(x=0.12, y=0.12)
        told.append(f"{what}: {', '.join(best)}")
    panels[0].yaxis.set_major_formatter(style.PERCENT)
    panels[0].set_ylabel(f"{part} accuracy")
    if told[0].rpartition(": ")[2]:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=10)
    caption = (
        "Grey: the Pareto front. No variant is at least as cheap and at least as accurate as those at its corners, "
    )
    caption += "by their means; neighbours may be indistinguishable. Star: the baseline."
    alt = f"Accuracy against cost; on the Pareto front of {'; '.join(told)}."
    return figure, title, alt, caption + which


def calibration(study: Params, material: Material) -> tuple[Figure, str, str, str]:
    """Accuracy of the pictures of each range of confidence: a reliability diagram."""
    shown, which = telling(study, material, len(COLORS) + 1)
    figure = Figure(figsize=(style.WIDTH, 4.6 + 0.24 * -(-len(shown) // 2)), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=":")
    for name in shown:
        found = material.calibration(name)
        if found is None:
            continue
        some = found["pictures"] >= FEW_PICTURES
        looks = _looks(study, name) | {"marker": _looks(study, name)["marker"] or "o"}
        confidence, right = (found[key][some] / found["pictures"][some] for key in ("confidence", "right"))
        axes.plot(confidence, right, label=_wrap(name, 26), markersize=5, **looks)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_formatter(style.PERCENT)
    axes.yaxis.set_major_formatter(style.PERCENT)
    axes.set_xlabel("confidence: the highest probability")
    axes.set_ylabel("accuracy")
    if axes.get_legend_handles_labels()[0]:  # else all diverged
        figure.legend(loc="outside lower center", ncols=2, columnspacing=1.2, fontsize=10)
    caption = f"Fifteen ranges of confidence, all seeds together, those with {FEW_PICTURES} predictions or more. "
    caption += "Dotted: as sure as right. Below it, a network is surer than it is right."
    alt = f"Accuracy against confidence of {len(shown)} variants; errors in the table."
    return figure, "Calibration", alt, caption + which


def gap(study: Params, material: Material) -> tuple[Figure, str, str, str]:
    """How much better the kept network is on the pictures that it was trained with."""
    names, which = telling(study, material, ROWS)
    figure, axes = _rows(names)
    told = []
    for row, name in enumerate(names):
        color = _looks(study, name)["color"]
        values = material.gaps(name)
        if not values:
            gone = lacking(material.results["variants"][name])
            axes.text(0.02, row, gone, transform=axes.get_yaxis_transform(), va="center", color="#B00020")
            told.append(f"{name} {gone}")
            continue
        axes.plot(values, _spread(row, len(values)), "o", color=color, alpha=0.55, markersize=6, markeredgewidth=0)
        mean = float(np.mean(values))
        axes.plot([mean, mean], [row - 0.27, row + 0.27], color=color, linewidth=3, solid_capstyle="butt")
        told.append(f"{name} {mean:.1f}")
    axes.axvline(0, color=BASELINE, linewidth=1, linestyle="--")
    axes.set_xlabel("training minus validation accuracy, points")
    axes.margins(x=0.06)
    caption = "Dots: seeds. Upright bar: their mean. Both accuracies are those of the kept weights, with dropout off. "
    caption += "A large gap can be a sign of overfitting."
    alt = f"Training minus validation accuracy in points, mean over seeds: {'; '.join(told)}."
    return figure, "Gap between training and validation", alt, caption + which


def probabilities(study: Params, material: Material) -> tuple[Figure, str, str, str]:
    """What the network that is best on validation makes of a few test pictures, before and after training."""
    shown, names = material.shown, material.card["classes"]
    assert shown is not None  # UNSCORED leaves this figure out
    variant = _best(study, material)
    columns = list(range(len(names))) if len(names) <= 12 else sorted(set(shown.labels.tolist()))
    rows = len(shown.pictures)
    figure = Figure(figsize=(style.WIDTH, 0.5 * rows + 1.9), layout="constrained")
    grid = figure.add_gridspec(rows, 3, width_ratios=(1, 5, 5), hspace=0, wspace=0.02)
    panels = [figure.add_subplot(grid[:, 1]), figure.add_subplot(grid[:, 2])]
    for axes, title, values in zip(panels, ("before training", "after"), (shown.before, shown.after), strict=True):
        table = values[variant][:, columns]
        axes.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axes.set_title(title, fontsize=11)
        axes.grid(False)
        axes.set_xticks(range(len(columns)), [drawing.short(names[i], 12) for i in columns], rotation=90, fontsize=9)
        axes.set_yticks([])
        for row, label in enumerate(shown.labels):
            corner = (columns.index(int(label)) - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#B00020", linewidth=1.6))
            for column, share in enumerate(table[row]):
                if round(100 * np.nan_to_num(share)) >= 1:
                    color = "white" if share > 0.55 else "#222222"
                    axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=8)
    for row, picture in enumerate(shown.pictures):
        axes = figure.add_subplot(grid[row, 0])
        axes.set_axis_off()
        _show(axes, picture)
    caption = f"Per cent that {variant} gives to each class, first seed. Red frame: the actual class."
    caption += " Classes of the shown pictures only." if len(columns) < len(names) else ""
    alt = f"Class probabilities of {rows} test pictures before and after training {variant}, also in the table below."
    return figure, "Probabilities before and after training", alt, caption


def mistakes(study: Params, material: Material, name: str) -> tuple[Figure | None, str, str, str]:
    """Test pictures of the pairs of classes that a variant confuses most."""
    names, pairs = material.card["classes"], material.mistakes[name]
    if not pairs:
        return None, "", "", ""
    surest = material.surest[name]
    figure = Figure(figsize=(style.WIDTH, 1.62 * (1 + len(pairs))), layout="constrained")
    first, *parts = figure.subfigures(1 + len(pairs), 1, squeeze=False).flat
    first.suptitle("The surest mistakes of all", fontsize=10, x=0.01, ha="left")
    for axes in (panels := first.subplots(1, EXAMPLES)):
        axes.set_axis_off()
    for axes, one in zip(panels, surest, strict=False):
        _show(axes, one.picture)
        lines = [drawing.short(names[one.actual], 14), f"→ {drawing.short(names[one.predicted], 12)}"]
        axes.set_title("\n".join([*lines, f"{100 * one.probability:.0f} %"]), fontsize=8)
    for part, pair in zip(parts, pairs, strict=True):
        share = f"{percent(pair.count / pair.of)} of {drawing.short(names[pair.actual], 20)}"
        title = (
            f"{drawing.short(names[pair.actual], 20)} taken for {drawing.short(names[pair.predicted], 20)} ({share})"
        )
        part.suptitle(title, fontsize=10, x=0.01, ha="left")
        panels = part.subplots(1, EXAMPLES)
        for axes in panels:
            axes.set_axis_off()
        for axes, (picture, probability) in zip(panels, pair.pictures, strict=False):
            _show(axes, picture)
            axes.set_title(f"{100 * probability:.0f} %", fontsize=9)
    told = "; ".join(f"{names[pair.actual]} taken for {names[pair.predicted]}" for pair in pairs)
    caption = (
        "On top the test pictures that the first seed's network got wrong and was surest of: actual class → its "
        "answer. Below, the pairs of classes confused most often, all seeds counted, with those that this network was "
        "surest of. Each with the probability that it gave to the wrong class."
    )
    return figure, f"Mistakes of {name}", f"Test pictures that {name} confuses: {told}.", caption


def network(
    study: Params, material: Material, name: str, same: Sequence[str] = ()
) -> tuple[Figure | None, str, str, str]:
    reference = _reference(study, name)
    other = None if reference == name else material.networks[reference]
    figure = drawing.draw(material.networks[name], other, style.WIDTH)
    caption = "From top to bottom, with the shape of what comes out and the number of parameters."
    caption += f" Thick frames: not in {reference}, or otherwise there." if other else ""
    caption += f" Also the network of {', '.join(same)}." if same else ""
    kinds = [layer["type"] for layer in material.networks[name]["layers"]]
    return figure, f"Network of {name}", f"Drawing of {name}: {', '.join(kinds)}; all in the table below.", caption


def samples(study: Params, material: Material) -> tuple[Figure, str, str, str]:
    names = material.card["classes"]
    columns = 5
    rows = max(1, -(-len(material.pictures) // columns))
    figure = Figure(figsize=(style.WIDTH, 1.52 * rows + 0.2), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for (picture, number), axes in zip(material.pictures, panels.flat, strict=False):
        _show(axes, picture)
        axes.set_title(drawing.short(names[number], 14), fontsize=10)
    shown_names = ", ".join(drawing.short(name, 30) for name in names[:20])
    alt = f"Pictures of the training part with their class names: {shown_names}."
    caption = "Pictures of the training part, evenly spaced over each class."
    caption += " The first 20 classes." if len(names) > 20 else ""
    return figure, "Sample pictures", alt, caption


def histogram(study: Params, material: Material) -> tuple[Figure, str, str, str]:
    names, counts = material.card["classes"], material.card["class_counts"]
    parts = ("train", "validation", "test")
    tall = 0.34 * len(names) if len(names) <= 40 else 4
    figure = Figure(figsize=(style.WIDTH, max(2.6, 1.1 + tall)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for part, color, axes in zip(parts, COLORS[:3], panels, strict=True):
        values = [counts[part].get(name, 0) for name in names]
        axes.barh(range(len(names)), values, color=color, height=0.75 if len(names) <= 40 else 1)
        axes.set_title({"train": "training"}.get(part, part))
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("pictures")
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    if len(names) <= 40:
        panels[0].set_yticks(range(len(names)), [drawing.short(name, 18) for name in names])
    else:
        panels[0].set_ylabel("class (number)")
    low, high = min(counts["train"].values(), default=0), max(counts["train"].values(), default=0)
    alt = f"Pictures of each class in the three parts; {low} to {high} of a class in the training part."
    return figure, "Pictures of each class", alt, "Each part has its own scale."


# What every report shows; `draw` adds figures of single variants.
OVERVIEW = (
    *(accuracy, difference, roc, pareto, timing_pareto, curves, train_validation, gap, confusions, calibration),
    *(probabilities, samples, histogram),
)
# While the test part is sealed.
UNSCORED = (accuracy, pareto, timing_pareto, curves, train_validation, gap, samples, histogram)


PHOTOGRAPHS = ("samples", "probabilities", "mistakes")


def _save(figure: Figure, file: Path, photographs: bool) -> None:
    """Write a PNG, without photographs in 256 colours, half as large, so that the page stays small; and an SVG."""
    style.settle(figure)
    shown = style.drawn(figure)
    (shown if photographs else shown.quantize(256, dither=Image.Dither.NONE)).save(file)
    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    # Where the font is not installed, one as wide.
    vector = text.getvalue().replace(": 'DejaVu Sans'", ": 'DejaVu Sans', Verdana, sans-serif")
    file.with_suffix(".svg").write_text(vector, encoding="utf-8", newline="\n")


def _best(study: Params, material: Material) -> str:
    """The variant that is best on the validation part, a mean over seeds; the baseline where all diverged."""
    means = validation_means(material.results)
    if means:
        return max(means, key=lambda name: means[name])
    there = [name for name, one in material.results["variants"].items() if one["cells"]]
    return study.study.baseline if study.study.baseline in there else there[0]


def _detailed(study: Params, material: Material) -> list[str]:
    """The variants whose mistakes are shown: all of a few with small pictures, else the baseline and the best."""
    if len(study.variants) <= FEW and max(material.card["image_shape"][:2]) <= SMALL:
        return list(study.variants)
    return sorted({study.study.baseline, _best(study, material)})


def _ranked(study: Params, material: Material) -> list[str]:
    """All variants, those first that a reader wants to see where there isn't room for all: the baseline, the best on
    the validation part, then those whose accuracy is farthest from the baseline's; last those that diverged."""
    key = "test_accuracy" if material.shown else "validation_accuracy"
    means = {name: mean_of(one, key) for name, one in material.results["variants"].items()}
    known = {name: mean for name, mean in means.items() if mean is not None}
    middle = known.get(study.study.baseline, float(np.median(list(known.values()) or [0])))
    far = sorted(known, key=lambda name: -abs(known[name] - middle))
    return list(dict.fromkeys([study.study.baseline, _best(study, material), *far, *study.variants]))


def telling(study: Params, material: Material, most: int) -> tuple[list[str], str]:
    """Variants for a figure with room for so many, in the study's order, and what its caption says of the choice."""
    names = list(study.variants)
    if len(names) <= most:
        return names, ""
    chosen = _ranked(study, material)[:most]
    part = "test" if material.shown else "validation"
    told = f" {most} of {len(names)} variants: the baseline, the best on validation, and those whose {part} accuracy "
    return [name for name in names if name in chosen], told + "is farthest from the baseline's."


def _networks(study: Params, material: Material) -> dict[str, list[str]]:
    """The variants whose networks are drawn, with the variants that the same picture is of; all of a few."""
    if len(study.variants) <= FEW:
        return {name: [] for name in study.variants}
    pictures: dict[str, str] = {}
    drawn: dict[str, list[str]] = {}
    room = BOXES
    for name in _ranked(study, material):
        layers, other = (material.networks[one]["layers"] for one in (name, _reference(study, name)))
        picture = repr((layers, other if other != layers else None))
        if picture in pictures:
            drawn[pictures[picture]].append(name)
        elif (size := drawing.size(material.networks[name])) <= min(room, drawing.MOST):
            room -= size
            pictures[picture], drawn[name] = name, []
    return drawn


def _reference(study: Params, name: str) -> str:
    return study.variants[name].compared_with or study.study.baseline


def _show(axes: Axes, picture: np.ndarray) -> None:
    shown = picture[..., 0] if picture.shape[-1] == 1 else picture
    axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")


def _rows(names: Iterable[str]) -> tuple[Figure, Axes]:
    """Axes with one row a name, the first on top."""
    labels = [_wrap(name, 22) for name in names]
    height = sum(max(0.42, 0.2 * (label.count("\n") + 1) + 0.1) for label in labels)
    figure = Figure(figsize=(style.WIDTH, 1.3 + height), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _spread(row: int, n: int) -> np.ndarray:
    """Heights of n dots around a row, so that equal values don't hide each other."""
    return row + (np.linspace(-0.16, 0.16, n) if n > 1 else np.zeros(n))


def _looks(study: Params, name: str) -> dict[str, Any]:
    """Colour, line and marker of a variant, the same in all figures; different for up to 196 variants."""
    if name == study.study.baseline:
        return {"color": BASELINE, "linestyle": "-", "marker": "", "linewidth": 2.6}
    turn, index = divmod([one for one in study.variants if one != study.study.baseline].index(name), len(COLORS))
    line, marker = LINES[(index + turn) % len(LINES)], MARKERS[(index + turn // len(LINES)) % len(MARKERS)]
    return {"color": COLORS[index], "linestyle": line, "marker": marker, "linewidth": 1.8}


def _table(material: Material, name: str, key: str) -> np.ndarray:
    """Epochs × seeds, NaN where a seed has no value."""
    rows = material.curves[material.curves["variant"] == name]
    if rows.empty:
        return np.full((1, 1), np.nan)
    return rows.pivot(index="epoch", columns="seed", values=key).to_numpy(dtype=float)


def _window(study: Params, material: Material) -> int:
    """Epochs of the curves' moving mean: what is asked for, else some where there are many."""
    if study.study.smooth:
        return study.study.smooth
    return WINDOW if len(material.curves) > 0 and int(material.curves["epoch"].max()) >= LONG else 1


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred, and over fewer values towards both ends, so that a steep start is not bent."""
    last = len(values) - 1
    half = [min(window // 2, i, last - i) for i in range(len(values))]
    return np.array([np.mean(values[i - reach : i + reach + 1]) for i, reach in enumerate(half)])


def _tame(axes: Axes, losses) -> None:
    """A logarithmic axis for losses that span more than a factor of 50, as those of a training that goes wrong do."""
    values = np.asarray(losses, dtype=float)
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 50 * max(np.quantile(values, 0.05), 1e-3):
        axes.set_yscale("log")
        axes.set_ylabel(axes.get_ylabel() + " (log scale)")


def _wrap(name: str, width: int) -> str:
    """A name in lines of at most `width` characters, broken after - and _ where there are any."""
    lines = [""]
    for word in name.replace("_", "_\0").replace("-", "-\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += word
    pieces = [line[i : i + width] for line in lines for i in range(0, max(len(line), 1), width)]
    return "\n".join(pieces)
