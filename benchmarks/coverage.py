"""Do the report's 95 % intervals hold, and how often does it claim a difference where there is none?

    python benchmarks/coverage.py        # 30 kinds of studies, 2,000 of each: a few minutes of two cores
    python benchmarks/coverage.py 200    # fewer of each

Each study is drawn with a known truth and goes through `statistics.compare`, as the report does: mostly eight variants,
of which seven are equal and one is, or is not, one point better than the baseline; also studies of two variants, and
such where the last variant, or the baseline, is three times as unsteady over seeds as the others. A network gets a
picture right when the picture's difficulty for all networks, that for all networks of its variant, and what is left to
chance together stay below a level, which is the variant's true accuracy, moved by the seed's luck.

Printed for each kind: how often the interval of the one variant's difference covers the truth; how often a study claims
any difference between equal variants after Holm's correction (as verdicts of better or worse); how often the true
difference is found; the median width of half an interval, in points; how often the interval of the baseline's own
accuracy covers the truth.
"""

import gc
import itertools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from ablation_lab import statistics  # noqa: E402
from benchmarks import common  # noqa: E402

ACCURACY = 0.9
COMMON, OWN = 0.5, 0.2  # shares of a picture's difficulty: for all networks, for a variant's


class Kind(NamedTuple):
    seeds: int
    pictures: int
    spread: float  # standard deviation of a variant's true accuracy over seeds
    difference: float  # of the last variant
    variants: int = 8
    unsteady: int | None = None  # the variant whose seeds are three times as far apart


class Found(NamedTuple):
    covered: float
    claimed: float
    detected: float
    half_width: float
    own: float


KINDS = [
    *(Kind(*one) for one in itertools.product((3, 5, 10), (500, 10_000), (0.002, 0.02), (0.0, 0.01))),
    *(Kind(seeds, 500, 0.02, 0.0, variants=2) for seeds in (2, 3, 5)),
    *(Kind(3, 2000, 0.01, 0.0, unsteady=one) for one in (0, -1)),
    Kind(3, 2000, 0.01, 0.0, unsteady=4),  # neither of the two that the interval is of
]


def draw(kind: Kind, random: np.random.Generator) -> dict[str, dict[int, np.ndarray]]:
    """Which pictures the networks of one study get right, by variant and seed."""
    luck = kind.spread * random.standard_normal((kind.variants, kind.seeds, 1))
    if kind.unsteady is not None:
        luck[kind.unsteady] *= 3
    accuracy = ACCURACY + luck
    accuracy[-1] += kind.difference
    level = stats.norm.ppf(np.clip(accuracy, 0.001, 0.999)).astype(np.float32)

    def part(share: float, *shape: int) -> np.ndarray:
        return np.float32(np.sqrt(share)) * random.standard_normal((*shape, kind.pictures), dtype=np.float32)

    difficulty = part(COMMON, 1, 1) + part(OWN, kind.variants, 1) + part(1 - COMMON - OWN, kind.variants, kind.seeds)
    return {f"variant{i}": dict(enumerate(flags)) for i, flags in enumerate(difficulty < level)}


def simulate(kind: Kind, studies: int, seed: int = 0) -> Found:
    """Draw studies of one kind and compare their variants with the first one, the baseline."""
    unsteady = 0 if kind.unsteady is None else 1 + kind.unsteady % kind.variants
    numbers = (kind.seeds, kind.pictures, 1e4 * kind.spread, 1e4 * kind.difference, kind.variants, unsteady)
    random = np.random.default_rng([seed, *map(round, numbers)])
    gc.freeze()  # statsmodels collects garbage in each call: a hundredth of the time is left
    last = f"variant{kind.variants - 1}"
    covered, claimed, detected, own, widths = 0, 0, 0, 0, []
    for _ in range(studies):
        correct = draw(kind, random)
        found = statistics.compare(correct, {name: "variant0" for name in correct if name != "variant0"})
        low, high = found[last]["ci95"]
        covered += low <= kind.difference <= high
        widths.append((high - low) / 2)
        low, high = statistics.summarize(correct["variant0"])["ci95"]
        own += low <= ACCURACY <= high
        claims = {name for name, one in found.items() if one["verdict"] in ("better", "worse")}
        claimed += bool(claims - {last} if kind.difference else claims)
        detected += kind.difference > 0 and found[last]["verdict"] == "better"
    gc.unfreeze()
    return Found(
        covered / studies, claimed / studies, detected / studies, 100 * float(np.median(widths)), own / studies
    )


def measure(studies: int) -> list[common.Figure]:
    """All kinds of studies, so many of each; prints a line a kind."""
    told: dict[bool, list[Found]] = {True: [], False: []}
    print("seeds  pictures  spread  difference  covered  claimed  found  ±points    own  variants")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for kind, found in zip(KINDS, pool.map(simulate, KINDS, [studies] * len(KINDS)), strict=True):
            told[kind.unsteady is None].append(found)
            line = f"{kind.seeds:5}  {kind.pictures:8,}  {100 * kind.spread:6.1f}  {100 * kind.difference:10.1f}"
            line += f"  {found.covered:7.1%}  {found.claimed:7.1%}  {found.detected:5.1%}  {found.half_width:7.2f}"
            names = {None: "", 0: ", the baseline unsteady", -1: ", the last one unsteady"}
            line += f"  {found.own:5.1%}  {kind.variants}{names.get(kind.unsteady, ', another one unsteady')}"
            print(line, flush=True)
    figures = []
    for steady, kinds in told.items():
        these = f"{len(kinds)} kinds {'of steady variants' if steady else 'where a variant is unsteady'}"
        for what, values in (
            ("intervals of the difference that cover it", [one.covered for one in kinds]),
            ("intervals of the baseline's accuracy that cover it", [one.own for one in kinds]),
            ("studies that claim a difference of equal variants", [one.claimed for one in kinds]),
        ):
            figures.append(common.median(f"{these}: {what}", [100 * value for value in values], "%"))
    return figures


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("studies", type=int, nargs="?", help="of each kind, 2000 by default")
    asked = parser.parse_args()
    common.finish(measure(asked.studies or (20 if asked.small else 2000)), asked)


if __name__ == "__main__":
    main()
