"""params.yaml → plan/<variant>.json: every variant resolved, built, sized and checked before anything is trained."""

import sys
from pathlib import Path

from ablation_lab import backend, errors, files, params, plan


def main() -> None:
    study = params.load()
    backend.use_cpu_only()
    card = files.read_json(Path("data/processed/card.json"))
    plan.fetch_weights(study)
    image_shape, classes, pictures = tuple(card["image_shape"]), len(card["classes"]), sum(card["counts"].values())
    described, second = plan.describe_both(study, image_shape, classes, pictures=pictures)
    plan.write(study, described, second=second)
    for name, facts in described.items():
        print(f"{name}: {facts['parameters']:,} parameters, {facts['macs']:,} multiply-accumulates")
    for facts in [described, *second.values()]:
        for lint in dict.fromkeys(lint for one in facts.values() for lint in one["lints"]):
            print(f"warning: {lint}", file=sys.stderr)


if __name__ == "__main__":
    with errors.explained():
        main()
