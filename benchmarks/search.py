"""Does `ablab search` find more than a grid with as many trials?

    python benchmarks/search.py        # 10 minutes of one core; needs no network

A multilayer perceptron on the handwritten digits, trained for four epochs; learning rate, batch size, dropout and units
are sought within the same bounds by grids of 24 points and by 24 trials of the search. Where a grid's points lie is
chance, for nobody knows the best place beforehand: one grid lies in the middle of equal parts of the ranges, the others
are shifted within these parts at random. Grids and searches are repeated with several seeds, the training's own seed is
the same throughout. Printed are the best validation accuracy, which is what a search is for, and the test accuracy of
the network selected by it, which it has not seen.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from ablation_lab import datasets, evaluation, params, preprocess, search, training  # noqa: E402
from benchmarks import common  # noqa: E402

STUDY = {
    "study": {"name": "benchmark", "baseline": "mlp", "test": "sealed"},
    "data": {"dataset": "digits", "path": None, "split": {"validation": 0.3, "test": 0.3, "seed": 0}},
    "input": {},
    "model": {"builder": "mlp", "head_units": 64, "head_dropout": 0.2, "head": {"dense1": {}, "dense2": {}}},
    "train": {"epochs": 4, "batch_size": 32, "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9}},
    "seeds": [0],
    "variants": {"mlp": None},
}
RATE, BATCH = "train.optimizer.learning_rate", "train.batch_size"
DROPOUT, UNITS = "model.head_dropout", "model.head_units"
SPACE = [
    f"{RATE}=tag(log,interval(1e-4,1))",
    f"{BATCH}=tag(log,int(interval(16,128)))",
    f"{DROPOUT}=interval(0.0,0.6)",
    f"{UNITS}=tag(log,int(interval(8,256)))",
]
# Points of the grid: three learning rates, for it matters most, and two of each of the others.
POINTS = {RATE: 3, BATCH: 2, DROPOUT: 2, UNITS: 2}
TRIALS = 24
TRAINING_SEED = 0


class Trainer:
    """Trains combinations of values in this process, each once."""

    def __init__(self, folder: Path):
        self.data = folder / "processed"
        study = params.validate(STUDY)
        datasets.download(study.data, folder / "raw")
        preprocess.preprocess(study.data, folder / "raw", self.data)
        self.known: dict[tuple, tuple[float, float]] = {}

    def accuracies(self, values: dict[str, str]) -> tuple[float, float]:
        """Validation and test accuracy; both 0 when the training diverged."""
        key = (float(values[RATE]), int(values[BATCH]), float(values[DROPOUT]), int(values[UNITS]))
        if key not in self.known:
            rate, batch, dropout, units = key
            model = STUDY["model"] | {"head_units": units, "head_dropout": dropout}
            optimizer = STUDY["train"]["optimizer"] | {"learning_rate": rate}
            train = STUDY["train"] | {"batch_size": batch, "optimizer": optimizer}
            plan = params.validate(STUDY | {"model": model, "train": train}).baseline.resolved()
            with tempfile.TemporaryDirectory() as out:
                training.train(plan, TRAINING_SEED, self.data, Path(out), "trial", lambda row: None)
                with np.load(Path(out) / "predictions.npz") as file:
                    scores = [
                        evaluation.score(file[f"{part}_probabilities"], file[f"{part}_labels"])
                        for part in evaluation.PARTS
                    ]
            self.known[key] = tuple(score["accuracy"] if score else 0.0 for score in scores)
        return self.known[key]


def best(trainer: Trainer, combinations: list[dict[str, str]]) -> tuple[float, float]:
    """The accuracies of the combination that the validation part selects."""
    assert len(combinations) == TRIALS
    return max((trainer.accuracies(values) for values in combinations), key=lambda scores: scores[0])


def grid(space: dict[str, BaseDistribution], shifts: dict[str, float]) -> list[dict[str, str]]:
    """Points evenly spaced on each one's scale, shifted within the equal parts of it by so much of a part."""
    axes = []
    for key, points in POINTS.items():
        one = space[key]
        places = (np.arange(points) + shifts[key]) / points
        low, high = (np.log(one.low), np.log(one.high)) if one.log else (one.low, one.high)
        values = low + places * (high - low)
        values = np.exp(values) if one.log else values
        axes.append([str(round(value)) if isinstance(one, IntDistribution) else f"{value:.4g}" for value in values])
    return [dict(zip(POINTS, point, strict=True)) for point in itertools.product(*axes)]


def sought(trainer: Trainer, space: dict[str, BaseDistribution], seed: int) -> list[dict[str, str]]:
    """What `ablab search --seed` tries."""
    tried: list[dict[str, str]] = []

    def objective(values: dict[str, str]) -> float:
        tried.append(values)
        return trainer.accuracies(values)[0]

    search.maximise(space, objective, TRIALS, seed)
    return tried


def measure(seeds: int) -> list[common.Figure]:
    """Grids and searches, repeated so often."""
    _, space = search.parse(SPACE, STUDY)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Path(folder))
        middle = best(trainer, grid(space, dict.fromkeys(POINTS, 0.5)))
        print(f"grid of middles: validation {middle[0]:.4f}, test {middle[1]:.4f}", flush=True)
        grids, searches = [], []
        for seed in range(seeds):
            shifts = dict(zip(POINTS, np.random.default_rng(seed).random(len(POINTS)), strict=True))
            grids.append(best(trainer, grid(space, shifts)))
            searches.append(best(trainer, sought(trainer, space, seed)))
            print(f"seed {seed}: validation of grid {grids[-1][0]:.4f}, search {searches[-1][0]:.4f}", flush=True)
    print(f"\nBest of {TRIALS} trials, {seeds} repetitions, mean ± standard deviation:")
    for name, found in (("grid, shifted", grids), ("ablab search", searches)):
        (validation, test), spread = np.mean(found, axis=0), np.std(found, axis=0, ddof=seeds > 1)
        print(f"{name:14} validation {validation:.4f} ± {spread[0]:.4f}, test {test:.4f} ± {spread[1]:.4f}")
    figures = []
    for number, part in enumerate(("validation", "test")):
        for name, found in (("`ablab search`", searches), ("grid, shifted", grids), ("grid of middles", [middle])):
            what = f"{name}: {part} accuracy of the best of {TRIALS}"
            figures.append(common.median(what, [100 * one[number] for one in found], "%"))
    better = np.array(searches)[:, 0] > np.array(grids)[:, 0]
    return [*figures, common.Figure(f"searches better than the shifted grid, of {seeds}", int(better.sum()))]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, help="how often grid and search are repeated; 5 by default")
    asked = parser.parse_args()
    common.finish(measure(asked.seeds or (1 if asked.small else 5)), asked)


if __name__ == "__main__":
    main()
