"""Predictions → metrics, without TensorFlow: a new metric retrains nothing.

`evaluate` reads the cells of a study and writes `evaluation/`:

- `cells.json`: a list with one object a cell, for the report; cells of a seed with equal weights and predictions have
  an equal `fingerprint`;
- `cells.csv`, `curves.csv`: one row a cell, one row an epoch;
- `correct.npy`: bool, cells × test pictures, in the order of cells.json: what was classified correctly;
- `metrics.json`: means over seeds, for `dvc metrics show`;
- `confusion.csv`: one row a test picture of the baseline's first seed, for the plot template `confusion` of DVC.

While the study's test part is sealed, nothing of it is scored: the files keep their form, without its numbers.
"""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ablation_lab import cell, files
from ablation_lab.errors import LabError
from ablation_lab.params import Params

PARTS = ("validation", "test")
BINARY = ("precision", "recall", "roc_auc")  # of the second of two classes
BINS = 15  # of confidence, as in Guo et al., On Calibration of Modern Neural Networks (2017)
CURVES = ("loss", "accuracy", "val_loss", "val_accuracy")
FORMULA = tuple("=+-@\t\r＝＋－＠")  # what makes a spreadsheet read a cell as a formula (OWASP, "CSV Injection")
# What cell.json says about the fit itself, carried over as it is.
FROM_CELL = ("status", "cell_hash", "plan_hash", "epochs", "best_epoch", "train_accuracy", "train_loss")
ARRAYS = tuple(f"{part}_{what}" for part in PARTS for what in ("probabilities", "labels"))


def score(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any] | None:
    """Score one part of the data.

    Args:
        probabilities: pictures × classes, rows that sum to one; two columns for a binary problem.
        labels: the pictures' class numbers.

    Returns:
        accuracy, loss (cross-entropy, in nats), macro_f1, confusion (counts, actual × predicted) and per-class
        precision, recall and f1 (0 where a class is never predicted or absent); for two classes also precision,
        recall and roc_auc of class 1. `calibration` has, for each of 15 equal ranges of confidence (the highest
        probability), the number of pictures, the sum of their confidences and how many were right;
        `calibration_error` is the mean distance of confidence and accuracy, ranges weighted by pictures (ECE). None
        when a probability is not a number: the training diverged.
    """
    # Takes a second, which the report and MLflow's sync need not spend.
    from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support, roc_auc_score

    with np.errstate(invalid="ignore", divide="ignore"):
        probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    if not np.isfinite(probabilities).all():
        return None
    classes = np.arange(probabilities.shape[1])
    confusion = confusion_matrix(labels, probabilities.argmax(axis=1), labels=classes)
    # The matrix holds all that these scores need; its cells as weights are far fewer than the pictures.
    actual, predicted = np.divmod(np.arange(confusion.size), len(classes))
    precision, recall, f1, _ = precision_recall_fscore_support(
        actual, predicted, labels=classes, sample_weight=confusion.ravel(), zero_division=0
    )
    scores = {
        "accuracy": float(np.trace(confusion) / len(labels)),
        "loss": float(log_loss(labels, probabilities, labels=classes)),
        "macro_f1": float(np.mean(f1)),
        "confusion": confusion.tolist(),
        "per_class": {"precision": precision.tolist(), "recall": recall.tolist(), "f1": f1.tolist()},
    } | _calibration(probabilities, labels)
    if len(classes) == 2:
        both = 0 < labels.sum() < len(labels)
        scores |= {
            "precision": float(precision[1]),
            "recall": float(recall[1]),
            "roc_auc": float(roc_auc_score(labels, probabilities[:, 1])) if both else None,
        }
    return scores


def _calibration(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    confidence = probabilities.max(axis=1)
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    sums = [
        np.bincount(place, weights, BINS)
        for weights in (np.ones(len(labels)), confidence, probabilities.argmax(axis=1) == labels)
    ]
    return {
        "calibration_error": float(np.abs(sums[1] - sums[2]).sum() / len(labels)),
        "calibration": {
            "pictures": sums[0].astype(int).tolist(),
            "confidence": np.round(sums[1], 6).tolist(),
            "right": sums[2].astype(int).tolist(),
        },
    }


def evaluate(
    study: Params, root: Path = Path(), cells: Sequence[tuple[str, int]] | None = None, out: Path | None = None
) -> None:
    """Score the cells of a study and write `evaluation/`; other folders in `cells/` are ignored.

    Args:
        cells: the cells to score, some of the study's; all of them by default.
        out: the folder to write, `evaluation/` by default.

    Raises:
        LabError: when a cell, or a file of one, is missing or does not belong to this study's data.
    """
    names = files.read_json(root / "data/processed/card.json")["classes"]
    networks = {name: files.read_json(cell.plan_file(name, root, "networks/")) for name in study.variants}
    scored, correct, curves = [], [], []
    shown, labels = np.zeros(0, int), None
    parts = scored_parts(study)
    for variant, seed in study.cells if cells is None else cells:
        folder = cell.folder(variant, seed, root)
        predictions = _predictions(folder / cell.PREDICTIONS, len(names))
        if labels is None:
            labels = predictions["test_labels"]
        elif not np.array_equal(labels, predictions["test_labels"]):
            raise LabError(
                f"{folder / 'predictions.npz'}: Expected the same test pictures as in the other cells. "
                "Found: other labels. Run `dvc repro`."
            )
        fit = files.read_json(folder / cell.RESULT)
        if fit["plan_hash"] != networks[variant]["plan_hash"]:
            raise LabError(f"{folder}: Expected the cell of today's plan. Found: another plan's. Run `dvc repro`.")
        scores = {part: score(predictions[f"{part}_probabilities"], predictions[f"{part}_labels"]) for part in parts}
        if fit["status"] == "diverged" or None in scores.values():
            fit["status"], scores = "diverged", {}
        scores = dict.fromkeys(PARTS) | scores
        scored.append({"variant": variant, "seed": seed} | {key: fit.get(key) for key in FROM_CELL} | scores)
        predicted = np.nan_to_num(predictions["test_probabilities"]).argmax(axis=1)
        right = (predicted == labels) & (scores["test"] is not None)
        correct.append(right if "test" in parts else right[:0])
        if (variant, seed) == (study.study.baseline, study.seeds[0]) and scores["test"]:
            shown = predicted
        curves += _history(folder / cell.HISTORY, variant, seed)
        scored[-1]["fingerprint"] = None if fit["status"] == "diverged" else _digest(predictions)
    _add_weights(scored, root)

    with files.whole(out or root / "evaluation") as out:
        lines = ",\n".join(json.dumps(one, ensure_ascii=False, allow_nan=False) for one in scored)
        (out / "cells.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        np.save(out / "correct.npy", np.array(correct))
        rows = [_row(one, binary=len(names) == 2) for one in scored]
        _write_csv(out / "cells.csv", list(rows[0]), [list(row.values()) for row in rows])
        _write_csv(out / "curves.csv", ["variant", "seed", "epoch", *CURVES], curves)
        metrics = {
            name: _means([row for row in rows if row["variant"] == name], parts)
            | {"parameters": networks[name]["parameters"]}
            for name in study.variants
            if any(row["variant"] == name for row in rows)
        }
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        # Zipped with nothing, and so empty, where the test part is sealed or the training diverged.
        actual = labels if labels is not None else shown
        # A class may be called =1+1, which a spreadsheet would work out.
        names = [f"'{name}" if name.startswith(FORMULA) else name for name in names]
        pairs = [[names[a], names[p]] for a, p in zip(actual.tolist(), shown.tolist(), strict=False)]
        _write_csv(out / "confusion.csv", ["actual", "predicted"], pairs)


def scored_parts(study: Params) -> tuple[str, ...]:
    """The parts of the data that may be scored: not the test part while it is sealed."""
    return PARTS if study.study.test == "scored" else PARTS[:1]


def _predictions(path: Path, classes: int) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS}
    except FileNotFoundError:
        raise files.missing(path) from None
    except (KeyError, ValueError, EOFError, OSError) as error:
        raise LabError(f"{path}: Expected the arrays {', '.join(ARRAYS)}. Found: {error}. Run `dvc repro`.") from None
    for part in PARTS:
        expected = (len(arrays[f"{part}_labels"]), classes)
        if arrays[f"{part}_probabilities"].shape != expected:
            raise LabError(
                f"{path}: Expected {part}_probabilities of shape {expected} (pictures, classes). "
                f"Found: {arrays[f'{part}_probabilities'].shape}. Run `dvc repro`."
            )
    return arrays


def _digest(predictions: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for part in PARTS:
        found.update(np.ascontiguousarray(predictions[f"{part}_probabilities"]).tobytes())
    return found.hexdigest()


def _add_weights(scored: list[dict[str, Any]], root: Path) -> None:
    """Make fingerprints of predictions those of weights, too, where cells of a seed predict the same: files of weights
    may be large, and cells that predict differently differ."""
    equal = Counter((one["seed"], one["fingerprint"]) for one in scored)
    for one in scored:
        if one["fingerprint"] and equal[one["seed"], one["fingerprint"]] > 1:
            path = cell.folder(one["variant"], one["seed"], root) / cell.WEIGHTS
            try:
                one["fingerprint"] = hashlib.sha256((one["fingerprint"] + files.sha256(path)).encode()).hexdigest()
            except FileNotFoundError:
                raise files.missing(path) from None


def unaffected(cells: Mapping[tuple[str, int], dict[str, Any]], variant: str, reference: str) -> list[int]:
    """The seeds with which two variants have equal weights and predictions, byte for byte.

    Args:
        cells: of cells.json by (variant, seed).
    """
    return [
        seed
        for (name, seed), one in cells.items()
        if name == variant
        and one.get("fingerprint")
        and one["fingerprint"] == cells.get((reference, seed), {}).get("fingerprint")
    ]


def _history(path: Path, variant: str, seed: int) -> list[list]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise files.missing(path) from None
    # The numbers stay the texts that they are, except that an empty field says 'not a number' to DVC's plots too.
    return [
        [variant, seed, row["epoch"], *("" if row[key].lower() == "nan" else row[key] for key in CURVES)]
        for row in csv.DictReader(text.splitlines())
    ]


def _row(scored: dict[str, Any], binary: bool) -> dict[str, Any]:
    row = {key: scored[key] for key in ("variant", "seed", "status", "epochs", "best_epoch", "train_accuracy")}
    keys = ("accuracy", "loss", "macro_f1", *(BINARY if binary else ()))
    for part in PARTS:
        scores = scored[part] or {}
        row |= {f"{part}_{key}": scores.get(key) for key in keys}
    return row


def _means(rows: list[dict[str, Any]], parts: tuple[str, ...]) -> dict[str, float | None]:
    """Means over seeds; null when a cell diverged, for the mean of the others would flatter the variant."""
    keys = {"validation_accuracy": "validation_accuracy"}
    if "test" in parts:
        keys |= {"test_accuracy": "test_accuracy", "test_loss": "test_loss", "macro_f1": "test_macro_f1"}
        keys |= {key: f"test_{key}" for key in BINARY if f"test_{key}" in rows[0]}
    diverged = any(row["status"] == "diverged" for row in rows)
    means: dict[str, float | None] = {
        name: None if diverged or None in (values := [row[column] for row in rows]) else float(np.mean(values))
        for name, column in keys.items()
    }
    if "test" in parts:
        accuracies = [row["test_accuracy"] for row in rows]
        known = len(rows) > 1 and not diverged
        means["test_accuracy_std"] = float(np.std(accuracies, ddof=1)) if known else None
    return means


def _write_csv(path: Path, columns: list[str], rows: list[list]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
