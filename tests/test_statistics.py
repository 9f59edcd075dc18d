import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests

from ablation_lab import statistics
from benchmarks import coverage

PICTURES = 1000
# Correct pictures of 1000, seeds 0 to 4.
BASELINE = [701, 698, 710, 705, 699]
WORSE = [620, 625, 631, 610, 632]
SIMILAR = [700, 703, 706, 701, 704]
BETTER = [771, 769, 785, 770, 771]


def correct(counts):
    """Boolean vectors with so many hits, at places that differ between seeds."""
    vectors = {}
    for seed, hits in enumerate(counts):
        vectors[seed] = None if hits is None else np.random.default_rng(seed).permutation(np.arange(PICTURES) < hits)
    return vectors


def against_baseline(baseline=BASELINE, **variants):
    cells = {name: correct(counts) for name, counts in {"baseline": baseline, **variants}.items()}
    return statistics.compare(cells, dict.fromkeys(variants, "baseline"))


def by_statsmodels(table, accuracies=None):
    """Mean, interval and p from the mean squares that statsmodels' analysis of variance has.

    Args:
        accuracies: of all variants (variants, seeds), from which a comparison borrows.
    """
    seeds, pictures = table.shape
    flat = {
        "y": table.ravel(),
        "seed": np.repeat(np.arange(seeds), pictures),
        "picture": np.tile(np.arange(pictures), seeds),
    }
    squares = anova_lm(ols("y ~ C(seed) + C(picture)", pd.DataFrame(flat)).fit())
    a, b, rest = squares["mean_sq"]
    of_a, of_b, of_rest = squares["df"]
    if accuracies is not None:
        variants = accuracies.shape[0]
        flat = {"y": accuracies.ravel(), "variant": np.repeat(np.arange(variants), seeds)}
        flat |= {"seed": np.tile(np.arange(seeds), variants)}
        left = anova_lm(ols("y ~ C(variant) + C(seed)", pd.DataFrame(flat)).fit())["mean_sq"]["Residual"]
        if a < 2 * pictures * left:
            a, of_a = (of_a * a + 4 * 2 * pictures * left) / (of_a + 4), of_a + 4
    total = max(a + b - rest, a, b)
    freedom = max(total**2 / (a**2 / of_a + b**2 / of_b + rest**2 / of_rest), of_a)
    error = np.sqrt(total / table.size)
    interval = stats.t.interval(0.95, freedom, loc=table.mean(), scale=error)
    return table.mean(), interval, 2 * stats.t.sf(abs(table.mean()) / error, freedom)


@pytest.fixture
def drawn():
    """Three variants, four seeds, 60 pictures, some of which are harder than others."""
    random = np.random.default_rng(3)
    hard = random.random(60)
    skills = {"base": 0.7, "worse": 0.3, "similar": 0.69, "better": 1.1}
    return {name: {s: random.random(60) < skill - 0.3 * hard for s in range(4)} for name, skill in skills.items()}


def test_differences_agree_with_statsmodels_and_scipy(drawn):
    others = [name for name in drawn if name != "base"]
    found = statistics.compare(drawn, dict.fromkeys(others, "base"))
    accuracies = np.array([[flags.mean() for flags in cells.values()] for cells in drawn.values()])
    raw = []
    for name in others:
        table = np.array([drawn[name][s].astype(int) - drawn["base"][s] for s in range(4)])
        mean, interval, p = by_statsmodels(table, accuracies)
        assert found[name]["mean"] == pytest.approx(mean)
        assert found[name]["ci95"] == pytest.approx(list(interval))
        raw.append(p)
    adjusted = multipletests(raw, method="holm")[1]
    assert [found[name]["p_adjusted"] for name in others] == pytest.approx(adjusted.tolist())
    assert [found[name]["verdict"] for name in others] == ["worse", "indistinguishable", "better"]


def test_summary_agrees_with_statsmodels_and_scipy(drawn):
    table = np.array([*drawn["worse"].values()]).astype(int)
    mean, interval, _ = by_statsmodels(table)
    summary = statistics.summarize(drawn["worse"])
    assert summary["mean"] == pytest.approx(mean) and summary["ci95"] == pytest.approx(list(interval))
    assert summary["std"] == pytest.approx(table.mean(axis=1).std(ddof=1))


def test_where_only_seeds_differ_it_is_the_paired_t_test():
    counts = np.array([30, 90, 50, 80])
    of_seeds = 20_000 * (counts / 20_000).var(ddof=1)
    squares = statistics.Analysis(counts.mean() / 20_000, 4, 20_000, of_seeds, 1e-9, 1e-9, 3)
    variance, freedom = statistics.variance(squares)
    assert np.sqrt(variance) == pytest.approx(stats.sem(counts / 20_000)) and freedom == pytest.approx(3)


def test_seeds_that_agree_by_chance_borrow_from_the_other_variants(drawn):
    """One that agrees less does not."""
    accuracies = np.array([[0.9, 0.8, 0.85, 0.7], [0.8, 0.9, 0.7, 0.75], [0.82, 0.81, 0.8, 0.83]])
    calm = statistics.Analysis(0.1, 4, 1000, 0.001, 0.2, 0.2, 3)
    moved = statistics.borrow(calm, accuracies)
    assert moved.between_seeds > 1 and moved.freedom == 3 + 3  # what three variants have left
    wild = calm._replace(between_seeds=100.0)
    assert statistics.borrow(wild, accuracies) == wild
    assert statistics.borrow(calm, accuracies[:2]) == calm


def test_intervals_count_the_pictures_too():
    """All seeds agree to the picture: the seeds' spread is nothing, that of the pictures isn't."""
    base = np.arange(200) < 150
    variant = base.copy()
    variant[:4] = False
    cells = {"base": dict.fromkeys(range(5), base), "variant": dict.fromkeys(range(5), variant)}
    found = statistics.compare(cells, {"variant": "base"})["variant"]
    half = stats.t.ppf(0.975, 199) * stats.sem(variant.astype(int) - base)
    assert found["mean"] == -0.02
    assert found["ci95"] == pytest.approx([-0.02 - half, -0.02 + half], rel=0.01)
    assert found["verdict"] == "worse" or found["p_adjusted"] > 0.04
    assert statistics.resolution(cells["variant"], cells["base"]) == pytest.approx(half)


def test_summary_stays_within_zero_and_one():
    right = {0: np.arange(50) < 49, 1: np.arange(50) < 50}
    assert statistics.summarize(right)["ci95"][1] == 1


def test_summary_of_one_seed_has_no_interval():
    half = np.arange(10) < 5
    assert statistics.summarize({0: half}) == {"mean": 0.5, "std": None, "ci95": None}
    assert statistics.summarize({0: half, 1: half})["std"] == 0
    assert statistics.summarize({0: half, 1: None}) == {"mean": None, "std": None, "ci95": None}


def test_more_comparisons_need_more_evidence():
    counts = [670, 630, 685, 650, 675]  # less steady than the others, so that it borrows nothing
    alone = against_baseline(variant=counts)["variant"]
    among = against_baseline(variant=counts, **{f"other{i}": [SIMILAR[0] + i, *SIMILAR[1:]] for i in range(30)})
    assert alone["ci95"] == among["variant"]["ci95"]
    assert among["variant"]["p_adjusted"] == pytest.approx(min(1, 31 * alone["p_adjusted"]))
    assert (alone["verdict"], among["variant"]["verdict"]) == ("worse", "indistinguishable")


def test_one_seed_is_undetermined():
    found = against_baseline([700], variant=[600])["variant"]
    none = {"ci95": None, "p_adjusted": None, "seeds_needed": None}
    assert found == none | {"mean": pytest.approx(-0.1), "verdict": "undetermined"}


def test_the_very_same_predictions_are_indistinguishable():
    found = against_baseline(same=BASELINE)["same"]
    none = {"mean": 0, "ci95": [0, 0], "p_adjusted": 1, "seeds_needed": None}
    assert found == none | {"verdict": "indistinguishable"}


def test_equal_accuracies_on_different_pictures_have_an_interval():
    baseline = correct([700, 690])
    other = {seed: vector[::-1] for seed, vector in baseline.items()}
    found = statistics.compare({"baseline": baseline, "other": other}, {"other": "baseline"})["other"]
    assert found["mean"] == 0 and found["p_adjusted"] == 1 and found["verdict"] == "indistinguishable"
    assert found["ci95"][1] == -found["ci95"][0] > 0.01


def test_diverged_cells_leave_no_numbers_and_do_not_count_as_comparisons():
    found = against_baseline(lost=[*BASELINE[:4], None], worse=WORSE)
    none = {"mean": None, "ci95": None, "p_adjusted": None, "seeds_needed": None}
    assert found["lost"] == none | {"verdict": "diverged"}
    assert found["worse"] == against_baseline(worse=WORSE)["worse"]
    assert against_baseline([None] * 5, variant=WORSE)["variant"]["verdict"] == "undetermined"
    assert against_baseline([None] * 5, variant=[None] * 5)["variant"]["verdict"] == "diverged"


def test_nothing_to_compare():
    assert statistics.compare({"baseline": correct(BASELINE)}, {}) == {}


def test_a_variant_written_twice_makes_no_p_larger():
    random = np.random.default_rng(0)
    base = {seed: random.random(400) < 0.8 for seed in range(4)}
    worse = {seed: flags & (random.random(400) < 0.95) for seed, flags in base.items()}
    other = {seed: random.random(400) < 0.8 for seed in range(4)}
    once = statistics.compare({"base": base, "worse": worse, "other": other}, {"worse": "base", "other": "base"})
    twins = {"twin": dict(worse), "same": dict(base)}
    references = dict.fromkeys(("worse", "other", "twin", "same"), "base")
    twice = statistics.compare({"base": base, "worse": worse, "other": other} | twins, references)
    assert twice["worse"] == twice["twin"] == once["worse"]
    assert twice["other"] == once["other"]
    assert (twice["same"]["verdict"], twice["same"]["p_adjusted"]) == ("indistinguishable", 1.0)


def test_as_many_seeds_as_are_said_to_be_needed_find_a_difference():
    """Four times out of five, with the spreads that the first three seeds have shown."""
    seeds, pictures, difference = 3, 4000, 0.008
    squares = statistics.Analysis(difference, seeds, pictures, 2.0, 0.1, 0.09, seeds - 1)
    needed = statistics.seeds_needed(squares, 1)
    random = np.random.default_rng(0)
    of_seeds = np.sqrt((squares.between_seeds - squares.rest) / pictures)
    left = np.sqrt(squares.rest / pictures + (squares.between_pictures - squares.rest) / seeds * needed / pictures)

    def found(n):
        means = difference + of_seeds * random.standard_normal((4000, n)) + left * random.standard_normal((4000, n))
        return (stats.ttest_1samp(means, 0, axis=1).pvalue < 0.05).mean()

    assert 0.75 < found(needed) < 0.9 and found(needed // 2) < 0.75
    assert statistics.seeds_needed(squares, 20) > needed
    assert statistics.seeds_needed(squares._replace(between_pictures=50.0), 1) is None


@pytest.mark.parametrize(
    "kind", [coverage.Kind(5, 500, 0.002, 0.01), coverage.Kind(10, 500, 0.02, 0.0), coverage.Kind(3, 500, 0.02, 0.0)]
)
def test_intervals_hold_and_nothing_is_claimed_of_equal_variants(kind):
    """The short form of benchmarks/coverage.py."""
    found = coverage.simulate(kind, 400)
    assert 0.93 <= found.covered <= (0.98 if kind.seeds == 10 else 1)
    assert found.claimed <= 0.06
