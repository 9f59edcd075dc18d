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
    single = a, of_a
    if accuracies is not None:
        left = accuracies - np.median(accuracies - accuracies.mean(axis=1, keepdims=True), axis=0)
        count = len(accuracies)
        usual = 2 * np.median(left.var(axis=1, ddof=1)) * count / (count - 1)
        pooled = pictures * usual * (seeds - 1) / stats.chi2(seeds - 1).ppf(0.5)
        borrowed = 4 * min(1, pooled / a) ** 2
        a, of_a = max(a, (of_a * a + borrowed * pooled) / (of_a + borrowed)), of_a + borrowed
    total = max(a + b - rest, a, b)
    freedom = max(total**2 / (a**2 / of_a + b**2 / of_b + rest**2 / of_rest), of_a)
    error = np.sqrt(total / table.size)
    ways = [(error, freedom)] + ([(np.sqrt(single[0] / table.size), single[1])] if accuracies is None else [])
    half = max(stats.t.ppf(0.975, freedom) * error for error, freedom in ways)
    p = max(2 * stats.t.sf(abs(table.mean()) / error, freedom) for error, freedom in ways)
    return table.mean(), (table.mean() - half, table.mean() + half), p


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


def test_seeds_that_agree_by_chance_borrow_from_the_other_variants():
    """The less they agree, the less: the interval changes little by little."""
    calm = statistics.Analysis(0.1, 4, 1000, 0.001, 0.2, 0.2, 3)
    usual = 0.002  # as much as a mean square of 2
    moved = statistics.moderate(calm, usual)
    assert moved.between_seeds == pytest.approx((3 * 0.001 + 4 * 2) / 7) and moved.freedom == 7
    assert statistics.moderate(calm, None) == calm
    own = [1.999, 2.001, 4.0, 40.0]
    moved = [statistics.moderate(calm._replace(between_seeds=one), usual) for one in own]
    assert [one.between_seeds for one in moved] == pytest.approx(own, rel=1e-3)
    assert [one.freedom for one in moved] == pytest.approx([7, 7, 4, 3], rel=5e-3)


def test_one_unsteady_variant_does_not_widen_the_intervals_of_others():
    random = np.random.default_rng(5)
    hard = random.random(2000) < 0.1

    def cells(*skills):
        return {s: ~hard & (random.random(2000) < skill) for s, skill in enumerate(skills)}

    calm = {f"v{i}": cells(0.95, 0.951, 0.952) for i in range(6)} | {"worse": cells(0.91, 0.912, 0.911)}
    wild = calm | {"wild": cells(0.95, 0.94, 0.1)}
    alone, among = (
        statistics.compare(one, {name: "v0" for name in one if name != "v0"})["worse"] for one in (calm, wild)
    )
    assert alone["verdict"] == among["verdict"] == "worse"
    assert np.ptp(among["ci95"]) < 1.1 * np.ptp(alone["ci95"])
    assert statistics.usual_spread(np.array([[0.9, 0.8], [0.7, 0.8]])) is None


def test_where_nothing_is_borrowed_no_interval_is_narrower_than_a_t_test_over_seeds():
    random = np.random.default_rng(1)
    for _ in range(20):
        cells = {name: {s: random.random(300) < 0.9 for s in range(3)} for name in "ab"}
        found = statistics.compare(cells, {"b": "a"})["b"]
        test = stats.ttest_rel(*([flags.mean() for flags in cells[name].values()] for name in "ba"))
        low, high = test.confidence_interval(0.95)
        assert np.ptp(found["ci95"]) >= min(high - low, 2) - 1e-9 and found["p_adjusted"] >= test.pvalue - 1e-9


def test_nothing_seen_is_no_certainty():
    """The rule of three: of n pictures that all networks get right, 3 / n may still be wrong."""
    right = {s: np.ones(50, bool) for s in range(3)}
    assert statistics.summarize(right)["ci95"] == pytest.approx([1 - 3 / 50, 1])
    found = statistics.compare({"a": right, "b": right}, {"b": "a"})["b"]
    assert found["ci95"] == pytest.approx([-3 / 50, 3 / 50]) and found["p_adjusted"] == 1
    two = {"a": {s: np.ones(2, bool) for s in range(2)}, "b": {s: np.zeros(2, bool) for s in range(2)}}
    found = statistics.compare(two, {"b": "a"})["b"]
    assert found["verdict"] == "indistinguishable" and found["ci95"][0] == -1


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
    assert found["verdict"] == ("worse" if found["p_adjusted"] < 0.05 else "indistinguishable")
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
    counts = [670, 630, 685, 650, 675]
    alone = against_baseline(variant=counts, other=SIMILAR, another=[SIMILAR[1], *SIMILAR[1:]])["variant"]
    among = against_baseline(variant=counts, **{f"other{i}": [SIMILAR[0] + i, *SIMILAR[1:]] for i in range(30)})
    assert among["variant"]["p_adjusted"] > 5 * alone["p_adjusted"]
    assert (alone["verdict"], among["variant"]["verdict"]) == ("worse", "indistinguishable")


def test_one_seed_is_undetermined():
    found = against_baseline([700], variant=[600])["variant"]
    none = {"ci95": None, "p_adjusted": None, "seeds_needed": None}
    assert found == none | {"mean": pytest.approx(-0.1), "verdict": "undetermined"}


def test_the_very_same_predictions_are_indistinguishable():
    found = against_baseline(same=BASELINE)["same"]
    assert found.pop("ci95") == pytest.approx([-0.003, 0.003])
    assert found == {"mean": 0, "p_adjusted": 1, "seeds_needed": None, "verdict": "indistinguishable"}


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
    """Four times out of five, and half as many don't; a difference that the pictures hide, no number does."""
    kind = coverage.Kind(3, 4000, 0.004, 0.01, variants=3)
    random = np.random.default_rng(0)
    needed = []
    for _ in range(100):
        flags = coverage.draw(kind._replace(seeds=6), random)
        table = np.array([flags["variant2"][s].astype(int) - flags["variant0"][s] for s in range(6)])
        needed.append(statistics.seeds_needed(statistics.analyse(table)._replace(mean=0.01), 2))
    enough = int(np.median([one or 10**6 for one in needed]))

    assert 0.7 < coverage.simulate(kind._replace(seeds=enough), 150).detected < 0.95
    assert coverage.simulate(kind._replace(seeds=max(2, enough // 2)), 150).detected < 0.7
    seen = statistics.Analysis(0.008, 3, 500, 0.1, 0.5, 0.05, 2)
    assert statistics.seeds_needed(seen, 1) is None
    assert statistics.seeds_needed(seen._replace(between_pictures=0.05), 1) > 3
    tiny = statistics.Analysis(0.0005, 3, 10_000, 1.05, 0.05, 0.05, 2)
    assert statistics.seeds_needed(tiny, 1) > 1000  # the seeds hide it, not the pictures
    assert statistics.seeds_needed(tiny._replace(mean=0.0002), 1) is None  # two pictures


@pytest.mark.parametrize(
    "kind", [coverage.Kind(5, 500, 0.002, 0.01), coverage.Kind(10, 500, 0.02, 0.0), coverage.Kind(3, 500, 0.02, 0.0)]
)
def test_intervals_hold_and_nothing_is_claimed_of_equal_variants(kind):
    """The short form of benchmarks/coverage.py."""
    found = coverage.simulate(kind, 400)
    assert 0.93 <= found.covered <= (0.98 if kind.seeds == 10 else 1)
    assert found.claimed <= 0.06
