"""The `ablab` command. Each command imports what it needs when it is called: TensorFlow takes seconds."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from tabulate import tabulate

from ablation_lab import errors, files, params
from ablation_lab.errors import LabError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Ablation studies of image classifiers. The pipeline itself is run by `dvc repro`.",
)


def main() -> None:
    """Entry point: a mistake of the user's ends in a message, not a traceback."""
    with errors.explained(exit_status=2 if "plan" in sys.argv[1:2] else 1):
        app()


def _project() -> Path:
    root = files.root()
    if not (root / "dvc.yaml").exists():
        raise LabError(
            f"{Path.cwd()}: Expected a folder of an Ablation Lab project. Found: no dvc.yaml there or above."
        )
    sys.path.insert(0, str(root))  # networks of the user's are imported from here, as stages do
    return root


@app.command()
def studies() -> None:
    """List the ready-made studies."""
    rows = []
    for path in sorted((_project() / "studies").glob("*.yaml")):
        study = params.load(path)
        variants = [*study.variants, *study.second_names]
        cells = len(variants) * len(study.seeds)
        rows.append([path.stem, study.study.title, study.data.dataset, len(variants), cells])
    print(tabulate(rows, headers=["study", "title", "data", "variants", "cells"]))
    print("\nMake one current with `ablab use STUDY`, then run `dvc repro`.")


@app.command()
def use(
    study: Annotated[str, typer.Argument(help="A name that `ablab studies` lists, or a path of a study file.")],
    force: Annotated[bool, typer.Option("--force", help="Drop edits of params.yaml that are not committed.")] = False,
) -> None:
    """Make a study the current params.yaml."""
    root = _project()
    known = {path.stem: path for path in sorted((root / "studies").glob("*.yaml"))}
    source = known.get(study, Path(study))
    if not source.is_file():
        raise LabError(f"ablab use: Expected one of {', '.join(known)}, or a study's file. Found: {study}.")
    params.load(source)
    current = root / "params.yaml"
    if os.path.lexists(current) and not current.is_file():
        raise LabError("params.yaml: Expected a file. Found: a folder, a pipe or a broken link. Move it away.")
    if current.exists() and current.samefile(source):
        raise LabError(f"ablab use: Expected another file than the current params.yaml. Found: {study}.")
    if current.exists() and not force and _has_edits(current, list(known.values())):
        raise LabError(
            "params.yaml has edits that are not committed. Commit them (`git commit params.yaml`), "
            f"or drop them with `ablab use {study} --force`."
        )
    shutil.copyfile(source, current)
    print(f"params.yaml is now {source.stem}. See what it would train with `ablab plan`, run it with `dvc repro`.")


def _has_edits(current: Path, known: list[Path]) -> bool:
    if any(current.read_bytes() == path.read_bytes() for path in known):
        return False
    git = subprocess.run(["git", "show", "HEAD:./params.yaml"], cwd=current.parent, capture_output=True, check=False)
    return git.returncode != 0 or git.stdout != current.read_bytes()


@app.command()
def plan(
    file: Annotated[Path | None, typer.Option("--params", help="A study's file; the current one by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What would be trained and why, sizes, differences, warnings, minutes. Trains nothing."""
    root = _project()
    study = params.load(file or root / "params.yaml")  # before TensorFlow's import: mistakes are reported at once
    from ablation_lab import backend
    from ablation_lab import plan as planning

    backend.use_cpu_only()
    image_shape, classes, training, pictures, data_digest = planning.pictures(study, root)
    planning.check_names(study, classes)
    described, second = planning.describe_both(study, image_shape, len(classes), root, pictures)
    if as_json:
        print(json.dumps(planning.as_json(study, described, second), indent=1, ensure_ascii=False))
        return
    print(planning.table(study, *planning.rows(study, described, second, training, data_digest, root)))
    if data_digest is None:
        print(f"The data are not there yet: `dvc repro` gets and prepares {study.data.dataset} first.")
    for name, (ready, _) in planning.missing_weights(study).items():
        print(f"{name} is not there yet: `dvc repro` gets it from {ready['url']}, unless it is in weights/ by then.")


@app.command()
def knockout(
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Such as model.blocks.block2, model.blocks or model.dropout."),
    ] = None,
) -> None:
    """Append one leave-one-out variant a component to params.yaml. Without a PATH: list what can be removed.

    A mapping of components, such as model.blocks, model.head or input.augment, makes a variant of each of them.
    model.dropout removes every dropout: of the blocks, the features and the head, also where a layer sets its own.
    model.normalization and model.l2 do so too; model.head_dropout, model.features_dropout and model.head_l2 remove
    theirs alone.
    """
    from ablation_lab import knockout as knocking_out

    study = _project() / "params.yaml"
    print(knocking_out.knock_out(study, paths) if paths else knocking_out.listed(study))


@app.command()
def report(
    partial: Annotated[
        bool, typer.Option("--partial", help="From the cells that are trained and up to date, marked as partial.")
    ] = False,
) -> None:
    """Write reports/partial/ while cells are missing. The whole report is made by `dvc repro`."""
    from ablation_lab.report.partial import write_partial

    if not partial:
        raise LabError("ablab report: Expected --partial. The whole report is made by `dvc repro report`.")
    root = _project()
    print(write_partial(params.load(root / "params.yaml"), root))


@app.command()
def predict(
    images: Annotated[list[Path], typer.Argument(help="Pictures of any size and format that Pillow reads.")],
    variant: Annotated[
        str,
        typer.Option("--variant", help="The variant whose network predicts, or a model in MLflow: models:/…@champion."),
    ],
    seed: Annotated[int | None, typer.Option("--seed", help="The study's first seed by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Class probabilities of pictures."""
    from ablation_lab import prediction

    found = prediction.predict(variant, seed, images, _project())
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for one in found:
        best = sorted(one["probabilities"].items(), key=lambda item: -item[1])[:3]
        print(f"{one['image']}: " + ", ".join(f"{name} {probability:.1%}" for name, probability in best))


@app.command()
def sync() -> None:
    """Make MLflow agree with DVC's files."""
    from ablation_lab.tracking import mirror

    root = _project()
    print(mirror.told(mirror.sync(root), root))


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000) -> None:
    """Open the MLflow UI on this study's store, at 127.0.0.1."""
    from ablation_lab.tracking import runs, store

    root = _project()
    if store.is_server():
        raise LabError(f"MLFLOW_TRACKING_URI: The store is a server: open {store.masked(store.uri())} in a browser.")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise LabError(f"--port: Expected a free port. Found: {port} is in use. Try --port {port + 1}.")
    study = params.load(root / "params.yaml").study.name
    runs.close_orphans(study)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", store.uri()]
    # An entry point of this package's: MLflow's own pages, and the report's links to them.
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--app-name", "ablation-lab"]
    # Without the job runner two processes serve the page instead of ten.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    print(f"http://127.0.0.1:{port} (Ctrl-C ends it)")
    print(f"The variants side by side: http://127.0.0.1:{port}/studies/{study}", flush=True)
    os.execvpe(command[0], command, environment)  # Ctrl-C and signals go to the server itself


@app.command()
def search(
    overrides: Annotated[
        list[str],
        typer.Option("-S", "--set-param", help="KEY=VALUES: 1,2,3 or int(interval(16,256)) or tag(log,interval(a,b))."),
    ],
    trials: Annotated[int, typer.Option("--trials", min=1, help="How many combinations to try in all.")],
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="What the proposals depend on.")] = 0,
) -> None:
    """Search for the values with the best validation accuracy. Each trial is an experiment of DVC's."""
    from ablation_lab import search as searching

    sys.exit(searching.search(_project(), overrides, trials, seed))


@app.command()
def repro(
    jobs: Annotated[
        str, typer.Option("-j", "--jobs", help="Cells at a time; auto: as many as there is room for.")
    ] = "auto",
    engine: Annotated[
        str, typer.Option("--engine", help="local: processes on this machine; ray: a Ray cluster.")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option("--address", help="The cluster's, such as 10.0.0.1:6379; else one is started on this machine."),
    ] = None,
) -> None:
    """What `dvc repro` does, with cells side by side."""
    from ablation_lab import repro as reproducing

    if jobs != "auto" and not (jobs.isdecimal() and int(jobs) > 0):
        raise LabError(f"--jobs: Expected a number of cells, or auto. Found: {jobs}.")
    if engine not in ("local", "ray"):
        raise LabError(f"--engine: Expected local or ray. Found: {engine}.")
    if address and engine == "local":
        raise LabError("--address: Expected --engine ray with it. Found: the engine local.")
    sys.exit(reproducing.repro(_project(), None if jobs == "auto" else int(jobs), engine, address))


@app.command()
def verify(
    cells: Annotated[
        list[str] | None,
        typer.Argument(metavar="CELL", help="Such as no_dropout-0; the baseline with the first seed by default."),
    ] = None,
    all_cells: Annotated[bool, typer.Option("--all", help="Every cell of the study.")] = False,
) -> None:
    """Retrain a cell in a clean place and compare it byte for byte."""
    from ablation_lab import verify as verifying

    sys.exit(verifying.verify(cells or [], _project(), all_cells))


@app.command()
def quick() -> None:
    """Run the whole current study on a sliver of data for one epoch, in the folder quick/: does everything work?"""
    from ablation_lab import quick as quick_check

    sys.exit(quick_check.run(_project()))


if __name__ == "__main__":
    main()
