from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import FancyBboxPatch

from ablation_lab.report import drawing


def layer(name, kind, inputs, detail="", shape=(8, 8, 4), parameters=0):
    return {
        "name": name,
        "type": kind,
        "detail": detail,
        "inputs": inputs,
        "output_shape": list(shape),
        "parameters": parameters,
        "macs": 0,
    }


def residual(filters=4):
    """A residual block, its layers in an order that is not that of the data."""
    wide = {"shape": (8, 8, filters), "parameters": 40}
    return {
        "layers": [
            layer("image", "InputLayer", []),
            layer("add", "Add", ["image", "norm"]),
            layer("conv", "Conv2D", ["image"], "3×3, same", **wide),
            layer("norm", "BatchNormalization", ["conv"], parameters=16),
            layer("relu", "Activation", ["add"], "relu"),
            layer("out", "Dense", ["relu"], "softmax", shape=(10,), parameters=90),
        ]
    }


def words(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def thick(figure):
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    return [box.get_linewidth() > 2 for box in boxes]


def test_boxes_follow_the_data_and_small_layers_are_folded():
    boxes = drawing._boxes(residual()["layers"])
    assert [[one["name"] for one in box.members] for box in boxes] == [
        ["image"],
        ["conv", "norm"],
        ["add", "relu"],
        ["out"],
    ]
    assert [box.inputs for box in boxes] == [[], [0], [0, 1], [2]]


def test_a_drawing_tells_types_shapes_and_parameters():
    told = words(drawing.draw(residual(), None, 6))
    assert {"Conv2D 3×3, same", "conv → BatchNormalization", "8×8×4", "56", "add → relu", "Dense softmax"} <= set(told)


def test_what_differs_is_framed():
    assert thick(drawing.draw(residual(), None, 6)) == [False] * 4
    assert thick(drawing.draw(residual(), residual(), 6)) == [False] * 4
    assert thick(drawing.draw(residual(filters=5), residual(), 6)) == [False, True, False, False]
    without_relu = residual()
    without_relu["layers"][4:] = [layer("out", "Dense", ["add"], "softmax", shape=(10,), parameters=90)]
    assert thick(drawing.draw(residual(), without_relu, 6)) == [False, False, True, False]


def test_long_names_stay_in_their_box():
    network = residual()
    network["layers"][2]["name"] = network["layers"][3]["inputs"][0] = (
        "the_first_separable_convolution_of_the_encoder" * 3
    )
    figure = drawing.draw(network, None, 6)
    canvas = FigureCanvasAgg(figure)
    boxes = [patch for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    right = boxes[0].get_window_extent(canvas.get_renderer()).x1
    texts = [text.get_window_extent(canvas.get_renderer()) for text in figure.axes[0].texts]
    assert max(extent.x1 for extent in texts) < right
    overlaps = [a for a in texts for b in texts if a is not b and a.overlaps(b)]
    assert not overlaps


def test_a_network_of_very_many_layers_is_not_drawn():
    chain = [layer(f"d{i}", "Dense", [f"d{i - 1}"] if i else []) for i in range(drawing.MOST + 1)]
    assert drawing.draw({"layers": chain}, None, 6) is None
