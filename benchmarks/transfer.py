"""What does it save that frozen layers are computed once?

    python benchmarks/transfer.py        # an hour or more of two cores, nothing else running; needs no network

The head search of five heads on DenseNet201 and the fine-tuning of the last 10, 20, 30 and 50 layers of ResNet152, each
20 epochs long, twice: as Keras' `fit` on the whole network with Keras' own optimizers, one after the other in one
process that finds the pictures decoded, and as this pipeline, `ablab repro -j 2` from the picture files to the report,
with everything that it does around a training. Both take the same 800 pictures (560 to train with, 160 to validate),
the same random weights, the same order of pictures and two threads.

Printed are the seconds, their ratio, and how far the predictions for the validation part are apart: those that the
pipeline has made from features and those of the network that it has saved, on raw pictures; and those of both ways of
training, whose last bits differ in every step.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks import common  # noqa: E402

EPOCHS, BATCH, THREADS = 20, 32, 2
BOUNDS = {"heads": 0.1, "finetuning": 0.333}
# Of predictions with the same weights, and with weights that were trained by sums in another order.
APART = {"saved": 1e-5, "plain": 1e-2}
# Learning rates so small that trainings that differ in the last bits stay side by side.
HEADS: dict[str, Any] = {
    "model": {"backbone": "DenseNet201", "output": "sigmoid", "head_from": "flatten"},
    "train": {"optimizer": {"name": "adam", "learning_rate": 0.00001}, "loss": "binary_crossentropy"},
    "variants": {
        "dense256": {"dense1": {"units": 256, "activation": "linear"}},
        "dense1024_256": {"dense1": {"units": 1024, "activation": "linear"}, "dense2": {"units": 256}},
        "dense512_128": {
            "dense1": {"units": 512, "activation": "linear"},
            "dense2": {"units": 128, "activation": "sigmoid"},
        },
        "dense512": {"dense1": {"units": 512, "activation": "linear"}},
        "dense256_norm": {"dense1": {"units": 256, "activation": "linear", "normalization": "batch"}},
    },
}
DEPTHS: dict[str, Any] = {
    "model": {
        "backbone": "ResNet152",
        "output": "logits",
        "head_from": "flatten",
        "head": {"dense1": {"units": 256}},
    },
    "train": {"optimizer": {"name": "sgd", "learning_rate": 0.00001}, "loss": "categorical_crossentropy"},
    "variants": {f"last{depth}": {"last": depth} for depth in (10, 20, 30, 50)},
}


def study(part: str, weights: str, small: bool) -> dict[str, Any]:
    """The params.yaml of a half of the benchmark; or of two variants for one epoch."""
    made = HEADS if part == "heads" else DEPTHS
    key = "head" if part == "heads" else "trainable"
    base, *others = list(made["variants"])[: 2 if small else None]
    model = {"builder": "transfer", "weights": weights} | made["model"] | {key: made["variants"][base]}
    return {
        "study": {"name": f"benchmark_{part}", "baseline": base},
        "data": {
            "dataset": "image_folder",
            "path": "pictures",
            "image_size": [128, 128],
            "split": {"validation": 0.2, "test": 0.1, "seed": 0},
        },
        "model": model,
        "train": {"epochs": 1 if small else EPOCHS, "batch_size": BATCH, "keep": "last", "threads": THREADS}
        | made["train"],
        "seeds": [0],
        "variants": {base: {}} | {name: {"model": {key: made["variants"][name]}} for name in others},
    }


def project(folder: Path, part: str, pictures: int, small: bool) -> None:
    """A project of its own with the study, its pictures and the backbone's random weights."""
    made = study(part, "weights/random.weights.h5", small)
    common.project(folder, made)
    random = np.random.default_rng(0)
    for label, count in (("indoor", pictures * 5 // 8), ("outdoor", pictures * 3 // 8)):
        (folder / "pictures" / label).mkdir(parents=True)
        for number in range(count):
            coarse = random.integers(0, 256, (9, 9, 3), np.uint8)
            Image.fromarray(coarse).resize((200, 200)).save(folder / f"pictures/{label}/{number}.jpg")
    weights = [made["model"]["backbone"], "weights/random.weights.h5"]
    common.call(folder, sys.executable, str(Path(__file__).resolve()), "--weights", *weights)


def plain(folder: Path) -> None:
    """What a notebook does, called in a process of its own: `fit` on the whole network, one training after the other.

    Writes predictions of the validation part to plain/<variant>.npy.
    """
    from ablation_lab import frozen, models, optimization, params, pipeline
    from ablation_lab.backend import keras, tf

    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    made = params.load(folder / "params.yaml")
    arrays = pipeline.open_arrays(folder / "data/processed", ["indoor", "outdoor"])
    (folder / "plain").mkdir(exist_ok=True)
    started = time.perf_counter()
    for name, variant in made.variants.items():
        plan = variant.resolved()
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        network = models.build(plan["model"], "backbone", (128, 128, 3), 2)
        keras.Model(network.inputs, network.get_layer("features").input).load_weights(
            folder / made.baseline.model.weights
        )
        trained, output = models.trained(network, plan["model"]), models.output(plan["model"])
        form = optimization.label_form(plan["train"], output)
        optimizer = plan["train"]["optimizer"]
        trained.compile(
            keras.optimizers.get({"class_name": optimizer["name"], "config": optimizer}),
            optimization.loss(plan["train"], output),
            metrics=["accuracy"],
            jit_compile=False,  # faster here, and what the pipeline does
        )
        shuffled = pipeline.Shuffled(arrays.train, BATCH, None, 0)
        trained.fit(
            pipeline.training_batches(arrays, shuffled, 0, plan["train"]["epochs"], form),
            epochs=plan["train"]["epochs"],
            steps_per_epoch=shuffled.steps,
            validation_data=pipeline.ordered_batches(arrays, arrays.validation, frozen.BATCH, form),
            verbose=0,
        )
        images = arrays.inputs[0][arrays.validation].astype(np.float32)
        np.save(folder / f"plain/{name}.npy", network.predict(images, verbose=0))
        print(f"{name}: {time.perf_counter() - started:.0f} s since the start", flush=True)


def random_weights(backbone: str, path: str) -> None:
    """Random weights, normalised: without it the features of 152 layers are so large that in training the last bits of
    two equal networks become the first ones."""
    from ablation_lab.backend import keras
    from ablation_lab.models import transfer

    keras.utils.set_random_seed(0)
    function, preprocess = transfer.find(backbone)
    network = function(include_top=False, weights=None, input_shape=(128, 128, 3))
    for layer in network.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # one pass says all
    some = [
        np.asarray(Image.open(path).resize((128, 128)), np.float32) for path in sorted(Path().glob("pictures/*/1*.jpg"))
    ]
    network(preprocess(np.stack(some[:64])), training=True)
    network.save_weights(path)


def saved_predictions(folder: Path) -> None:
    """What the networks that the pipeline has saved make of the raw validation pictures, to saved/<variant>.npy."""
    from ablation_lab import models, params, pipeline

    arrays = pipeline.open_arrays(folder / "data/processed", ["indoor", "outdoor"])
    images = arrays.inputs[0][arrays.validation].astype(np.float32)
    (folder / "saved").mkdir(exist_ok=True)
    for name in params.load(folder / "params.yaml").variants:
        network = models.load(folder / f"cells/{name}/seed-0", "transfer")
        np.save(folder / f"saved/{name}.npy", network.predict(images, verbose=0))


def measure(part: str, folder: Path, pictures: int, small: bool) -> list[common.Figure]:
    """Both ways, and what they say."""
    project(folder, part, pictures, small)
    ours = common.call(folder, "ablab", "repro", "-j", "2")
    theirs = common.call(folder, sys.executable, str(Path(__file__).resolve()), "--plain", str(folder))
    common.call(folder, sys.executable, str(Path(__file__).resolve()), "--saved", str(folder))
    apart = dict.fromkeys(APART, 0.0)
    for path in sorted((folder / "plain").glob("*.npy")):
        with np.load(folder / f"cells/{path.stem}/seed-0/predictions.npz") as file:
            made = file["validation_probabilities"]
        for way in apart:
            apart[way] = max(apart[way], float(np.abs(np.load(folder / way / path.name) - made).max()))
    return [
        common.Figure(f"{part}: the pipeline : `fit` on the whole network", ours / theirs, at_most=BOUNDS[part]),
        common.Figure(f"{part}: the pipeline", ours, "s"),
        common.Figure(f"{part}: `fit` on the whole network", theirs, "s"),
        *(
            common.Figure(f"{part}: probabilities apart from those of {what}, at most", apart[way], at_most=APART[way])
            for way, what in (("saved", "the saved network"), ("plain", "`fit`"))
        ),
    ]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("parts", nargs="*", default=["heads", "finetuning"], help="heads, finetuning or both")
    parser.add_argument("--pictures", type=int, help="800 by default, as the studies have")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--saved", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--weights", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.plain:
        return plain(asked.plain)
    if asked.saved:
        return saved_predictions(asked.saved)
    if asked.weights:
        return random_weights(*asked.weights)
    figures = []
    pictures = asked.pictures or (80 if asked.small else 800)
    for part in asked.parts[: 1 if asked.small else None]:
        with tempfile.TemporaryDirectory() as place:
            figures += measure(part, Path(place) / "project", pictures, asked.small)
    common.finish(figures, asked)


if __name__ == "__main__":
    main()
