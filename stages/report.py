"""`evaluation/`, plan and data card → `reports/`: results, figures, Markdown, HTML."""

from ablation_lab import errors


def main() -> None:
    from ablation_lab import params, selection
    from ablation_lab.report.writing import write_report

    print(write_report(selection.both_phases(params.load())))
    print("\nReport: reports/report.html")


if __name__ == "__main__":
    with errors.explained():
        main()
