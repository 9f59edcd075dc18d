"""Predictions of all cells → `evaluation/`."""

from ablation_lab import errors, evaluation, params, selection


def main() -> None:
    evaluation.evaluate(selection.both_phases(params.load()))


if __name__ == "__main__":
    with errors.explained():
        main()
