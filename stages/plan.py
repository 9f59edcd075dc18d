"""params.yaml → plan/<variant>.json: every variant resolved, built, sized and checked before anything is trained."""

import sys
from pathlib import Path

from ablation_lab import backend, errors, files, params, plan


def main() -> None:
    study = params.load()
    backend.use_cpu_only()
    card = files.read_json(Path("data/processed/card.json"))
    described = plan.describe(study, tuple(card["image_shape"]), len(card["classes"]))
    plan.write(study, described)
    for name, facts in described.items():
        print(f"{name}: {facts['parameters']:,} parameters, {facts['macs']:,} multiply-accumulates")
        for lint in facts["lints"]:
            print(f"warning: {lint}", file=sys.stderr)


if __name__ == "__main__":
    with errors.explained():
        main()
