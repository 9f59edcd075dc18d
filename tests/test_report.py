import itertools
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import fabricate
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from sklearn.metrics import classification_report
from statsmodels.stats.multitest import multipletests
from test_statistics import by_statsmodels

from ablation_lab import evaluation, params
from ablation_lab.errors import LabError
from ablation_lab.report import budget, figures, pages, results, wording
from ablation_lab.report.writing import write_report

NASTY = ["<script>alert(1)</script>", "a | `b` *c* _d_ [e](f) $g$ & h\nnew line", "猫" + "very long " * 20]
SCRIPT = f"<script>{Path(pages.__file__).with_name('script.js').read_text(encoding='utf-8')}</script>"
VOID = {"meta", "img", "br", "wbr"}
FIGURES = {"accuracy", "difference", "curves", "train_validation", "gap", "confusions", "probabilities"}
FIGURES |= {"samples", "histogram", "pareto", "timing_pareto", "calibration"}
# Of the variants of `usual`.
FIGURES |= {f"{kind}_{name}" for kind in ("mistakes", "network") for name in ("baseline", "no_dropout", "big_pool")}


def make(root, study, **data):
    prepare(root, study, **data)
    return write_report(study, root)


def prepare(root, study, **data):
    """All that a report is made from."""
    fabricate.write(root, study, **data)
    evaluation.evaluate(study, root)


def reports(root):
    folder = root / "reports"
    html, markdown = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    return json.loads((folder / "results.json").read_text()), html, markdown


class Page(HTMLParser):
    """Collects tags, checks that they nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def markdown_tables(text):
    """Number of columns of each row of each table, told by unescaped bars."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [{len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()} for block in blocks]


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """A study of three variants and three seeds, reported."""
    root = tmp_path_factory.mktemp("usual")
    study = fabricate.study(no_dropout={"test_accuracy": 0.7286, "seconds": 298.71, "epochs": 200})
    text = make(root, study, skill={"big_pool": 1.5}, lints=["the last block is never reached"])
    return root, study, text


def test_results_keep_the_contract(usual):
    found, _, _ = reports(usual[0])
    assert list(found) == ["study", "baseline", "partial", "data", "variants"] and found["partial"] is None
    assert set(found["data"]) == {"name", "classes", "counts", "digest"}
    assert list(found["variants"]) == ["baseline", "no_dropout", "big_pool"]
    for variant in found["variants"].values():
        keys = {"parameters", "macs", "differences", "reported", "cells", "test_accuracy", "delta", "no_effect"}
        assert set(variant) == keys
        assert list(variant["cells"]) == ["0", "1", "2"]
        keys = {"status", "cell_hash", "epochs", "best_epoch", "train_accuracy", "validation_accuracy", "test_accuracy"}
        assert all(set(cell) == keys | {"test_loss", "macro_f1"} for cell in variant["cells"].values())
        assert set(variant["test_accuracy"]) == {"mean", "std", "ci95"}
        assert set(variant["delta"]) == {"mean", "ci95", "p_adjusted", "verdict", "seeds_needed"}
    assert set(found["variants"]["baseline"]["delta"].values()) == {None}
    assert found["variants"]["big_pool"]["delta"]["verdict"] == "worse"
    assert found["variants"]["no_dropout"]["reported"] == {"test_accuracy": 0.7286, "seconds": 298.71, "epochs": 200}
    assert found["variants"]["no_dropout"]["differences"] == [
        {"path": "model.dropout", "baseline": 0.5, "variant": 0.01}
    ]


def test_timings_are_apart(usual):
    timings = json.loads((usual[0] / "reports/timings.json").read_text())
    cell = {"seconds_per_epoch": 0.5, "epoch_seconds": [0.5] * 6, "total_seconds": 3.0, "device": "CPU", "threads": 1}
    assert timings["variants"]["big_pool"]["cells"]["2"] == cell
    assert timings["variants"]["big_pool"]["seconds_per_epoch"] == 0.5
    assert "seconds" not in (usual[0] / "reports/results.json").read_text().replace('"seconds": 298.71', "")


def test_html_is_one_file_that_nests_and_is_accessible(usual):
    _, html, _ = reports(usual[0])
    page = Page(html)
    sources = [attributes["src"] for _, attributes in page.tags if "src" in attributes]
    assert len(sources) == len(FIGURES) and all(one.startswith("data:image/png;base64,") for one in sources)
    links = [attributes["href"] for _, attributes in page.tags if "href" in attributes]
    to_runs = [link for link in links if link.startswith("http://127.0.0.1:5000/cells/")]
    assert len(to_runs) == len(usual[1].cells)
    assert all(link.startswith("#") for link in links if link not in to_runs)
    inline = re.sub(r'base64,[^"]+|<a href="[^"]+">|sha256-[^\']+', "", html.replace(SCRIPT, ""))
    assert not re.search(r"https?:|//|@import|url\(", inline)
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe")]
    assert len(html.encode()) < 5e6
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert headings[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(headings))


def test_both_pages_say_what_was_found(usual):
    found, html, markdown = reports(usual[0])
    words = "".join(Page(html).words)
    delta = found["variants"]["big_pool"]["delta"]
    low = f"{100 * delta['ci95'][0]:.1f}".replace("-", "−")
    for text in (words, markdown):
        assert "What does dropout do?" in text and "A second paragraph." in text
        assert f"{-100 * delta['mean']:.1f} points lower (95 % interval {low}" in text
        assert "the last block is never reached" in text
        assert "72.9\xa0%" in text and "299" in text and "model.dropout" in text
        assert "The intervals count two sources of chance" in text
        assert "QUICK" not in text


def test_markdown_links_its_figures_and_tables_are_whole(usual):
    _, _, markdown = reports(usual[0])
    linked = re.findall(r"\]\(figures/(\w+)\.png\)", markdown)
    assert set(linked) == FIGURES == {path.stem for path in (usual[0] / "reports/figures").glob("*.png")}
    tables = markdown_tables(markdown)
    assert len(tables) >= 8 and all(len(columns) == 1 for columns in tables)


def test_text_table_is_for_a_terminal(usual):
    lines = usual[2].splitlines()
    assert lines[0].startswith("Variant") and len(lines) == 5
    assert "worse" in lines[-1] and "big_pool" in lines[-1]


def test_the_same_bytes_twice(usual):
    root, study, _ = usual
    once = {path: path.read_bytes() for path in (root / "reports").rglob("*") if path.is_file()}
    write_report(study, root)
    assert once == {path: path.read_bytes() for path in (root / "reports").rglob("*") if path.is_file()}


def test_what_a_clock_measured_is_in_files_named_timing(tmp_path):
    study = fabricate.study(seeds=(0, 1), no_dropout={"test_accuracy": 0.9, "seconds": 10.0})
    make(tmp_path, study)
    once = {path: path.read_bytes() for path in (tmp_path / "reports").rglob("*") if path.is_file()}
    for number, file in enumerate(sorted(tmp_path.glob("cells/*/*/timing.json"))):
        timing = json.loads(file.read_text())
        timing["epoch_seconds"] = [one * (2 + number) for one in timing["epoch_seconds"]]
        file.write_text(json.dumps(timing | {"total_seconds": 100.0 + number}))
    write_report(study, tmp_path)
    changed = {path.relative_to(tmp_path / "reports") for path, before in once.items() if path.read_bytes() != before}
    apart = {path.name for path in changed if not path.name.startswith("timing")}
    assert apart == {"report.html", "report.md"}
    assert {"timings.json", "tables/timing.csv", "figures/timing_pareto.png"} <= {str(path) for path in changed}


SOURCE = """
study: {name: fabricated, baseline: baseline}
data: {dataset: digits, path: null, split: {validation: 0.2, test: 0.2}}
model: {builder: cnn, dropout: 0.5, blocks: {block1: {filters: 8}}}
train: {epochs: 60, steps_per_epoch: 5}
seeds: [0]
variants: {baseline: {}, no_dropout: {model: {dropout: 0.01}, train: {epochs: 3}}}
"""


def test_what_was_cut_is_said_in_the_headline_and_beside_reported_figures(tmp_path):
    study = fabricate.study(("baseline", "no_dropout"), seeds=(0, 1), baseline={"test_accuracy": 0.99})
    assert "is cut" not in make(tmp_path, study) + reports(tmp_path)[1]
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/fabricated.yaml").write_text(SOURCE)
    object.__setattr__(study.data, "limit", 20)
    for variant in study.variants.values():
        object.__setattr__(variant.train, "steps_per_epoch", 2)
    said = (
        "This study is cut: at most 20 images of each class in each set (data.limit); 64 of 160 images an epoch "
        f"(train.steps_per_epoch); 6 of 60 epochs (train.epochs). {budget.NO_FAILURE}"
    )
    assert said in write_report(study, tmp_path)
    _, html, markdown = reports(tmp_path)
    assert "".join(Page(html).words).count(budget.NO_FAILURE) == markdown.count(budget.NO_FAILURE) == 3
    for text in (html, markdown):
        assert "Reproduced, cut" in text and "Reported test, not cut" in text and "6 of 60 epochs" in text
    assert (
        budget.cuts(study, budget.source(study, tmp_path), results.gather(study, tmp_path).card, "no_dropout")[2:] == []
    )


@pytest.mark.parametrize("path", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_ready_made_study_is_not_cut(path):
    study = params.load(path)
    card = {"counts": {"train": 50_000}, "class_counts": {}}
    assert budget.told(study, budget.source(study, ROOT), card) == []
    for settings in {id(one.train): one.train for one in study.variants.values()}.values():
        object.__setattr__(settings, "epochs", 1)
    assert "1 of " in budget.told(study, budget.source(study, ROOT), card)[0]


def test_names_are_never_trusted(tmp_path):
    study = fabricate.study(("baseline", "other"), seeds=(0, 1), quick=True)
    before = {path.name for path in tmp_path.parent.iterdir()}
    nasty = ["../x", *(name for name in fabricate.NASTY if set(name) & set("<|{*`$\\\x1b"))]
    make(tmp_path, study, classes=[*NASTY[1:], *nasty], pictures=60, lints=["<b>bold</b> | `x`"])
    assert {path.name for path in tmp_path.parent.iterdir()} == before
    assert not list(tmp_path.rglob("pwned"))
    _, html, markdown = reports(tmp_path)
    page = Page(html)
    assert {wording.short_name(name) for name in nasty} <= set(page.words)
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.tags if tag == "img")
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert "<img" not in markdown and "{{ 7\\*7 }}" in markdown
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [{}]
    assert html.count(SCRIPT) == 1 and html.count("<script") == 1 and "<script" not in markdown
    assert "<b>bold" not in html
    assert "<b>" not in markdown and r"\| \`x\`" in markdown
    assert all(len(columns) == 1 for columns in markdown_tables(markdown))
    assert html.count(figures.QUICK) > 10 and markdown.count(figures.QUICK) > 10


def test_one_variant_with_one_seed(tmp_path):
    text = make(tmp_path, fabricate.study(("baseline",), seeds=(7,)), classes=2, epochs=1, pictures=40)
    found, html, markdown = reports(tmp_path)
    cell = found["variants"]["baseline"]["cells"]["7"]
    assert {"precision", "recall", "roc_auc"} <= set(cell)
    assert found["variants"]["baseline"]["test_accuracy"]["ci95"] is None
    assert "One seed was trained" in html and "ROC AUC" in markdown and "baseline" in text


def test_everything_diverged(tmp_path):
    study = fabricate.study(("baseline", "other"), seeds=(0, 1))
    make(tmp_path, study, classes=3, pictures=30, diverged=study.cells)
    found, html, _ = reports(tmp_path)
    assert found["variants"]["other"]["delta"]["verdict"] == "diverged"
    assert found["variants"]["other"]["test_accuracy"] == {"mean": None, "std": None, "ci95": None}
    assert "The baseline diverged, so nothing can be compared with it." in html
    assert "training diverged in 2 of 2 seeds (0, 1)" in html


def test_a_hundred_classes_and_a_step_by_step_study(tmp_path):
    study = fabricate.study(("baseline", "wide", "deep"), seeds=(0, 1))
    object.__setattr__(study.variants["deep"], "compared_with", "wide")
    make(tmp_path, study, classes=100, pictures=200)
    _, html, markdown = reports(tmp_path)
    assert "Step by step" in html and "| deep | wide | model.dropout: 0.01 → 0.02 | +1,000 |" in markdown
    assert "The 20 classes of 100 with the lowest mean" in html


def test_classification_reports_are_scikit_learns(usual):
    root, study, _ = usual
    page = pages.build(study, results.gather(study, root))
    rows = {row[0]: row[1:] for row in page["errors"]["scores"]["big_pool"].rows}
    expected = []
    for seed in study.seeds:
        with np.load(root / f"cells/big_pool/seed-{seed}/predictions.npz") as arrays:
            predicted, labels = arrays["test_probabilities"].argmax(axis=1), arrays["test_labels"]
        expected.append(classification_report(labels, predicted, output_dict=True))
    for row, key in (("class 3", "3"), ("macro average", "macro avg"), ("weighted average", "weighted avg")):
        means = [np.mean([one[key][score] for one in expected]) for score in ("precision", "recall", "f1-score")]
        assert rows[row] == [*(f"{mean:.3f}" for mean in means), f"{expected[0][key]['support']:,.0f}"]


def test_mistakes_are_the_pictures_of_the_most_confused_pairs(usual):
    root, study, _ = usual
    material = results.gather(study, root)
    counts = material.confusion("big_pool") * (1 - np.eye(10, dtype=int))
    pairs = material.mistakes["big_pool"]
    assert [pair.count for pair in pairs] == sorted(counts.ravel(), reverse=True)[:3]
    images, test = np.load(root / "data/processed/images.npy"), np.load(root / "data/processed/test.npy")
    with np.load(root / "cells/big_pool/seed-0/predictions.npz") as arrays:
        probabilities, labels = arrays["test_probabilities"], arrays["test_labels"]
    for pair in pairs:
        assert pair.of == 3 * (labels == pair.actual).sum()
        surest = [probability for _, probability in pair.pictures]
        assert surest == sorted(surest, reverse=True)
        for picture, probability in pair.pictures:
            (place,) = np.flatnonzero((images[test] == picture).all(axis=(1, 2, 3)))
            assert labels[place] == pair.actual and probabilities[place].argmax() == pair.predicted
            assert probabilities[place].max() == pytest.approx(probability)


def test_probabilities_before_and_after_training(usual):
    root, study, _ = usual
    page = pages.build(study, results.gather(study, root))
    with np.load(root / "cells/baseline/seed-0/predictions.npz") as arrays:
        after, label = arrays["test_probabilities"][0], arrays["test_labels"][0]
    row = page["errors"]["probabilities"].rows[0]
    told = row[1] if isinstance(row[1], str) else row[1][0]
    assert row[0] == f"class {label}" and told == f"10 → {100 * after[label]:.0f}\xa0%"


def test_epochs_to_reach_the_variant_before(tmp_path):
    study = fabricate.study(("baseline", "slow", "fast"), seeds=(0, 1))
    for name in ("slow", "fast"):
        object.__setattr__(study.variants[name], "compared_with", "baseline")
    prepare(tmp_path, study)
    curves = tmp_path / "evaluation/curves.csv"
    table = pd.read_csv(curves)
    reached = {"baseline": [0.1, 0.2, 0.5, 0.4, 0.4, 0.4], "slow": [0.1] * 6, "fast": [0.4, 0.5, 0.6, 0.6, 0.6, 0.6]}
    for name, values in reached.items():
        for seed in (0, 1):
            table.loc[(table.variant == name) & (table.seed == seed), "val_accuracy"] = values
    table.to_csv(curves, index=False)
    rows = pages.build(study, results.gather(study, tmp_path))["steps"].rows
    assert {row[0]: row[-1] for row in rows} == {"slow": ["> 6", "baseline: 3"], "fast": ["2", "baseline: 3"]}


def test_pictures_that_were_left_out_are_counted(tmp_path):
    study = fabricate.study(seeds=(0,))
    make(tmp_path, study, pictures=20)
    assert "Left out" not in reports(tmp_path)[1] + reports(tmp_path)[2]
    file = tmp_path / "data/processed/card.json"
    skipped = {"count": 3, "class_counts": {"class 1": 3}, "first": ["a", "b", "c"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"skipped": skipped}))
    write_report(study, tmp_path)
    _, html, markdown = reports(tmp_path)
    assert "Left out" in html and "Left out" in markdown
    assert "3 unreadable pictures" in html and "3 unreadable pictures" in markdown


def test_while_the_test_part_is_sealed_nothing_of_it_is_told(tmp_path):
    study = fabricate.study(no_dropout={"test_accuracy": 0.7286, "validation_accuracy": 0.9})
    object.__setattr__(study.study, "test", "sealed")
    make(tmp_path, study)
    found, html, markdown = reports(tmp_path)
    cells = [cell for one in found["variants"].values() for cell in one["cells"].values()]
    assert {cell["test_accuracy"] for cell in cells} == {None} and {cell["status"] for cell in cells} == {"ok"}
    assert found["variants"]["big_pool"]["delta"]["verdict"] == "undetermined"
    words = "".join(word for word in Page(html).words if "{" not in word)  # no style sheet
    for text in (words, markdown):
        assert "The test part is sealed" in text and "validation accuracy" in text
        assert "diverged" not in text and "Confusion" not in text and "Test accuracy" not in text
    drawn = {path.stem for path in (tmp_path / "reports/figures").glob("*.png")}
    networks = {f"network_{name}" for name in study.variants}
    overview = {"accuracy", "pareto", "timing_pareto", "curves", "train_validation", "gap", "samples", "histogram"}
    assert drawn == networks | overview


def test_missing_results_are_named(tmp_path):
    study = fabricate.study(seeds=(0,))
    fabricate.write(tmp_path, study)
    with pytest.raises(LabError, match=r"evaluation/cells\.json: .*Found: no such folder\. Run `dvc repro`"):
        write_report(study, tmp_path)
    evaluation.evaluate(study, tmp_path)
    with pytest.raises(LabError, match=r"Expected all cells of the study\. Found: none of baseline-1"):
        write_report(fabricate.study(seeds=(0, 1)), tmp_path)
    (tmp_path / "evaluation/correct.npy").unlink()
    with pytest.raises(LabError, match=r"correct\.npy: .*Run `dvc repro`"):
        write_report(study, tmp_path)


@pytest.mark.parametrize(
    ("cell", "key"),
    [
        (["94.2\xa0%", "±\xa00.3"], 94.2),
        ("94.2\xa0% ±\xa00.3", 94.2),
        (["−0.8", "[−1.2, −0.4]"], -0.8),
        ("+0.3 points", 0.3),
        (["1,234,567", "+5\xa0%"], 1_234_567),
        (["1.23\xa0M", "−40\xa0%"], 1_230_000),
        ("3", 3),
        ("3–5", 4),
        (["> 6", "baseline: 3"], 6.5),
        ("2, > 5–6", 6.5),
        ("9 → 97\xa0%", 97),
        ("8 × 8 × 16", 1024),
        ("1e-05", 1e-5),
        ("baseline", 0),
        ("diverged", None),
        ("–", None),
    ],
)
def test_numbers_are_sorted_by_what_they_say(cell, key):
    assert pages.sort_key(cell, "r") == (key if key is None else pytest.approx(key))


def test_verdicts_are_sorted_from_better_to_none():
    keys = [pages.sort_key([one, "p\xa0=\xa00.012"], "v") for one in wording.VERDICT_ORDER]
    assert keys == sorted(keys) and pages.sort_key("–", "v") is None
    assert pages.sort_key("a 7", "l") is None


def test_a_name_written_from_right_to_left_leaves_its_surroundings_in_order():
    assert wording.short_name("خط") == "\u2068خط\u2069" and wording.short_name("a \u202eb") == "\u2068a \u202eb\u2069"
    assert wording.short_name("猫 é") == "猫 é"


def test_a_note_may_emphasise_and_nothing_else():
    shown = pages._emphasised("Pixels *(inferred)*, `-S a=*b*`, 2 * 3 * 4, <b>x</b>")
    assert shown == "Pixels <em>(inferred)</em>, <code>-S a=*b*</code>, 2 * 3 * 4, &lt;b&gt;x&lt;/b&gt;"


def test_escape_markdown_leaves_names_of_variants_readable():
    assert pages.escape_markdown("no_dropout") == "no_dropout"
    assert pages.escape_markdown("_x_ <b>|`") == r"\_x\_ &lt;b&gt;\|\`"


def test_stages_run_from_the_root(tmp_path):
    raw = {
        "study": {"name": "tiny", "baseline": "baseline"},
        "data": {"dataset": "digits", "path": None},
        "input": {},
        "model": {"builder": "mlp", "head": {"dense1": {"units": 4}}},
        "train": {},
        "seeds": [0],
        "variants": {"baseline": {}, "wide": {"model": {"head": {"dense1": {"units": 8}}}}},
    }
    fabricate.write(tmp_path, fabricate.study(("baseline", "wide"), seeds=(0,)), classes=3, pictures=30)
    fabricate.params_yaml(tmp_path, raw)
    code = (
        "import sys; from stages import evaluate, report; evaluate.main(); report.main();"
        "print([name for name in ('tensorflow', 'keras', 'mlflow') if name in sys.modules])"
    )
    environment = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin", "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Report: reports/report.html" in done.stdout and "wide" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def table_rows(root, study, name):
    return {row[0]: row[1:] for row in pages.build(study, results.gather(study, root))[name].rows}


def rewrite_curves(root, change):
    curves = root / "evaluation/curves.csv"
    table = pd.read_csv(curves)
    change(table)
    table.to_csv(curves, index=False)


def test_seconds_to_an_accuracy_that_every_seed_of_the_baseline_reaches(tmp_path):
    study = fabricate.study(("baseline", "slow", "half", "never"), seeds=(0, 1))
    prepare(tmp_path, study)
    reached = {
        ("baseline", 0): [0.1, 0.2, 0.537, 0.4, 0.4, 0.4],
        ("baseline", 1): [0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        ("slow", 0): [0, 0, 0, 0, 0, 0.53],
        ("slow", 1): [0, 0, 0, 0.9, 0, 0],
        ("half", 0): [0.53, 0, 0, 0, 0, 0],
        ("half", 1): [0.52] * 6,
        ("never", 0): [0.52] * 6,
        ("never", 1): [0.52] * 6,
    }

    def change(table):
        for (name, seed), values in reached.items():
            table.loc[(table.variant == name) & (table.seed == seed), "val_accuracy"] = values

    rewrite_curves(tmp_path, change)
    page = pages.build(study, results.gather(study, tmp_path))["timing"]
    assert list(page.columns)[-1] == "Seconds to 53\xa0%"
    spent = {row[0]: row[-1] for row in page.rows}  # half a second an epoch
    assert spent == {"baseline": "2.25", "slow": "2.50", "half": ["0.50", "1 of 2 seeds"], "never": "never"}


def test_what_was_seen_of_a_training_is_named(tmp_path):
    study = fabricate.study(("baseline", "overfits", "jumps", "early", "lost", "improving", "keeps_last"), seeds=(0, 1))
    object.__setattr__(study.variants["early"].train, "epochs", 20)
    object.__setattr__(study.variants["keeps_last"].train, "keep", "last")
    prepare(tmp_path, study, epochs=10, diverged=[("lost", 1)])
    for one in study.variants.values():
        object.__setattr__(one.train, "epochs", 20 if one is study.variants["early"] else 10)
    flat = [1, 0.9, 0.8, 0.7, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6]
    losses = {
        "overfits": [1, 0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1],
        "jumps": [*flat[:-1], 0.75],  # one epoch is no trend
        "early": flat,
        "improving": [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
        "keeps_last": flat,
        "baseline": flat,
    }

    def change(table):
        for name, values in losses.items():
            table.loc[table.variant == name, "val_loss"] = values * 2
            table.loc[table.variant == name, "loss"] = np.linspace(1, 0.5, 10).tolist() * 2

    rewrite_curves(tmp_path, change)
    rows = table_rows(tmp_path, study, "behaviour")
    seen = {name: row[-1] for name, row in rows.items()}
    assert seen["overfits"] == ["overfits after epoch 3: validation loss +100 %"]
    assert seen["early"] == ["stopped early, after 10 of 20 epochs"]
    assert seen["lost"][0] == "diverged: seed 1 in epoch 3"
    assert seen["improving"] == ["still improving when it ended"]
    assert seen["baseline"] == seen["jumps"] == seen["keeps_last"] == ["nothing noticed"]
    assert rows["keeps_last"][1] == "–" and rows["baseline"][1] == "9"


def test_of_a_variant_that_diverged_in_some_seed_the_others_are_not_shown(tmp_path):
    study = fabricate.study(("baseline", "lost"), seeds=(0, 1))
    prepare(tmp_path, study, diverged=[("lost", 0)])
    material = results.gather(study, tmp_path)
    page = pages.build(study, material)
    assert material.confusion("lost") is None and material.class_scores("lost", "f1") is None
    assert material.mistakes["lost"] == [] and material.surest["lost"] == []
    assert {row[0]: row[1:] for row in page["errors"]["calibration"].rows}["lost"] == ["–"] * 4
    assert all(row[-1] == "–" for row in page["errors"]["classes"].rows)


def test_intervals_agree_with_statsmodels_and_scipy_on_stored_predictions(usual):
    root, study, _ = usual
    right = {}
    for name in study.variants:
        flags = []
        for seed in study.seeds:
            with np.load(root / f"cells/{name}/seed-{seed}/predictions.npz") as arrays:
                flags.append(arrays["test_probabilities"].argmax(axis=1) == arrays["test_labels"])
        right[name] = np.array(flags).astype(int)
    accuracies = np.array([table.mean(axis=1) for table in right.values()])
    found = reports(root)[0]["variants"]
    others = [name for name in right if name != "baseline"]
    p = []
    for name in others:
        mean, interval, raw = by_statsmodels(right[name] - right["baseline"], accuracies)
        assert found[name]["delta"]["mean"] == pytest.approx(mean)
        assert found[name]["delta"]["ci95"] == pytest.approx(list(interval))
        assert found[name]["test_accuracy"]["ci95"] == pytest.approx(list(by_statsmodels(right[name])[1]))
        p.append(raw)
    adjusted = multipletests(p, method="holm")[1]
    assert [found[name]["delta"]["p_adjusted"] for name in others] == pytest.approx(adjusted.tolist())


def test_calibration_agrees_with_a_plain_computation(usual):
    root, study, _ = usual
    errors = []
    for seed in study.seeds:
        with np.load(root / f"cells/big_pool/seed-{seed}/predictions.npz") as arrays:
            probabilities, labels = arrays["test_probabilities"].astype(float), arrays["test_labels"]
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        sure, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
        error = 0.0
        for low in np.arange(15) / 15:
            some = (sure >= low) & (sure < low + 1 / 15)
            if some.any():
                error += some.mean() * abs(sure[some].mean() - right[some].mean())
        errors.append(error)
    row = {one[0]: one for one in pages.build(study, results.gather(study, root))["errors"]["calibration"].rows}
    assert row["big_pool"][-1] == f"{100 * np.mean(errors):.1f}"


def test_the_design_is_checked(tmp_path):
    study = fabricate.study(("baseline", "two_at_once", "longer", "near"), seeds=(0,))
    object.__setattr__(study.variants["longer"].train, "epochs", 12)
    two = study.variants["two_at_once"]
    object.__setattr__(two.model, "activation", "tanh")
    prepare(tmp_path, study, pictures=100)
    material = results.gather(study, tmp_path)
    delta = material.results["variants"]["near"]["delta"]
    material.results["variants"]["near"]["delta"] = delta | {"mean": 0.001}
    told = dict(pages.build(study, material)["checks"])
    names = {name: text for name, text in told.items() if "one setting" in text}
    assert list(names) == ["two_at_once, longer"]
    assert told["longer"].startswith("trained for 12 epochs") and "the budget is part of the change" in told["longer"]
    assert any("near" in name and "100 test pictures can't tell so small" in text for name, text in told.items())
    delta |= {"mean": 0.001, "verdict": "indistinguishable", "ci95": [-0.01, 0.012], "p_adjusted": 0.8}
    material.results["variants"]["near"]["delta"] = delta
    told = dict(pages.build(study, material)["checks"])
    assert "100 test pictures are too few" in told["near"]
    material.results["variants"]["near"]["delta"] = delta | {"seeds_needed": 40}
    told = dict(pages.build(study, material)["checks"])
    assert not any("near" in name and "test pictures" in text for name, text in told.items())


def test_layers_that_differ_from_the_reference_are_marked(tmp_path):
    study = fabricate.study(("baseline", "other"), seeds=(0,))
    prepare(tmp_path, study)
    path = tmp_path / "plan/networks/other.json"
    network = json.loads(path.read_text())
    network["layers"][0]["detail"] = "5×5, same"
    network["layers"].insert(1, network["layers"][0] | {"name": "extra", "type": "Dropout", "parameters": 0})
    path.write_text(json.dumps(network))
    table = pages.build(study, results.gather(study, tmp_path))["layers"]["other"]
    assert list(table.columns)[-1] == "Against baseline"
    assert [row[-1] for row in table.rows] == ["differs", "new", "–"]
    base = pages.build(study, results.gather(study, tmp_path))["layers"]["baseline"]
    assert "Against baseline" not in base.columns


def test_a_small_network_has_not_lost_all_parameters(usual):
    root, study, _ = usual
    material = results.gather(study, root)
    material.results["variants"]["baseline"]["parameters"] = 542_230
    material.results["variants"]["no_dropout"]["parameters"] = 1_995
    page = pages.build(study, material)
    texts = {finding["variant"]: finding["text"] for finding in page["findings"]}
    assert "with 99.6\xa0% fewer parameters" in texts["no_dropout"]
    assert ["1,995", "−99.6\xa0%"] in page["variants"].rows[1]


def test_how_many_seeds_would_tell_is_said(usual):
    root, study, _ = usual
    material = results.gather(study, root)
    one = material.results["variants"]["no_dropout"]
    one["delta"] = {"mean": 0.004, "ci95": [-0.01, 0.018], "p_adjusted": 0.3, "verdict": "indistinguishable"}
    for needed, told in ((17, "about 17 seeds would tell"), (None, "no number of seeds would tell")):
        one["delta"]["seeds_needed"] = needed
        texts = {finding["variant"]: finding["text"] for finding in pages.build(study, material)["findings"]}
        assert told in texts["no_dropout"] and "8 % more parameters" in texts["no_dropout"].replace("\xa0", " ")


def test_a_study_of_many_variants_shows_the_telling_ones(tmp_path):
    names = [f"v{number}" for number in range(14)]
    study = fabricate.study(names, seeds=(0, 1))
    fabricate.write(tmp_path, study, classes=3, pictures=60, skill={"v5": 1, "v9": 8}, diverged=[("v7", 0)])
    plan = tmp_path / "plan/networks/v3.json"
    network = json.loads(plan.read_text())
    network["layers"][0]["detail"] = "5×5, same"
    plan.write_text(json.dumps(network))
    evaluation.evaluate(study, tmp_path)
    material = results.gather(study, tmp_path)
    ranked = figures._ranked(study, material)
    assert ranked[0] == "v0" and {"v5", "v9"} <= set(ranked[1:4]) and ranked[-1] == "v7"
    shown, which = figures.telling(study, material, 12)
    assert shown == [name for name in names if name in ranked[:12]]
    assert which.startswith(" 12 of 14 variants: the baseline, the best on validation, and those whose test accuracy")
    # One picture of the network that all but v3 have.
    assert {name: set(same) for name, same in figures._networks(study, material).items()} == {
        "v0": set(names) - {"v0", "v3"},
        "v3": set(),
    }
    write_report(study, tmp_path)
    _, html, markdown = reports(tmp_path)
    drawn = {path.stem for path in (tmp_path / "reports/figures").glob("network_*.png")}
    assert drawn == {"network_v0", "network_v3"}
    for text in (html, markdown):
        assert text.count("12 of 14 variants") == 2 and "Also the network of v" in text


def test_a_study_of_hundreds_of_variants_stays_readable(tmp_path):
    names = [f"v{number}" for number in range(90)]
    study = fabricate.study(names, seeds=(0, 1))
    fabricate.write(tmp_path, study, classes=3, pictures=30, epochs=2, skill={"v5": 1, "v80": 8})
    evaluation.evaluate(study, tmp_path)
    material = results.gather(study, tmp_path)
    for make in (figures.accuracy, figures.difference, figures.gap):
        figure, _, _, caption = make(study, material)
        assert figure.get_size_inches()[1] < 25 and f"{figures.ROWS} of 90 variants" in caption
        labels = {label.get_text() for label in figure.axes[0].get_yticklabels()}
        assert {"v5", "v80"} <= labels and len(labels) <= figures.ROWS
    page = pages.build(study, material)
    assert len(page["variants"].rows) == 90 and len(page["cells"].rows) == 180  # nothing is lost
    for name in ("classes", "probabilities"):
        assert len(page["errors"][name].columns) == 1 + figures.DISTINCT
        assert f"{figures.DISTINCT} of 90 variants" in page["errors"][name].note


def test_no_two_of_many_variants_look_alike():
    study = fabricate.study([f"v{number}" for number in range(100)], seeds=(0,))
    assert len({repr(figures._looks(study, name)) for name in study.variants}) == 100


def test_drawings_of_many_networks_have_an_end(tmp_path, monkeypatch):
    study = fabricate.study([f"v{number}" for number in range(13)], seeds=(0,))
    fabricate.write(tmp_path, study, classes=3, pictures=30, skill={"v8": 1})
    for number, path in enumerate(sorted((tmp_path / "plan/networks").iterdir())):
        network = json.loads(path.read_text())
        network["layers"][0]["parameters"] = number
        path.write_text(json.dumps(network))
    evaluation.evaluate(study, tmp_path)
    material = results.gather(study, tmp_path)
    assert len(figures._networks(study, material)) == 13
    monkeypatch.setattr(figures, "BOXES", 7)  # each has two
    assert list(figures._networks(study, material)) == figures._ranked(study, material)[:3]
