import numpy as np
import pytest
from scipy import stats

from ablation_lab import statistics

PICTURES = 1000
# Correct pictures of 1000, seeds 0 to 4.
BASELINE = [701, 698, 710, 705, 699]
WORSE = [650, 655, 661, 640, 662]
SIMILAR = [700, 703, 706, 701, 704]
BETTER = [731, 729, 745, 730, 731]


def correct(counts):
    """Boolean vectors with so many hits, at places that differ between seeds."""
    vectors = {}
    for seed, hits in enumerate(counts):
        vectors[seed] = None if hits is None else np.random.default_rng(seed).permutation(np.arange(PICTURES) < hits)
    return vectors


def against_baseline(baseline=BASELINE, **variants):
    cells = {name: correct(counts) for name, counts in {"baseline": baseline, **variants}.items()}
    return statistics.compare(cells, dict.fromkeys(variants, "baseline"))


def test_summary_agrees_with_scipy():
    values = np.divide(BASELINE, PICTURES)
    summary = statistics.summarize(values.tolist())
    low, high = stats.t.interval(0.95, 4, loc=values.mean(), scale=stats.sem(values))
    assert summary["mean"] == pytest.approx(values.mean())
    assert summary["std"] == pytest.approx(values.std(ddof=1))
    assert summary["ci95"] == pytest.approx([low, high])


def test_summary_stays_within_zero_and_one():
    assert statistics.summarize([0.9, 1.0])["ci95"][1] == 1


def test_summary_of_one_seed_or_no_spread_has_no_interval():
    assert statistics.summarize([0.5]) == {"mean": 0.5, "std": None, "ci95": None}
    assert statistics.summarize([0.1, 0.1, 0.1])["std"] == 0
    assert statistics.summarize([0.1, 0.1, 0.1])["ci95"] is None
    assert statistics.summarize([0.5, None]) == {"mean": None, "std": None, "ci95": None}


def test_differences_agree_with_scipy():
    found = against_baseline(worse=WORSE, similar=SIMILAR, better=BETTER)
    p = {}
    for name, counts in {"worse": WORSE, "similar": SIMILAR, "better": BETTER}.items():
        test = stats.ttest_rel(np.divide(counts, PICTURES), np.divide(BASELINE, PICTURES))
        interval = test.confidence_interval(0.95)
        assert found[name]["mean"] == pytest.approx(np.mean(counts) / PICTURES - np.mean(BASELINE) / PICTURES)
        assert found[name]["ci95"] == pytest.approx([interval.low, interval.high])
        p[name] = test.pvalue
    order = sorted(p, key=lambda name: p[name])
    running = 0.0
    for rank, name in enumerate(order):
        running = max(running, min(1, (3 - rank) * p[name]))
        assert found[name]["p_adjusted"] == pytest.approx(running)
    assert [found[name]["verdict"] for name in p] == ["worse", "indistinguishable", "better"]


def test_more_comparisons_need_more_evidence():
    counts = [692, 690, 697, 701, 693]
    alone = against_baseline(variant=counts)["variant"]
    among = against_baseline(variant=counts, **{f"other{i}": [SIMILAR[0] + i, *SIMILAR[1:]] for i in range(9)})[
        "variant"
    ]
    assert alone["ci95"] == among["ci95"]
    assert among["p_adjusted"] == pytest.approx(10 * alone["p_adjusted"])
    assert (alone["verdict"], among["verdict"]) == ("worse", "indistinguishable")


def test_one_seed_is_undetermined():
    found = against_baseline([700], variant=[600])["variant"]
    assert found == {"mean": pytest.approx(-0.1), "ci95": None, "p_adjusted": None, "verdict": "undetermined"}


def test_the_very_same_predictions_are_indistinguishable():
    found = against_baseline(same=BASELINE)["same"]
    assert found == {"mean": 0, "ci95": [0, 0], "p_adjusted": 1, "verdict": "indistinguishable"}


def test_equal_accuracies_on_different_pictures_have_no_interval():
    baseline = correct([700, 690])
    other = {seed: vector[::-1] for seed, vector in baseline.items()}
    found = statistics.compare({"baseline": baseline, "other": other}, {"other": "baseline"})["other"]
    assert found == {"mean": 0, "ci95": None, "p_adjusted": 1, "verdict": "indistinguishable"}


def test_the_same_difference_in_all_seeds_is_undetermined():
    found = against_baseline([700, 690, 695], variant=[701, 691, 696])["variant"]
    assert found == {"mean": pytest.approx(0.001), "ci95": None, "p_adjusted": None, "verdict": "undetermined"}


def test_diverged_cells_leave_no_numbers_and_do_not_count_as_comparisons():
    found = against_baseline(lost=[*BASELINE[:4], None], worse=WORSE)
    assert found["lost"] == {"mean": None, "ci95": None, "p_adjusted": None, "verdict": "diverged"}
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
