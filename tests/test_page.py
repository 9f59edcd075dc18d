"""report.html in a real browser: offline, on a phone and a desk, sorted by hand, printed, and full of nasty names."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import browser
import fabricate
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect
from test_report import NASTY, make

from ablation_lab.report import figures, pages, wording

pytestmark = browser.needed
PHONE, DESK = 390, 1280
LONG = "a_variant_with_the_longest_name_that_params_yaml_lets_a_user_get"  # 64 letters
NASTIER = [
    *NASTY,
    "</script></style></title><script>alert(2)</script>",
    """"><img src=x onerror='alert(3)'> {{ 7 * 7 }} ${alert(4)} &lt; &#60;""",
    "🎉 \u202eturned\u200f round",
    "خط",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """A report with nasty texts wherever a user may write one; the longest name's first seed diverged."""
    root = tmp_path_factory.mktemp("page")
    study = fabricate.study(("baseline", "no_dropout", "big_pool", LONG), seeds=(0, 1), quick=True)
    for key, text in (("title", NASTIER[3]), ("notes", "\n\n".join(NASTIER)), ("source", NASTIER[4] * 3)):
        object.__setattr__(study.study, key, text)
    object.__setattr__(study.variants["big_pool"], "note", NASTIER[4])
    skill = {"no_dropout": 5.0, "big_pool": 1.0}
    make(root, study, classes=NASTIER, pictures=70, skill=skill, diverged=[(LONG, 0)], lints=NASTIER)
    return root / "reports/report.html"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser.chromium() as launched:
        yield launched


@contextmanager
def opened(chromium: Browser, report: Path, width: int = DESK, details: bool = True, **options) -> Iterator[Page]:
    """The page, with no network; it must say nothing to the console and ask for no other file."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, offline=True, **options)
    said: list[str] = []
    asked: list[str] = []
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri())
    if details:
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    context.close()


def table(page: Page, name: str) -> Locator:
    return page.get_by_role("group", name=name, exact=True).locator("table")


def column(of: Locator, number: int = 0) -> list[str]:
    """The first lines of a column's cells, as they are shown."""
    return [
        text.strip().split("\n")[0] for text in of.locator(f"tbody tr > :nth-child({number + 1})").all_inner_texts()
    ]


def column_names(of: Locator) -> list[str]:
    return of.locator("thead th").all_inner_texts()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_the_page_fits_and_a_checker_of_accessibility_finds_nothing(chromium, report, width, scheme):
    with opened(chromium, report, width, color_scheme=scheme) as page:
        room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert room[0] <= room[1]
        assert page.evaluate("[...document.images].every(one => one.complete && one.naturalWidth > 600)")
        options = {"resultTypes": ["violations"], "rules": {"target-size": {"enabled": True}}}
        found = Axe().run(page, options=options).response["violations"]
        assert {one["id"]: [node["html"] for node in one["nodes"]] for one in found} == {}


def test_nasty_names_are_shown_as_they_are(chromium, report):
    with opened(chromium, report) as page:
        shown = column(table(page, "Pictures of each class"))
        assert shown == [wording.short_name(name) for name in NASTIER]
        expect(page.get_by_role("heading", level=1)).to_have_text(NASTIER[3])
        assert page.title() == f"QUICK CHECK – {NASTIER[3]}"
        assert page.evaluate("document.scripts.length") == 1
        assert page.locator("img:not([src^='data:image/png;base64,'])").count() == 0
        expect(page.locator(".quick-banner")).to_have_text(figures.QUICK)


def test_no_script_but_the_pages_own_may_run(chromium, report):
    planted = report.with_name("planted.html")
    planted.write_text(report.read_text(encoding="utf-8").replace("</main>", "</main><script>alert(1)</script>"))
    with pytest.raises(AssertionError, match="violates the following Content Security Policy"):  # noqa: SIM117
        with opened(chromium, planted) as page:
            expect(table(page, "Cells").get_by_role("button").first).to_be_visible()


def test_tables_are_sorted_by_a_mouse(chromium, report):
    results = json.loads(report.with_name("results.json").read_text())["variants"]
    means = {name: one["test_accuracy"]["mean"] for name, one in results.items()}
    best = sorted((name for name in means if means[name] is not None), key=lambda name: means[name])
    with opened(chromium, report) as page:
        variants, said = table(page, "Variants"), page.get_by_role("status")
        head = variants.get_by_role("columnheader", name="Test", exact=True)
        button = head.get_by_role("button")
        expect(said).to_have_text("")
        for way, order, told in (
            ("ascending", [*best, LONG], "sorted by Test, ascending"),
            ("descending", [*best[::-1], LONG], "sorted by Test, descending"),
            (None, list(results), "in the original order"),
        ):
            button.click()
            assert column(variants) == order
            assert head.get_attribute("aria-sort") == way
            expect(said).to_have_text(f"Variants: {told}.")
        verdicts = variants.get_by_role("columnheader", name="Verdict")
        button.click()
        verdicts.get_by_role("button").click()
        assert head.get_attribute("aria-sort") is None
        place = {f"{pages.SYMBOLS[word]} {word}": i for i, word in enumerate(wording.VERDICT_ORDER)}
        ranks = [place.get(word, len(place)) for word in column(variants, column_names(variants).index("Verdict"))]
        assert ranks == sorted(ranks) and len(set(ranks)) > 2


def test_tables_are_sorted_by_the_keyboard(chromium, report):
    with opened(chromium, report) as page:
        cells = table(page, "Cells")
        first = cells.get_by_role("button", name="Cell", exact=True)
        first.focus()
        for _ in range(column_names(cells).index("Validation")):
            page.keyboard.press("Tab")
        head = cells.get_by_role("columnheader", name="Validation", exact=True)
        expect(head.get_by_role("button")).to_be_focused()
        place = column_names(cells).index("Validation")
        shown = [text for text in column(cells, place) if text != wording.NONE]
        page.keyboard.press("Enter")
        expect(head).to_have_attribute("aria-sort", "ascending")
        assert column(cells, place) == [*sorted(shown, key=lambda text: float(text.split()[0])), wording.NONE]
        page.keyboard.press("Space")
        expect(head).to_have_attribute("aria-sort", "descending")
        expect(head.get_by_role("button")).to_be_focused()
        assert cells.get_by_role("columnheader", name="In MLflow").get_by_role("button").count() == 0


def test_sums_stay_below_the_rows_that_they_sum_up(chromium, report):
    with opened(chromium, report) as page:
        scores = table(page, "Classification report of big_pool")
        scores.get_by_role("button", name="F1", exact=True).click()
        shown = column(scores, column_names(scores).index("F1"))
        assert shown[:-2] == sorted(shown[:-2]) and len(set(shown)) > 3
        assert column(scores)[-2:] == ["macro average", "weighted average"]


def test_the_first_stop_of_the_keyboard_skips_to_the_content(chromium, report):
    with opened(chromium, report, details=False) as page:
        page.keyboard.press("Tab")
        skip = page.get_by_role("link", name="Skip to the content")
        expect(skip).to_be_focused()
        expect(skip).to_be_in_viewport()
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.closest('main') !== null")


def test_only_what_scrolls_is_a_stop_of_the_keyboard(chromium, report):
    stops = (
        "[...document.querySelectorAll('.scroll')].map(one => [one.tabIndex === 0, one.scrollWidth > one.clientWidth])"
    )
    with opened(chromium, report, PHONE) as page:
        page.wait_for_timeout(200)
        found = page.evaluate(stops)
        assert all(stop == scrolls for stop, scrolls in found) and {stop for stop, _ in found} == {True, False}


def test_without_javascript_the_page_has_all_its_content(chromium, report):
    with opened(chromium, report, details=False, java_script_enabled=False) as page:
        assert len(column(table(page, "Variants"))) == 4
        assert page.get_by_role("button").count() == 0
        page.get_by_text("Every cell (8)").click()
        assert len(column(table(page, "Cells"))) == 8


def test_what_is_folded_is_printed(chromium, report):
    with opened(chromium, report, details=False, color_scheme="dark") as page:
        unfolded = len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4")))
        assert page.locator("details[open]").count() == 1
    with opened(chromium, report, details=False, java_script_enabled=False) as page:
        folded = len(re.findall(rb"/Type\s*/Page\b", page.pdf(format="A4")))
    assert unfolded > folded > 1
