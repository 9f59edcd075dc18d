"""How long does a study of colour pictures take, beside one plain script with all cores?

    python benchmarks/cifar.py        # 20 minutes of two cores, nothing else running; needs no network

Four variants of a network of three blocks (48, 96, 192 filters), ten epochs each of 10,000 pictures of 32×32×3 in
batches of 64, one seed. The pictures are random ones that can be learned, PNG files in one archive with `train/<class>`
and `test/<class>`, 11,000 and 2,000 of them. Both sides begin with this archive and are timed from the start of their
first process to the end of the last: `ablab repro -j 2` with one thread a cell, which packs, decodes, compares and
splits the pictures, plans, trains, evaluates, writes the report and MLflow's runs; and `benchmarks/plain/cifar.py`,
which decodes them, trains one network after the other by `fit` with TensorFlow's own number of threads, saves weights
and history and scores the test part.
"""

import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks import common  # noqa: E402

CLASSES = 10


def study(epochs: int) -> dict[str, Any]:
    """The params.yaml; its variants are those of the plain script."""
    split = {"validation": 1 / 11, "test": "given", "seed": 0}
    data = {"dataset": "image_folder", "path": "pictures.tar", "split": split}
    variants = {
        "no_dropout": {"model": {"dropout": 0, "head_dropout": 0}},
        "average_pool": {"model": {"pool_type": "average"}},
        "tanh": {"model": {"activation": "tanh"}},
    }
    return common.study(data, (48, 96, 192), 128, {"epochs": epochs, "batch_size": 64}, variants)


def archive(path: Path, counts: dict[str, int]) -> None:
    """Pictures of ten classes: what is typical for a class under as much noise."""
    random = np.random.default_rng(0)
    typical = random.integers(128, size=(CLASSES, 32, 32, 3), dtype=np.uint8)
    with tarfile.open(path, "w") as opened:
        for part, count in counts.items():
            for number in range(count):
                label = number % CLASSES
                content = io.BytesIO()
                picture = typical[label] + random.integers(128, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(picture).save(content, "png", compress_level=1)
                info = tarfile.TarInfo(f"{part}/class{label}/{number:05}.png")
                info.size = content.tell()
                content.seek(0)
                opened.addfile(info, content)


def measure(epochs: int, counts: dict[str, int]) -> list[common.Figure]:
    """Both ways, and what they score."""
    with tempfile.TemporaryDirectory() as place:
        project = common.project(Path(place) / "project", study(epochs))
        archive(project / "pictures.tar", counts)
        plain = Path(place) / "plain"
        plain.mkdir()
        common.warm(plain)
        ours = common.call(project, "ablab", "repro", "-j", "2")
        script = [sys.executable, str(common.PLAIN / "cifar.py"), str(project / "pictures.tar"), str(epochs)]
        theirs = common.call(plain, *script)
        results = json.loads((project / "reports/results.json").read_text())["variants"]
        figures = [
            common.Figure("`ablab repro -j 2` : the plain script", ours / theirs, at_most=0.9),
            common.Figure(f"`ablab repro -j 2`, {len(results)} cells", ours, "s"),
            common.Figure("the plain script", theirs, "s"),
        ]
        for name, one in results.items():
            scores = json.loads((plain / f"{name}.json").read_text())
            assert scores["parameters"] == one["parameters"], name
            ours, theirs = 100 * one["cells"]["0"]["test_accuracy"], 100 * scores["test_accuracy"]
            figures.append(common.Figure(f"test accuracy of {name}, pipeline", ours, "%"))
            figures.append(common.Figure(f"test accuracy of {name}, plain script", theirs, "%"))
    return figures


def main() -> None:
    asked = common.parser(__doc__).parse_args()
    epochs, counts = (1, {"train": 550, "test": 100}) if asked.small else (10, {"train": 11_000, "test": 2000})
    common.finish(measure(epochs, counts), asked)


if __name__ == "__main__":
    main()
