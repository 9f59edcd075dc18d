"""Predictions of all cells → `evaluation/`."""

from ablation_lab import errors, evaluation, params


def main() -> None:
    evaluation.evaluate(params.load())


if __name__ == "__main__":
    with errors.explained():
        main()
