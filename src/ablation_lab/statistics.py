"""Cells → differences with uncertainty.

Seeds pair the cells: what a variant's seed and the reference's same seed share (the split, the order of the pictures,
part of the initial weights) cancels out. The method is Student's paired t over seeds (Student, 1908), adjusted for the
number of comparisons after Holm (1979). It measures the chance of training only: the test pictures count as given.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

ALPHA = 0.05
# Of each seed, which test pictures were classified correctly (bool); None when that cell diverged.
Correct = Mapping[int, np.ndarray | None]


def summarize(accuracies: Sequence[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation (n - 1) and 95 % t interval, cut off at 0 and 1, of one variant's seeds.

    None among them (a diverged cell) makes everything None: the mean of the survivors would flatter the variant. One
    seed has no spread; a spread of exactly zero gives no interval, since it says nothing about the next seed.
    """
    if None in accuracies:
        return {"mean": None, "std": None, "ci95": None}
    values = np.array(accuracies, dtype=float)
    if len(values) < 2:
        return {"mean": float(values.mean()), "std": None, "ci95": None}
    std = float(values.std(ddof=1)) if np.ptp(values) else 0.0
    interval = _interval(values.mean(), std, len(values))
    return {"mean": float(values.mean()), "std": std, "ci95": interval and list(np.clip(interval, 0, 1).tolist())}


def compare(correct: Mapping[str, Correct], references: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Differences of test accuracy, variant minus reference, paired by seed.

    Args:
        correct: of each variant and seed, which test pictures were classified correctly.
        references: which variant each one is compared with; all of these comparisons are adjusted together.

    Returns:
        mean, ci95, p_adjusted and verdict of each variant in `references`. The verdict is

        - `better` or `worse` when p_adjusted < 0.05, else `indistinguishable`;
        - `undetermined` when there is nothing to test with: one seed, a reference that diverged, or the same nonzero
          difference in all seeds (t is infinite then, and a few seeds do agree by chance in their count of errors).
          Equal accuracies in all seeds are `indistinguishable` with p = 1, with an interval only if the very same
          pictures were right;
        - `diverged`, without numbers, when a cell of the variant diverged.
    """
    found = {name: _difference(correct[name], correct[reference]) for name, reference in references.items()}
    # Variants that are one training are one comparison, and one that is its reference's training is none: a variant
    # written twice must not make the others' p larger.
    asked: dict[tuple, list[str]] = {}
    for name, reference in references.items():
        if found[name]["p_adjusted"] is None:
            continue
        if _identity(correct[name]) == _identity(correct[reference]):
            found[name]["verdict"] = "indistinguishable"
        else:
            asked.setdefault((_identity(correct[name]), _identity(correct[reference])), []).append(name)
    if asked:
        raw = [found[names[0]]["p_adjusted"] for names in asked.values()]
        adjusted = multipletests(raw, alpha=ALPHA, method="holm")[1]
        for names, p in zip(asked.values(), adjusted.tolist(), strict=True):
            for one in (found[name] for name in names):
                one["p_adjusted"] = p
                one["verdict"] = "indistinguishable" if p >= ALPHA else "better" if one["mean"] > 0 else "worse"
    return found


def _identity(cells: Correct) -> tuple:
    """Equal for cells that were right about the very same pictures in every seed."""
    return tuple((seed, None if flags is None else np.packbits(flags).tobytes()) for seed, flags in cells.items())


def _difference(variant: Correct, reference: Correct) -> dict[str, Any]:
    """One comparison with its p unadjusted and, if there is a p, without a verdict."""
    result: dict[str, Any] = {"mean": None, "ci95": None, "p_adjusted": None, "verdict": "undetermined"}
    if any(one is None for one in variant.values()):
        return result | {"verdict": "diverged"}
    if any(one is None for one in reference.values()):
        return result
    pairs = [(np.asarray(variant[seed]), np.asarray(reference[seed])) for seed in variant]
    pictures = len(pairs[0][0])
    # Counted in pictures, so that equal differences are equal and not off by a rounding error.
    counts = np.array([int(left.sum()) - int(right.sum()) for left, right in pairs])
    result["mean"] = float(counts.mean() / pictures)
    if len(counts) < 2:
        return result
    if not counts.any():
        same = all(np.array_equal(left, right) for left, right in pairs)
        return result | {"ci95": [0.0, 0.0] if same else None, "p_adjusted": 1.0}
    if np.ptp(counts):
        result["ci95"] = _interval(result["mean"], counts.std(ddof=1) / pictures, len(counts))
        result["p_adjusted"] = float(stats.ttest_1samp(counts, 0).pvalue)
    return result


def _interval(mean: float, std: float, n: int) -> list[float] | None:
    if not std:
        return None
    low, high = stats.t.interval(1 - ALPHA, n - 1, loc=mean, scale=std / np.sqrt(n))
    return [float(low), float(high)]
