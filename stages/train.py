"""plan/<variant>.json + data → cells/<variant>/seed-<n>/: one cell, trained and tracked."""

import sys
from pathlib import Path

from ablation_lab import errors, training


def main(variant: str, seed: int) -> None:
    training.run_cell(variant, seed, Path())


if __name__ == "__main__":
    with errors.explained():
        main(sys.argv[1], int(sys.argv[2]))
