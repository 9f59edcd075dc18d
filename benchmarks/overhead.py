"""What does a cell cost around its training, and a `dvc repro` that has nothing to do?

    python benchmarks/overhead.py        # 6 minutes of two cores, nothing else running; needs no network

Five variants × three seeds of `studies/quickstart.yaml`. For one cell of each variant the seconds of `dvc repro
train@<cell>` are measured, less what its epochs took (`epoch_seconds` in its results) and less a process that only
imports TensorFlow and Keras as a cell does, the median of five such. What is left is DVC's own start, its look at all
earlier stages, building the network, checkpoints, predictions, MLflow's run, hashing and caching. Then the same of the
other ten cells, by one `dvc repro train`; and, when the study is done, `dvc repro` with nothing to do, five times.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks import common, quickstart  # noqa: E402

IMPORTS = (sys.executable, "-c", "from ablation_lab import backend")  # as a cell does


def study(small: bool) -> dict[str, Any]:
    """Five variants of the quickstart, or two with a seed less."""
    made = quickstart.study(small=False)
    kept = list(made["variants"])[: 2 if small else 5]
    made["variants"] = {name: made["variants"][name] for name in kept}
    return made | ({"seeds": [0, 1], "train": made["train"] | {"epochs": 2}} if small else {})


def trained(project: Path, name: str, seed: int) -> float:
    """The seconds that a cell's epochs took."""
    return sum(json.loads((project / f"cells/{name}/seed-{seed}/timing.json").read_text())["epoch_seconds"])


def measure(small: bool) -> list[common.Figure]:
    """A cell alone, cells in one `dvc repro`, and nothing to do."""
    made = study(small)
    names, (first, *others) = list(made["variants"]), made["seeds"]
    with tempfile.TemporaryDirectory() as place:
        project = common.project(Path(place) / "project", made)
        common.warm(project)
        imports = common.median("importing TensorFlow", [common.call(project, *IMPORTS) for _ in range(5)], "s")
        common.call(project, "dvc", "repro", "plan")
        alone = []
        for name in names:
            seconds = common.call(project, "dvc", "repro", f"train@{name}-{first}")
            alone.append(seconds - trained(project, name, first) - imports.value)
        seconds = common.call(project, "dvc", "repro", "train")
        cells = [(name, seed) for name in names for seed in others]
        together = (seconds - sum(trained(project, *cell) for cell in cells)) / len(cells) - imports.value
        common.call(project, "dvc", "repro")
        nothing = [common.call(project, "dvc", "repro") for _ in range(5)]
    count = len(names) * len(made["seeds"])
    return [
        common.median("around the training of a cell, by its own `dvc repro train@<cell>`", alone, "s", at_most=3),
        common.Figure(f"the same, for each of {len(cells)} cells of one `dvc repro train`", together, "s", at_most=3),
        common.median(f"`dvc repro` with nothing to do, {count} cells", nothing, "s", at_most=3),
        imports,
    ]


def main() -> None:
    asked = common.parser(__doc__).parse_args()
    common.finish(measure(asked.small), asked)


if __name__ == "__main__":
    main()
