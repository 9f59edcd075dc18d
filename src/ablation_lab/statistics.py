"""Cells → differences with uncertainty.

A test picture that a variant's network gets right and the reference's of the same seed does not counts 1, the other
way round −1, else 0; the mean of all these numbers is the difference of accuracies. Seeds and test pictures are both
samples, crossed with each other: other seeds would give other networks, and another test part other pictures. The
variance of the mean comes from the two-way analysis of variance with random effects (Searle, Casella & McCulloch,
Variance Components, 1992, chapter 4), its degrees of freedom from Satterthwaite (1946), the p values are adjusted for
the number of comparisons after Holm (1979).

Three seeds that happen to agree would make a difference look sure. So a comparison whose seeds agree better than those
of the study's variants usually do borrows from them, as if `BORROWED` more degrees of freedom had shown the usual
spread (after Smyth's moderated t, 2004); the less its own seeds agree, the less it borrows, and they alone then say how
wide the interval is. "Usual" is a median, so that one unsteady variant doesn't widen the others' intervals. Where there
is nobody to borrow from, no interval is narrower than that of the paired t test over seeds.
"""

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

ALPHA = 0.05
POWER = 0.8  # the chance with which a number of seeds is to tell a difference apart
THREE = 3  # pictures to either side that no interval is narrower than
MOST_SEEDS = 10**6  # more are as good as none
BORROWED = 4  # degrees of freedom that a comparison may borrow from the other variants
# Of each seed, which test pictures were classified correctly (bool); None when that cell diverged.
Correct = Mapping[int, np.ndarray | None]


class Analysis(NamedTuple):
    """A table of seeds × pictures: its mean, and the mean squares of its analysis of variance.

    `freedom` are the degrees of freedom of `between_seeds`: the seeds less one, and those that are borrowed.
    """

    mean: float
    seeds: int
    pictures: int
    between_seeds: float
    between_pictures: float
    rest: float
    freedom: float


def analyse(values: np.ndarray) -> Analysis:
    """Analyse a table of integers (seeds, pictures), two of each at least."""
    seeds, pictures = values.shape
    by_seed = values.sum(axis=1, dtype=np.int64) / pictures
    by_picture = values.sum(axis=0, dtype=np.int64) / seeds
    mean = int(values.sum(dtype=np.int64)) / values.size
    between_seeds, between_pictures = pictures * by_seed.var(ddof=1), seeds * by_picture.var(ddof=1)
    total = float(np.square(values, dtype=np.int64).sum()) - values.size * mean**2
    rest = total - (seeds - 1) * between_seeds - (pictures - 1) * between_pictures
    rest = max(float(rest), 0.0) / ((seeds - 1) * (pictures - 1))
    return Analysis(mean, seeds, pictures, float(between_seeds), float(between_pictures), rest, seeds - 1)


def usual_spread(variants: np.ndarray) -> float | None:
    """The variance of a difference of accuracies over seeds, as it usually is in a study.

    Args:
        variants: accuracies (variants, seeds) of all variants, no training twice.

    Returns:
        The median over variants, twice, since a difference has the chance of both; None with fewer than three variants
        or two seeds.
    """
    if variants.ndim < 2 or variants.shape[0] < 3 or variants.shape[1] < 2:
        return None
    count, seeds = variants.shape
    # What all variants have of a seed says nothing about their differences; to take it away costs a little spread.
    left = variants - np.median(variants - variants.mean(axis=1, keepdims=True), axis=0)
    spreads = left.var(axis=1, ddof=1) * count / (count - 1)
    return float(2 * np.median(spreads) / (stats.chi2.median(seeds - 1) / (seeds - 1)))


def moderate(found: Analysis, usual: float | None) -> Analysis:
    """Judge the seeds of a comparison by the usual spread too, where their own is smaller."""
    if usual is None:
        return found
    own, pooled = found.between_seeds, found.pictures * usual
    borrowed = BORROWED * min(1.0, pooled / own) ** 2 if own else float(BORROWED)
    freedom = found.freedom + borrowed
    return found._replace(between_seeds=max(own, (found.freedom * own + borrowed * pooled) / freedom), freedom=freedom)


def variance(found: Analysis) -> tuple[float, float]:
    """The variance of the mean, and its degrees of freedom.

    The variance is never less than with the seeds or the pictures as the only chance: a small sample's estimate of the
    other part may come out negative. There are at least as many degrees of freedom as the seeds have, borrowed ones
    counted.
    """
    squares = (found.between_seeds, found.between_pictures, found.rest)
    total = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])
    freedom = (found.freedom, found.pictures - 1, (found.seeds - 1) * (found.pictures - 1))
    weight = sum(square**2 / n for square, n in zip(squares, freedom, strict=True))
    satterthwaite = total**2 / weight if weight else np.inf
    return total / (found.seeds * found.pictures), max(satterthwaite, found.freedom)


def seeds_needed(found: Analysis, comparisons: int) -> int | None:
    """With how many seeds a difference as large as the one found would be told from none, with a chance of `POWER`.

    Args:
        comparisons: their number in the study; the level is divided by it.

    Returns:
        None when no number is enough, as the choice of test pictures alone hides such a difference.
    """
    if abs(found.mean) < THREE / found.pictures:
        return None
    of_pictures = max(found.between_pictures - found.rest, 0) / found.seeds

    def enough(n: int) -> bool:
        expected = found._replace(
            seeds=n,
            between_seeds=max(found.between_seeds, found.rest),
            between_pictures=n * of_pictures + found.rest,
            freedom=n - 1 + found.freedom - (found.seeds - 1),
        )
        spread, freedom = variance(expected)
        wanted = stats.t.ppf(1 - ALPHA / 2 / comparisons, freedom) + stats.t.ppf(POWER, freedom)
        return bool(abs(found.mean) >= wanted * np.sqrt(spread))

    if not enough(MOST_SEEDS):
        return None
    return bisect_left(range(MOST_SEEDS), True, lo=2, key=enough)


def resolution(variant: Correct, reference: Correct) -> float | None:
    """Half the 95 % interval that the choice of test pictures leaves to a difference, however many seeds there are.

    Of one seed it has the training's chance in it, which two seeds tell apart. None when a cell of either diverged.
    """
    if not (_whole(variant) and _whole(reference)):
        return None
    table = _table(variant, reference)
    if min(table.shape) < 1 or table.shape[1] < 2:
        return None
    if len(table) < 2:
        of_pictures = float(table[0].var(ddof=1))
    else:
        found = analyse(table)
        of_pictures = max(found.between_pictures - found.rest, 0) / found.seeds
    return float(stats.t.ppf(1 - ALPHA / 2, table.shape[1] - 1) * np.sqrt(of_pictures / table.shape[1]))


def summarize(correct: Correct) -> dict[str, Any]:
    """Accuracy of one variant: mean, sample standard deviation (n - 1) of its seeds, and 95 % interval of the mean, cut
    off at 0 and 1.

    None among them (a diverged cell) makes everything None: the mean of the survivors would flatter the variant; so
    does a variant without cells. One seed has neither spread nor interval.
    """
    if not correct or not _whole(correct):
        return {"mean": None, "std": None, "ci95": None}
    table = np.array([np.asarray(flags) for flags in correct.values()]).astype(np.int8)
    accuracies = table.mean(axis=1)
    if min(table.shape) < 2:
        return {"mean": float(accuracies.mean()), "std": None, "ci95": None}
    std = float(accuracies.std(ddof=1)) if np.ptp(accuracies) else 0.0
    found = analyse(table)
    return {"mean": found.mean, "std": std, "ci95": np.clip(tested(found, moderated=False)[0], 0, 1).tolist()}


def compare(correct: Mapping[str, Correct], references: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Differences of test accuracy, variant minus reference, paired by seed and picture.

    Args:
        correct: of each variant and seed, which test pictures were classified correctly.
        references: which variant each one is compared with; all of these comparisons are adjusted together.

    Returns:
        mean, ci95, p_adjusted, verdict and seeds_needed of each variant in `references`. The verdict is

        - `better` or `worse` when p_adjusted < 0.05, else `indistinguishable`, then with the number of seeds that would
          tell a difference like this one apart (`seeds_needed`; None: no number would, or there is no difference);
        - `undetermined` when there is nothing to test with: one seed, one test picture, or a reference that diverged or
          has no seed in common with the variant;
        - `diverged`, without numbers, when a cell of the variant diverged.
    """
    found: dict[str, dict[str, Any]] = {}
    # Variants that are one training are one comparison, and one that is its reference's training is none: a variant
    # written twice must not make the others' p larger.
    asked: dict[tuple, list[str]] = {}
    analyses: dict[str, Analysis] = {}
    distinct = {_identity(cells): cells for cells in correct.values() if _whole(cells)}
    # A partial report has variants with fewer seeds than others: only those with the most are alike enough.
    most = max((tuple(cells) for cells in distinct.values()), key=len, default=())
    alike = [cells for cells in distinct.values() if tuple(cells) == most]
    usual = usual_spread(np.array([[float(np.mean(np.asarray(flags))) for flags in cells.values()] for cells in alike]))
    for name, reference in references.items():
        found[name] = {"mean": None, "ci95": None, "p_adjusted": None, "verdict": "undetermined", "seeds_needed": None}
        variant, other = correct[name], correct[reference]
        if not _whole(variant):
            found[name]["verdict"] = "diverged"
        elif _whole(other) and variant.keys() & other.keys():
            table = _table(variant, other)
            found[name]["mean"] = int(table.sum(dtype=np.int64)) / table.size
            if min(table.shape) < 2:
                continue
            analyses[name] = moderate(analyse(table), usual) if table.any() else analyse(table)
            interval, p = tested(analyses[name], usual is not None)
            found[name] |= {"ci95": np.clip(interval, -1, 1).tolist(), "p_adjusted": p}
            if table.any():
                asked.setdefault((_identity(variant), _identity(other)), []).append(name)
            else:
                found[name]["verdict"] = "indistinguishable"
    if asked:
        raw = [found[names[0]]["p_adjusted"] for names in asked.values()]
        adjusted = multipletests(raw, alpha=ALPHA, method="holm")[1]
        for names, p in zip(asked.values(), adjusted.tolist(), strict=True):
            for name in names:
                one = found[name]
                one["p_adjusted"] = p
                one["verdict"] = "indistinguishable" if p >= ALPHA else "better" if one["mean"] > 0 else "worse"
                if p >= ALPHA and one["mean"]:
                    one["seeds_needed"] = seeds_needed(analyses[name], len(asked))
    return found


def _whole(cells: Correct) -> bool:
    """Whether no cell diverged."""
    return not any(flags is None for flags in cells.values())


def _table(variant: Correct, reference: Correct) -> np.ndarray:
    """Seeds × test pictures: 1 where only the variant is right, −1 where only the reference is. Of the seeds that both
    have; no rows where they have none in common."""
    shared = [(flags, reference[seed]) for seed, flags in variant.items() if seed in reference]
    rows = [np.asarray(flags).astype(np.int8) - np.asarray(other) for flags, other in shared]
    return np.array(rows) if rows else np.empty((0, 0), np.int8)


def _identity(cells: Correct) -> tuple:
    """Equal for cells that were right about the very same pictures in every seed."""
    return tuple((seed, None if flags is None else np.packbits(flags).tobytes()) for seed, flags in cells.items())


def tested(found: Analysis, moderated: bool = True) -> tuple[list[float], float]:
    """The 95 % interval of the mean, and p of its being zero.

    No interval is narrower than three pictures to either side: where none has shown a difference, up to three in so
    many may still do so (the rule of three; Hanley & Lippman-Hand, 1983).

    Args:
        moderated: whether the seeds are judged by others too; if not, the interval is at least that of a t test over
            seeds.
    """
    spread, freedom = variance(found)
    choices = [(float(np.sqrt(spread)), freedom)]
    if not moderated:
        choices.append((float(np.sqrt(found.between_seeds / (found.seeds * found.pictures))), found.freedom))
    half, p = 0.0, 0.0
    for error, freedom in choices:
        wide = float(stats.t.ppf(1 - ALPHA / 2, freedom))
        error = max(error, THREE / found.pictures / wide)
        half, p = max(half, wide * error), max(p, float(2 * stats.t.sf(abs(found.mean) / error, freedom)))
    return [found.mean - half, found.mean + half], p
