"""Gather what the report needs and assemble `results.json` and `timings.json`."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from ablation_lab import cell, evaluation, files, selection, statistics
from ablation_lab.errors import LabError
from ablation_lab.params import Params
from ablation_lab.report import budget
from ablation_lab.words import counted

LARGEST = 96  # pixels of a shown picture's longer side
PAIRS, EXAMPLES = 3, 5  # pairs of confused classes that are shown for a variant, and pictures of each
NOTHING = {"parameters": 0, "macs": 0}
BINARY = evaluation.BINARY


@dataclass(frozen=True)
class Pair:
    """Two classes that are confused: how often, over all seeds, out of how many of the actual class; and test pictures
    with the probability that the first seed's network gave to the wrong class, the surest first."""

    actual: int
    predicted: int
    count: int
    of: int
    pictures: list[tuple[np.ndarray, float]]


@dataclass(frozen=True)
class Wrong:
    """A test picture that was taken for another class, and the probability that it was given."""

    picture: np.ndarray
    actual: int
    predicted: int
    probability: float


@dataclass(frozen=True)
class Shown:
    """A few fixed test pictures, their class numbers, and by variant the probabilities (pictures × classes) before and
    after training with the first seed."""

    pictures: list[np.ndarray]
    labels: np.ndarray
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


@dataclass(frozen=True)
class Material:
    """All inputs of figures and pages.

    Args:
        results, timings: as written to results.json and timings.json.
        steps: comparisons with `compared_with`, of the variants that have one; like a result's `delta`.
        networks: plan/networks/<variant>.json by variant.
        cells: evaluation/cells.json by (variant, seed).
        curves: evaluation/curves.csv.
        card: data/processed/card.json.
        duplicates: data/processed/duplicates.json; None where the pictures were prepared before there was one.
        pictures: sample pictures (uint8) with their class numbers.
        mistakes: of each variant that did not diverge, the pairs of classes that it confuses most.
        shown: a few test pictures with the probabilities that each variant gave them, where it has cells; None while
            they are sealed.
        choice: selection/start/choice.json; None in a study of one phase.
        roc: of a problem with two classes, by variant the points of each seed's ROC curve on the test part: rates of
            false and of true positives, (2, thresholds).
        surest: of each variant that did not diverge, the first seed's wrong answers that it was surest of.
        resolution: of each variant, half the interval that the choice of test pictures alone leaves to its difference
            from the baseline; None where there is no difference.
        source: the ready-made study of the same name, `studies/<name>.yaml`; None where there is none.
        target: the highest whole per cent of validation accuracy that every seed of the baseline reaches; None where
            one diverged.
    """

    results: dict[str, Any]
    timings: dict[str, Any]
    steps: dict[str, dict[str, Any]]
    networks: dict[str, dict[str, Any]]
    cells: dict[tuple[str, int], dict[str, Any]]
    curves: pd.DataFrame
    card: dict[str, Any]
    duplicates: dict[str, Any] | None
    pictures: list[tuple[np.ndarray, int]]
    mistakes: dict[str, list[Pair]]
    shown: Shown | None
    choice: dict[str, Any] | None
    roc: dict[str, list[np.ndarray]]
    surest: dict[str, list[Wrong]]
    resolution: dict[str, float | None]
    target: float | None
    source: Params | None

    def confusion(self, variant: str) -> np.ndarray | None:
        """Counts of the test part, actual × predicted, summed over the seeds; None where one diverged."""
        return _confusion(self.cells, variant)

    def class_scores(self, variant: str, which: str) -> np.ndarray | None:
        """precision, recall or f1 of each class on the test part, the mean over the seeds; None where one diverged."""
        scores = [scores["per_class"][which] for scores in self._tests(variant)]
        return np.mean(scores, axis=0) if scores else None

    def calibration(self, variant: str) -> dict[str, np.ndarray] | None:
        """Pictures, confidence and right of each range of confidence on the test part, summed over the seeds."""
        found = [scores["calibration"] for scores in self._tests(variant)]
        return {key: np.sum([one[key] for one in found], axis=0) for key in found[0]} if found else None

    def gaps(self, variant: str) -> list[float]:
        """Training minus validation accuracy of the kept weights, in points, of the seeds that did not diverge."""
        cells = self.results["variants"][variant]["cells"].values()
        return [100 * (one["train_accuracy"] - one["validation_accuracy"]) for one in cells if one["status"] == "ok"]

    def history(self, variant: str, seed: int) -> pd.DataFrame:
        """A cell's rows of `curves`."""
        return self._histories.get((variant, seed), self.curves[:0])

    @cached_property
    def _histories(self) -> dict[Any, pd.DataFrame]:
        return dict(iter(self.curves.groupby(["variant", "seed"], sort=False)))

    def _tests(self, variant: str) -> list[dict[str, Any]]:
        return _tests(self.cells, variant)


def validation_means(results: dict[str, Any]) -> dict[str, float]:
    """Validation accuracies, means over seeds, of the variants that no seed diverged of."""
    means = {name: mean_of(one, "validation_accuracy") for name, one in results["variants"].items()}
    return {name: mean for name, mean in means.items() if mean is not None}


def mean_of(variant: dict[str, Any], key: str) -> float | None:
    """A variant's mean over seeds; None where one of them diverged."""
    return _mean([cell[key] for cell in variant["cells"].values()])


def lacking(variant: dict[str, Any]) -> str:
    """Why a variant has no mean: a seed diverged or, in a partial report, all its cells are missing."""
    return "diverged" if variant["cells"] else "missing"


def no_effect(variant: dict[str, Any], reference: str) -> bool:
    """Whether a variant is a reference, byte for byte, in each cell it has: in a partial report some are missing."""
    same = variant["no_effect"].get(reference, [])
    return bool(same) and len(same) == len(variant["cells"])


def gather(study: Params, root: Path, evaluated: Path | None = None, partial: dict[str, Any] | None = None) -> Material:
    """Read the earlier stages' results and compare the variants.

    Args:
        evaluated: the folder that `evaluate` wrote, `evaluation/` by default.
        partial: what `results.json` says of the cells that are missing; None where all cells have to be there.
    """
    evaluated = evaluated or root / "evaluation"
    networks = {name: folded(files.read_json(cell.plan_file(name, root, "networks/"))) for name in study.variants}
    card = files.read_json(root / "data/processed/card.json")
    listed = files.read_json(evaluated / "cells.json")
    cells = {(cell["variant"], cell["seed"]): cell for cell in listed}
    absent = [f"{name}-{seed}" for name, seed in study.cells if (name, seed) not in cells]
    if absent and not partial:
        raise LabError(
            f"{evaluated / 'cells.json'}: Expected all cells of the study. Found: none of {', '.join(absent)}. "
            "Run `dvc repro`."
        )
    seeds = {name: [seed for seed in study.seeds if (name, seed) in cells] for name in study.variants}
    try:
        images = np.load(root / "data/processed/images.npy", mmap_mode="r", allow_pickle=False)
        labels = np.load(root / "data/processed/labels.npy", allow_pickle=False)
        parts = {part: np.load(root / f"data/processed/{part}.npy", allow_pickle=False) for part in ("train", "test")}
        flags = np.load(evaluated / "correct.npy", allow_pickle=False)
        curves = pd.read_csv(
            evaluated / "curves.csv",
            dtype={"variant": str},
            keep_default_na=False,  # a variant may be called None
            na_values={column: "" for column in evaluation.CURVES},
        )
    except FileNotFoundError as error:
        raise LabError(
            f"{error.filename}: Expected a result of an earlier stage. Found: no such file. Run `dvc repro`."
        ) from None
    right: dict[str, dict[int, np.ndarray | None]] = {name: {} for name in study.variants}
    for row, scored in enumerate(listed):
        if scored["variant"] in right and scored["seed"] in study.seeds:
            right[scored["variant"]][scored["seed"]] = flags[row] if scored["test"] else None

    baseline = study.study.baseline
    none = {"mean": None, "ci95": None, "p_adjusted": None, "verdict": None, "seeds_needed": None}
    others = {name: baseline for name in study.variants if name != baseline}
    references = {name: variant.compared_with for name, variant in study.variants.items() if variant.compared_with}
    if "test" in evaluation.scored_parts(study):
        deltas, steps = statistics.compare(right, others), statistics.compare(right, references)
    else:
        deltas, steps = {name: none | {"verdict": "undetermined"} for name in others}, {}
    variants = {}
    for name, variant in study.variants.items():
        shown = {str(seed): _cell(cells[name, seed]) for seed in seeds[name]}
        variants[name] = {
            "parameters": networks[name]["parameters"],
            "macs": networks[name]["macs"],
            "differences": networks[name]["differences"],
            "reported": variant.reported,
            "cells": shown,
            "test_accuracy": statistics.summarize(right[name]),
            "delta": deltas.get(name, none),
            "no_effect": {
                reference: same
                for reference in dict.fromkeys((baseline, variant.compared_with))
                if reference and reference != name and (same := evaluation.unaffected(cells, name, reference))
            },
        }
    results = {
        "study": study.study.name,
        "baseline": baseline,
        "partial": partial,
        "data": {key: card[key] for key in ("name", "classes", "counts", "digest")},
        "variants": variants,
    }
    wrong = {name: _wrong_answers(seeds[name], name, cells, images, parts["test"], root) for name in study.variants}
    return Material(
        results,
        _timings(study, seeds, root),
        steps,
        networks,
        cells,
        curves,
        card,
        files.read_json(equal) if (equal := root / "data/processed/duplicates.json").exists() else None,
        _pictures(images, labels, parts["train"], card),
        {name: pairs for name, (pairs, _) in wrong.items()},
        _shown(seeds, images, parts["test"], root) if "test" in evaluation.scored_parts(study) else None,
        files.read_json(root / cell.SELECTION / selection.CHOICE) if study.second else None,
        _roc(seeds, cells, root) if len(card["classes"]) == 2 else {},
        {name: surest for name, (_, surest) in wrong.items()},
        {name: statistics.resolution(right[name], right[baseline]) for name in others},
        _target(baseline, seeds[baseline], cells, curves),
        budget.source(study, root),
    )


def _target(
    baseline: str, seeds: list[int], cells: dict[tuple[str, int], dict[str, Any]], curves: pd.DataFrame
) -> float | None:
    if not seeds or any(cells[baseline, seed]["status"] == "diverged" for seed in seeds):
        return None
    own = curves[(curves["variant"] == baseline) & curves["seed"].isin(seeds)]
    best = own.groupby("seed")["val_accuracy"].max()
    return float(np.floor(100 * best.min() + 1e-6) / 100)


def folded(network: dict[str, Any]) -> dict[str, Any]:
    """A plan's network with the layers of a ready-made backbone as one, or as two where some of them are trained."""
    layers: list[dict[str, Any]] = []
    renamed: dict[str, str] = {}
    for layer in network["layers"]:
        whose = layer.get("of")
        feeding = list(dict.fromkeys(renamed.get(one, one) for one in layer["inputs"]))
        if whose is None:
            layers.append(layer | {"inputs": feeding})
            continue
        renamed[layer["name"]] = whose
        if not layers or layers[-1]["name"] != whose:
            layers.append({"name": whose, "type": "0 layers", "detail": "", "inputs": feeding} | NOTHING)
        one = layers[-1]
        count = int(one["type"].split()[0]) + 1
        one |= {"type": counted(count, "layer"), "output_shape": layer["output_shape"]}
        one |= {key: one[key] + layer[key] for key in NOTHING}
    return network | {"layers": layers}


def _tests(cells: dict[tuple[str, int], dict[str, Any]], variant: str) -> list[dict[str, Any]]:
    """A variant's scores on the test part by seed; none where a seed diverged, for the others would flatter it."""
    scores = [cell["test"] for (name, _), cell in cells.items() if name == variant]
    return scores if all(scores) else []


def _confusion(cells: dict[tuple[str, int], dict[str, Any]], variant: str) -> np.ndarray | None:
    counts = [scores["confusion"] for scores in _tests(cells, variant)]
    return np.sum(counts, axis=0) if counts else None


def _wrong_answers(
    seeds: list[int],
    name: str,
    cells: dict[tuple[str, int], dict[str, Any]],
    images: np.ndarray,
    test: np.ndarray,
    root: Path,
) -> tuple[list[Pair], list[Wrong]]:
    """The pairs of classes that a variant confuses most, and what its first seed's network was surest of and wrong."""
    counts = _confusion(cells, name)
    if counts is None:
        return [], []
    file = _arrays(cell.folder(name, seeds[0], root) / cell.PREDICTIONS)
    probabilities, labels = file["test_probabilities"], file["test_labels"]
    chosen, surety = probabilities.argmax(axis=1), probabilities.max(axis=1)
    confused = counts - np.diag(np.diag(counts))
    pairs = []
    for place in np.argsort(-confused.ravel(), kind="stable")[:PAIRS]:
        actual, predicted = divmod(int(place), len(counts))
        if not confused[actual, predicted]:
            break
        members = np.flatnonzero((labels == actual) & (chosen == predicted))
        shown = members[np.argsort(-surety[members], kind="stable")[:EXAMPLES]]
        pictures = [(_thumbnail(images[test[i]]), float(surety[i])) for i in shown]
        pairs.append(Pair(actual, predicted, int(confused[actual, predicted]), int(counts[actual].sum()), pictures))
    wrong = np.flatnonzero(chosen != labels)
    wrong = wrong[np.argsort(-surety[wrong], kind="stable")[:EXAMPLES]]
    surest = [Wrong(_thumbnail(images[test[i]]), int(labels[i]), int(chosen[i]), float(surety[i])) for i in wrong]
    return pairs, surest


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise files.missing(path) from None


def _shown(seeds: dict[str, list[int]], images: np.ndarray, test: np.ndarray, root: Path) -> Shown:
    before, after = {}, {}
    positions, labels = np.zeros(0, int), np.zeros(0, int)
    for name, (first, *_) in ((name, own) for name, own in seeds.items() if own):
        folder = cell.folder(name, first, root)
        untrained, predictions = _arrays(folder / cell.UNTRAINED), _arrays(folder / cell.PREDICTIONS)
        positions, before[name] = untrained["positions"], untrained["probabilities"]
        labels, after[name] = predictions["test_labels"][positions], predictions["test_probabilities"][positions]
    return Shown([_thumbnail(images[test[i]]) for i in positions], labels, before, after)


def _roc(
    seeds: dict[str, list[int]], cells: dict[tuple[str, int], dict[str, Any]], root: Path
) -> dict[str, list[np.ndarray]]:
    from sklearn.metrics import roc_curve  # takes half a second

    found: dict[str, list[np.ndarray]] = {}
    for name, own in seeds.items():
        scores = _tests(cells, name)
        if not scores or None in [one["roc_auc"] for one in scores]:
            continue
        found[name] = []
        for seed in own:
            file = _arrays(cell.folder(name, seed, root) / cell.PREDICTIONS)
            curve = roc_curve(file["test_labels"], file["test_probabilities"][:, 1], drop_intermediate=False)
            found[name].append(np.array(curve[:2]))
    return found


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    """A picture as it is shown: small enough that a page of them stays small."""
    if max(picture.shape[:2]) <= LARGEST:
        return np.array(picture)
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    image.thumbnail((LARGEST, LARGEST))
    return np.asarray(image).reshape(image.height, image.width, -1)


def _cell(cell: dict[str, Any]) -> dict[str, Any]:
    validation, test = cell["validation"] or {}, cell["test"] or {}
    kept = {key: cell[key] for key in ("status", "cell_hash", "epochs", "best_epoch", "train_accuracy")}
    if cell["status"] == "diverged":
        kept["train_accuracy"] = None
    kept |= {"validation_accuracy": validation.get("accuracy"), "test_accuracy": test.get("accuracy")}
    kept |= {"test_loss": test.get("loss"), "macro_f1": test.get("macro_f1")}
    return kept | {key: test[key] for key in BINARY if key in test}


def _timings(study: Params, seeds: dict[str, list[int]], root: Path) -> dict[str, Any]:
    """Seconds of each cell, of an epoch their median; of a variant the mean over its cells. `total_seconds` is one
    whole training."""
    timings: dict[str, Any] = {}
    for name in study.variants:
        cells = {}
        for seed in seeds[name]:
            measured = files.read_json(cell.folder(name, seed, root) / cell.TIMING)
            epochs = measured["epoch_seconds"]
            cells[str(seed)] = {
                # The median: the first epoch also compiles, and a busy machine slows some of them down.
                "seconds_per_epoch": float(np.median(epochs)) if epochs else None,
                "epoch_seconds": epochs,
                "total_seconds": measured["total_seconds"],
                "device": measured["device"],
                "threads": measured["threads"],
            }
        timings[name] = {
            "seconds_per_epoch": _mean([cell["seconds_per_epoch"] for cell in cells.values()]),
            "total_seconds": _mean([cell["total_seconds"] for cell in cells.values()]),
            "device": ", ".join(sorted({str(cell["device"]) for cell in cells.values()})),
            "threads": sorted({cell["threads"] for cell in cells.values()}),
            "cells": cells,
        }
    return {"study": study.study.name, "variants": timings}


def _mean(values: list) -> float | None:
    """None where there is nothing to take a mean of, or where one value is missing."""
    return None if not values or None in values else float(np.mean(values))


def _pictures(
    images: np.ndarray, labels: np.ndarray, train: np.ndarray, card: dict[str, Any]
) -> list[tuple[np.ndarray, int]]:
    """Pictures of the training part: the same number of each class, evenly spaced over the part, at most 20 classes."""
    numbers = range(min(len(card["classes"]), 20))
    each = max(1, 20 // len(numbers))
    chosen = []
    for number in numbers:
        members = train[labels[train] == number]
        places = np.unique(np.linspace(0, len(members) - 1, min(each, len(members))).astype(int))
        chosen += [(_thumbnail(images[index]), number) for index in members[places]]
    return chosen
