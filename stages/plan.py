"""params.yaml → plan/<variant>.json: every variant resolved, built, sized and checked before anything is trained."""

import sys
from pathlib import Path

from ablation_lab import errors


def main() -> None:
    from ablation_lab import backend, files, params, plan

    study = params.load()
    backend.use_cpu_only()
    card = files.read_json(Path("data/processed/card.json"))
    plan.check_names(study, card["classes"])
    plan.fetch_weights(study)
    image_shape, classes, pictures = tuple(card["image_shape"]), len(card["classes"]), sum(card["counts"].values())
    described, second = plan.describe_both(study, image_shape, classes, pictures=pictures)
    plan.write(study, described, second=second)
    for name, facts in described.items():
        print(f"{name}: {facts['parameters']:,} parameters, {facts['macs']:,} multiply-accumulates")
    for warning in plan.warnings(item for facts in [described, *second.values()] for item in facts.items()):
        print(warning, file=sys.stderr)


if __name__ == "__main__":
    with errors.explained():
        main()
