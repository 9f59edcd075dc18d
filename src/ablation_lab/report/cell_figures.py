"""What MLflow shows of each cell: its curves and its confusion matrix."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ablation_lab.report import style


class CellFigures:
    """Draws one cell after the other: axes, ticks and labels are made once, which takes most of the time.

    Args:
        classes: names of the classes.
    """

    def __init__(self, classes: list[str]):
        self.classes = classes
        with matplotlib.rc_context(style.STYLE), style.any_glyphs():
            self._make_curves()
            self._make_confusion()

    def draw(self, name: str, history: list[dict[str, float]], confusion: list[list[int]] | None, folder: Path) -> None:
        """Draw `curves.png` and, where the test part is scored, `confusion_matrix.png`.

        Args:
            name: the cell's, for the titles.
            history: rows of its history.csv.
            confusion: counts of the test part, actual × predicted.
        """
        with matplotlib.rc_context(style.STYLE), style.any_glyphs():
            epochs = [row["epoch"] for row in history]
            for column, line in self.lines.items():
                line.set_data(epochs, [row[column] for row in history])
            for axes in self.panels:
                axes.relim()
                axes.autoscale_view()
            self.panels[0].set_title(name, fontweight="bold")
            self.layout.execute(self.curves)
            style.drawn(self.curves).save(folder / "curves.png")
            if confusion:
                shares = style.row_shares(np.array(confusion))
                self.axes.set_title(f"{name}, test part", fontweight="bold")
                self.image.set_data(shares)
                while self.axes.texts:
                    self.axes.texts[0].remove()
                style.write_shares(self.axes, shares)
                style.drawn(self.matrix).save(folder / "confusion_matrix.png")

    def _make_curves(self) -> None:
        self.curves = Figure(figsize=(style.WIDTH, 6), layout="constrained")
        self.panels = self.curves.subplots(2, 1, sharex=True)
        self.lines = {}
        for axes, key in zip(self.panels, ("accuracy", "loss"), strict=True):
            for prefix, color, line, label in style.SIDES:
                (self.lines[prefix + key],) = axes.plot([], [], line, color=color, label=label, marker=".")
            axes.set_ylabel(key)
        self.panels[0].yaxis.set_major_formatter(style.PERCENT)
        self.panels[0].legend()
        self.panels[1].set_xlabel("epoch")
        self.panels[1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        engine = self.curves.get_layout_engine()
        assert engine is not None
        self.layout = engine
        self.curves.set_layout_engine("none")

    def _make_confusion(self) -> None:
        self.matrix = Figure(figsize=(style.WIDTH, style.WIDTH + 1), layout="constrained")
        self.axes = self.matrix.subplots()
        self.axes.set_title("title", fontweight="bold")  # room for it
        self.image = style.confusion(self.axes, np.zeros((len(self.classes),) * 2), self.classes)
        style.confusion_scale(self.matrix, self.image, self.axes)
        style.settle(self.matrix)
