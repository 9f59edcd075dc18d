"""Predictions of all cells → `evaluation/`."""

from ablation_lab import errors


def main() -> None:
    from ablation_lab import evaluation, params, selection

    evaluation.evaluate(selection.both_phases(params.load()))


if __name__ == "__main__":
    with errors.explained():
        main()
