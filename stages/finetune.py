"""selection/<variant>.json + the selected variant's weights + data → cells/<variant>/seed-<n>/: a cell of phase two."""

import sys

from ablation_lab import errors


def main(variant: str, seed: int) -> None:
    from ablation_lab import runner

    runner.run_cell(variant, seed)


if __name__ == "__main__":
    with errors.explained(advice=errors.OTHER_CELLS):
        main(sys.argv[1], int(sys.argv[2]))
