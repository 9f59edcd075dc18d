"""A drawing of a network: a box a layer from top to bottom, what branches off beside it."""

import re
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Curve

# Fill colours by kind of layer; the type is written in the box, so nobody has to tell them apart by colour.
KINDS = {
    "Conv": "#cfe3f5",
    "Pool": "#fbe3c8",
    "Dense": "#cfeadd",
    "Flatten": "#eeeeee",
    "Input": "#eeeeee",
    "Add": "#f4d5e5",
    "Concatenate": "#f4d5e5",
}
OTHER = "#f6f2d5"
# Layers that change no shape: written into the box of the layer that feeds them.
FOLDED = {"Activation", "ReLU", "LeakyReLU", "BatchNormalization", "LayerNormalization", "Dropout", "SpatialDropout2D"}
MOST = 80  # boxes; a taller picture is no picture
LARGE, SMALL = 0.102, 0.08  # inches of a letter, wide ones counted
HEIGHT, GAP = 0.52, 0.16  # inches of a box, and between two


@dataclass
class Box:
    """A layer with what is folded into it."""

    layer: dict[str, Any]
    inputs: list[int]
    folded: list[dict[str, Any]] = field(default_factory=list)

    @property
    def members(self) -> list[dict[str, Any]]:
        return [self.layer, *self.folded]


def draw(network: dict[str, Any], reference: dict[str, Any] | None, width: float) -> Figure | None:
    """Draw a network; layers that another one has not, or has otherwise, get a thick frame.

    Args:
        network, reference: as in plan/networks/<variant>.json; no reference marks nothing.
        width: of the figure, in inches.

    Returns:
        None for a network of more than `MOST` boxes.
    """
    boxes = _boxes(network["layers"])
    if len(boxes) > MOST:
        return None
    same = set(range(len(boxes))) if reference is None else _same(boxes, _boxes(reference["layers"]))
    total = len(boxes) * (HEIGHT + GAP) - GAP + 0.1
    figure = Figure(figsize=(width, total))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(0, total)
    branched = any(source < number - 1 for number, box in enumerate(boxes) for source in box.inputs)
    left, right = 0.75 if branched else 0.1, width - 0.1
    middles, tops, bottoms = [], [], []
    y = total - 0.05
    for number, box in enumerate(boxes):
        changed = number not in same
        axes.add_patch(
            FancyBboxPatch(
                (left, y - HEIGHT),
                right - left,
                HEIGHT,
                boxstyle="round,pad=0,rounding_size=0.06",
                facecolor=_color(box.layer["type"]),
                edgecolor="#B00020" if changed else "#999999",
                linewidth=2.4 if changed else 0.8,
            )
        )
        shape = "×".join("any" if size is None else str(size) for size in box.layer["output_shape"])
        parameters = sum(one["parameters"] for one in box.members)
        steps = [
            box.layer["name"],
            *(one["detail"] if one["type"] == "Activation" else _told(one) for one in box.folded),
        ]
        high, low = y - 0.32 * HEIGHT, y - 0.74 * HEIGHT
        room = right - left - 0.3
        told = short(_told(box.layer), int((room - SMALL * len(shape)) / LARGE))
        axes.text(left + 0.1, high, told, va="center", fontsize=10, fontweight="bold")
        told = short(" → ".join(steps), int((room - SMALL * len(f"{parameters:,}")) / SMALL))
        axes.text(left + 0.1, low, told, va="center", fontsize=9, color="#333333")
        axes.text(right - 0.1, high, shape, va="center", ha="right", fontsize=9)
        if parameters:
            axes.text(right - 0.1, low, f"{parameters:,}", va="center", ha="right", fontsize=9, color="#333333")
        tops.append(y)
        bottoms.append(y - HEIGHT)
        middles.append(y - HEIGHT / 2)
        y -= HEIGHT + GAP
    arrow: dict[str, Any] = {"arrowstyle": "-|>", "color": "#444444", "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
    lanes: list[int] = []  # the box at which each lane beside the column is free again
    for number, box in enumerate(boxes):
        for source in box.inputs:
            if source == number - 1:
                ends = ((left + right) / 2, tops[number]), ((left + right) / 2, bottoms[source])
                axes.annotate("", *ends, arrowprops=arrow)
                continue
            lane = next((i for i, free in enumerate(lanes) if free <= source), len(lanes))
            lanes[lane : lane + 1] = [number]
            x, start, end = left - 0.2 - 0.14 * min(lane, 3), middles[source] - 0.05, middles[number] + 0.05
            path = Curve([(left, start), (x, start), (x, end), (left, end)])
            axes.add_patch(PathPatch(path, fill=False, edgecolor="#444444", linewidth=1))
            axes.annotate("", (left, end), (left - 0.12, end), arrowprops=arrow)
    return figure


def size(network: dict[str, Any]) -> int:
    """How many boxes a network's drawing has."""
    return len(_boxes(network["layers"]))


def _boxes(layers: list[dict[str, Any]]) -> list[Box]:
    """Layers in the order in which data flows, those without a shape of their own folded into what feeds them."""
    names = {layer["name"] for layer in layers}
    feeds = {layer["name"]: [name for name in layer["inputs"] if name in names] for layer in layers}
    users: dict[str, int] = {}
    for sources in feeds.values():
        for source in sources:
            users[source] = users.get(source, 0) + 1
    boxes: list[Box] = []
    place: dict[str, int] = {}
    for layer in _in_order(layers, feeds):
        sources = feeds[layer["name"]]
        if layer["type"] in FOLDED and len(sources) == 1 and users[sources[0]] == 1:
            place[layer["name"]] = place[sources[0]]
            boxes[place[sources[0]]].folded.append(layer)
        else:
            place[layer["name"]] = len(boxes)
            boxes.append(Box(layer, sorted({place[source] for source in sources})))
    return boxes


def _in_order(layers: list[dict[str, Any]], feeds: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Each layer after all that feed it, and otherwise as soon as a branch has begun: depth first."""
    ordered: list[dict[str, Any]] = []
    done: set[str] = set()
    by_name = {layer["name"]: layer for layer in layers}
    waiting = [layer["name"] for layer in reversed(layers)]
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        missing = [source for source in feeds[name] if source not in done]
        if missing:
            waiting += [name, *reversed(missing)]
            continue
        done.add(name)
        ordered.append(by_name[name])
    return ordered


def short(text: str, width: int) -> str:
    """A text in one line of at most so many letters, without control characters, which no SVG file may hold."""
    text = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())
    return text if len(text) <= width else text[: max(1, width - 1)] + "…"


def _told(layer: dict[str, Any]) -> str:
    return f"{layer['type']} {layer['detail']}".strip()


def _same(boxes: list[Box], reference: list[Box]) -> set[int]:
    """The boxes that the reference has too, in the same order; names don't count, since layers may name themselves."""
    looks, others = ([repr(_looks(box)) for box in one] for one in (boxes, reference))
    blocks = SequenceMatcher(None, others, looks, autojunk=False).get_matching_blocks()
    return {block.b + i for block in blocks for i in range(block.size)}


def _looks(box: Box) -> list[tuple]:
    # The width of a layer without weights is that of what feeds it.
    return [(one["type"], one["detail"], one["parameters"] and one["output_shape"][-1]) for one in box.members]


def _color(kind: str) -> str:
    return next((color for word, color in KINDS.items() if word in kind), OTHER)
