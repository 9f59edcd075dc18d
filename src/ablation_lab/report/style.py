"""How the report's pictures and those of MLflow's runs look."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter
from PIL import Image

from ablation_lab.report import drawing

WIDTH = 6.4  # inches; shown as wide as a text column, the text in a picture is then as large as the page's
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titley": 1.0,  # nothing is above an axes that its title would have to make room for: not looked for
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "figure.dpi": 160,
    "text.parse_math": False,  # a class may be called "$1"
    "svg.fonttype": "none",  # text stays text, to be searched and edited
    "svg.hashsalt": "ablation-lab",  # the same ids in every run
}
# What a history's columns begin with, and how they are drawn.
SIDES = (("", "#D55E00", "--", "training"), ("val_", "#0072B2", "-", "validation"))
MANY = 20  # classes from which a confusion matrix has no numbers
PERCENT = FuncFormatter(lambda value, _position: f"{round(100 * value, 4):g} %")


def drawn(figure: Figure) -> Image.Image:
    """A figure whose layout is done, as pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")


def settle(figure: Figure) -> None:
    """Lay a figure out, once for all drawings, and round that: its solver sums in the order of addresses in memory, and
    an SVG has ids made of all digits."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
    figure.set_layout_engine("none")
    for part in figure.subfigs:
        part.bbox_relative.p0 = np.round(part.bbox_relative.p0, 9)
        part.bbox_relative.p1 = np.round(part.bbox_relative.p1, 9)
    for axes in figure.axes:
        axes.set_position(np.round(axes.get_position(original=True).bounds, 9).tolist())


def confusion(axes: Axes, shares: np.ndarray, names: list[str]) -> AxesImage:
    """A confusion matrix of shares of the actual classes (actual × predicted)."""
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.grid(False)
    axes.spines[:].set_visible(True)
    if len(names) <= MANY:
        ticks = [drawing.short(one, 12) for one in names]
        size = _size(len(names))
        axes.set_xticks(range(len(names)), ticks, rotation=0 if len(names) <= 2 else 90, fontsize=size)
        axes.set_yticks(range(len(names)), ticks, fontsize=size)
        axes.tick_params(length=0)
        write_shares(axes, shares)
    axes.set_ylabel("actual class" + (" (number)" if len(names) > MANY else ""))
    axes.set_xlabel("predicted class" + (" (number)" if len(names) > MANY else ""))
    return image


def write_shares(axes: Axes, shares: np.ndarray) -> None:
    """Per cents of one or more in the squares of a confusion matrix, unless there are many."""
    if len(shares) > MANY:
        return
    size = _size(len(shares))
    for actual, predicted in np.argwhere(np.round(100 * np.nan_to_num(shares)) >= 1):
        share = shares[actual, predicted]
        color = "white" if share > 0.55 else "#222222"
        axes.text(predicted, actual, f"{100 * share:.0f}", ha="center", va="center", color=color, fontsize=size)


def _size(classes: int) -> int:
    return 11 if classes <= 4 else 8


def confusion_scale(figure: Figure, image: AxesImage, axes: Any) -> None:
    bar = figure.colorbar(image, ax=axes, location="bottom", pad=0.02, shrink=0.5, aspect=30, format=PERCENT)
    bar.set_label("share of the actual class")


def row_shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


@contextmanager
def any_glyphs() -> Iterator[None]:
    """A class name in a script that the font lacks is drawn as boxes, without a warning for each letter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
