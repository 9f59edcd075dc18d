"""Cells → differences with uncertainty.

A test picture that a variant's network gets right and the reference's of the same seed does not counts 1, the other
way round −1, else 0; the mean of all these numbers is the difference of accuracies. Seeds and test pictures are both
samples, crossed with each other: other seeds would give other networks, and another test part other pictures. The
variance of the mean comes from the two-way analysis of variance with random effects (Searle, Casella & McCulloch,
Variance Components, 1992, chapter 4), its degrees of freedom from Satterthwaite (1946), the p values are adjusted for
the number of comparisons after Holm (1979).

Three seeds that happen to agree would make a difference look sure. So a comparison whose seeds agree better than those
of the study's variants do on the whole borrows from them, as if `BORROWED` more seeds had been as far apart as theirs;
one whose seeds agree less is judged by its own (after Smyth's moderated t, 2004, which moves both ways).
benchmarks/coverage.py shows how often the intervals hold.
"""

from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from statsmodels.stats.multitest import multipletests

ALPHA = 0.05
POWER = 0.8  # the chance with which a number of seeds is to tell a difference apart
MOST_SEEDS = 1000
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


def borrow(found: Analysis, variants: np.ndarray) -> Analysis:
    """Judge the seeds of a comparison by those of the whole study, where its own agree better.

    Args:
        variants: accuracies (variants, seeds) of all variants that are compared, no training twice.
    """
    count, seeds = variants.shape
    borrowed = min(BORROWED, (count - 2) * (seeds - 1))
    if borrowed <= 0:
        return found
    left = variants - variants.mean(axis=0) - variants.mean(axis=1, keepdims=True) + variants.mean()
    # What is left of both is the seeds' chance in each variant; a difference has it twice.
    pooled = 2 * found.pictures * np.square(left).sum() / ((count - 1) * (seeds - 1))
    if found.between_seeds >= pooled:
        return found
    freedom = seeds - 1 + borrowed
    moderated = ((seeds - 1) * found.between_seeds + borrowed * pooled) / freedom
    return found._replace(between_seeds=float(moderated), freedom=freedom)


def variance(found: Analysis) -> tuple[float, float]:
    """The variance of the mean, and its degrees of freedom.

    The variance is never less than with the seeds or the pictures as the only chance: a small sample's estimate of the
    other part may come out negative. There are at least as many degrees of freedom as a t test over seeds has.
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
        None when 1,000 seeds aren't enough: the test part has too few pictures for so small a difference.
    """
    of_seeds = max(found.between_seeds - found.rest, 0) / found.pictures
    of_pictures = max(found.between_pictures - found.rest, 0) / found.seeds

    def enough(n: int) -> bool:
        expected = found._replace(
            seeds=n,
            between_seeds=found.pictures * of_seeds + found.rest,
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
    """Half the 95 % interval of a difference that the choice of test pictures alone leaves, with these seeds.

    One seed is enough for it. None when a cell of either diverged.
    """
    if not (_whole(variant) and _whole(reference)):
        return None
    table = _table(variant, reference)
    if table.shape[1] < 2:
        return None
    return float(stats.t.ppf(1 - ALPHA / 2, table.shape[1] - 1) * stats.sem(table.mean(axis=0)))


def summarize(correct: Correct) -> dict[str, Any]:
    """Accuracy of one variant: mean, sample standard deviation (n - 1) of its seeds, and 95 % interval of the mean, cut
    off at 0 and 1.

    None among them (a diverged cell) makes everything None: the mean of the survivors would flatter the variant. One
    seed has neither spread nor interval.
    """
    if not _whole(correct):
        return {"mean": None, "std": None, "ci95": None}
    table = np.array([np.asarray(flags) for flags in correct.values()]).astype(np.int8)
    accuracies = table.mean(axis=1)
    if min(table.shape) < 2:
        return {"mean": float(accuracies.mean()), "std": None, "ci95": None}
    std = float(accuracies.std(ddof=1)) if np.ptp(accuracies) else 0.0
    found = _tested(analyse(table))
    return {"mean": found["mean"], "std": std, "ci95": np.clip(found["ci95"], 0, 1).tolist()}


def compare(correct: Mapping[str, Correct], references: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Differences of test accuracy, variant minus reference, paired by seed and picture.

    Args:
        correct: of each variant and seed, which test pictures were classified correctly.
        references: which variant each one is compared with; all of these comparisons are adjusted together.

    Returns:
        mean, ci95, p_adjusted, verdict and seeds_needed of each variant in `references`. The verdict is

        - `better` or `worse` when p_adjusted < 0.05, else `indistinguishable`, then with the number of seeds that would
          tell a difference like this one apart (`seeds_needed`; None: no number would, or there is no difference);
        - `undetermined` when there is nothing to test with: one seed, or a reference that diverged;
        - `diverged`, without numbers, when a cell of the variant diverged.
    """
    found: dict[str, dict[str, Any]] = {}
    # Variants that are one training are one comparison, and one that is its reference's training is none: a variant
    # written twice must not make the others' p larger.
    asked: dict[tuple, list[str]] = {}
    tables: dict[str, Analysis] = {}
    distinct = {_identity(correct[name]): correct[name] for pair in references.items() for name in pair}
    pool = np.array(
        [[flags.mean() for flags in one.values() if flags is not None] for one in distinct.values() if _whole(one)]
    )
    for name, reference in references.items():
        found[name] = {"mean": None, "ci95": None, "p_adjusted": None, "verdict": "undetermined", "seeds_needed": None}
        variant, other = correct[name], correct[reference]
        if not _whole(variant):
            found[name]["verdict"] = "diverged"
        elif _whole(other):
            table = _table(variant, other)
            found[name]["mean"] = int(table.sum(dtype=np.int64)) / table.size
            if min(table.shape) < 2:
                continue
            tables[name] = borrow(analyse(table), pool) if table.any() else analyse(table)
            found[name] |= _tested(tables[name])
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
                    one["seeds_needed"] = seeds_needed(tables[name], len(asked))
    return found


def _whole(cells: Correct) -> bool:
    """Whether no cell diverged."""
    return not any(flags is None for flags in cells.values())


def _table(variant: Correct, reference: Correct) -> np.ndarray:
    """Seeds × test pictures: 1 where only the variant is right, −1 where only the reference is."""
    return np.array([np.asarray(flags).astype(np.int8) - np.asarray(reference[s]) for s, flags in variant.items()])


def _identity(cells: Correct) -> tuple:
    """Equal for cells that were right about the very same pictures in every seed."""
    return tuple((seed, None if flags is None else np.packbits(flags).tobytes()) for seed, flags in cells.items())


def _tested(found: Analysis) -> dict[str, Any]:
    """Mean, its 95 % interval, and p of the mean being zero, not adjusted."""
    spread, freedom = variance(found)
    error = float(np.sqrt(spread))
    half = float(stats.t.ppf(1 - ALPHA / 2, freedom)) * error
    p = 1.0 if not found.mean else float(2 * stats.t.sf(abs(found.mean) / error, freedom)) if error else 0.0
    return {"mean": found.mean, "ci95": [found.mean - half, found.mean + half], "p_adjusted": p}
