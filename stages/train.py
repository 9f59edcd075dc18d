"""plan/<variant>.json + data → cells/<variant>/seed-<n>/: one cell, trained and tracked."""

import sys

from ablation_lab import errors


def main(variant: str, seed: int) -> None:
    from ablation_lab import cell, runner

    if result := runner.run_cell(variant, seed):
        cell.write_validation(variant, seed, result)


if __name__ == "__main__":
    with errors.explained(advice=errors.OTHER_CELLS):
        main(sys.argv[1], int(sys.argv[2]))
