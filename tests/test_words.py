import pytest

from ablation_lab import words


@pytest.mark.parametrize(
    ("value", "base", "shown"),
    [
        (1_995, 542_230, "−99.6\xa0%"),
        (0, 10, "−100\xa0%"),
        (9_999_999, 10_000_000, "−0.00001\xa0%"),
        (10_004, 10_000, "+0.04\xa0%"),
        (105, 100, "+5\xa0%"),
        (200, 100, "+100\xa0%"),
        (100, 100, "0\xa0%"),
    ],
)
def test_a_change_is_never_nothing_nor_all_unless_it_is(value: int, base: int, shown: str):
    assert words.percent_change(value, base) == shown
    assert words.percent_change(value, base, sign=False) == shown.lstrip("−+")


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.2, "1 s"),
        (30, "30 s"),
        (119, "119 s"),
        (120, "2 min"),
        (5_900, "98 min"),
        (7_200, "2 hours"),
        (4e5, "5 days"),
    ],
)
def test_a_short_time_is_told_in_seconds(seconds: float, shown: str):
    assert words.duration(seconds) == shown


def test_one_is_no_plural():
    assert [words.counted(n, what) for n, what in ((1, "cell"), (2, "cell"), (3, "epoch"), (1_200, "batch"))] == [
        "1 cell",
        "2 cells",
        "3 epochs",
        "1,200 batches",
    ]
