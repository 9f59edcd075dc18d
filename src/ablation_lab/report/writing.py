"""The report as a whole."""

from pathlib import Path

from ablation_lab import files
from ablation_lab.params import Params
from ablation_lab.report import exports, figures, pages, provenance, results


def write_report(study: Params, root: Path = Path()) -> str:
    """Write `reports/`: results.json, timings.json, provenance.json, figures, tables, report.md and report.html.

    Args:
        study: the study whose `evaluation/`, plan, data card and timings are read.
        root: the project's root, where they are and where `reports/` goes.

    Returns:
        the table of variants as plain text.

    Raises:
        LabError: when a result of an earlier stage is missing.
    """
    material = results.gather(study, root)
    page = pages.build(study, material)
    with files.whole(root / "reports") as out:
        files.write_json(out / "results.json", material.results)
        files.write_json(out / "timings.json", material.timings)
        files.write_json(out / "provenance.json", provenance.gather(study, material, root))
        exports.write_tables(page, out / "tables")
        (out / "tables/numbers.csv").write_text(exports.numbers(material.results), encoding="utf-8", newline="\n")
        drawn = figures.draw(study, material, out / "figures")
        (out / "report.md").write_text(pages.markdown(page, drawn), encoding="utf-8")
        (out / "report.html").write_text(pages.html(page, drawn, out), encoding="utf-8")
    return pages.text_table(page)
