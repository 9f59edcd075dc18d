"""A cell's network as a model of MLflow's, made from its files without TensorFlow; and the champion."""

import json
import shutil
import tempfile
import warnings
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from mlflow.entities import LoggedModel, LoggedModelOutput, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import Schema, TensorSpec

from ablation_lab import cell
from ablation_lab.errors import LabError
from ablation_lab.tracking import ablab_network, store
from ablation_lab.tracking.live import Identity

with warnings.catch_warnings(action="ignore"):  # about its own type hints
    import mlflow.pyfunc

CHAMPION = "champion"
# Tags of a registered version, by which versions are compared.
SCORE, DATA = "validation_accuracy", "ablab.data_digest"
NAME = "model"


def log(
    client: MlflowClient, experiment: str, run_id: str, identity: Identity, data: dict[str, Any], root: Path
) -> str:
    """Log a cell's network, unless its run has it: raw pictures in, class probabilities out.

    Args:
        data: settings of the study's `data` that say how a picture becomes what the network takes.

    Returns:
        The id of MLflow's model.
    """
    known = client.search_logged_models([experiment], f"source_run_id = '{run_id}'")
    ready = [model.model_id for model in known if model.status == LoggedModelStatus.READY]
    if ready:
        return ready[0]
    model = client.create_logged_model(experiment, NAME, run_id, {"ablab.cell_hash": identity.cell_hash})
    with tempfile.TemporaryDirectory() as place:
        save(Path(place), model, identity, data, root)
        client.log_model_artifacts(model.model_id, f"{place}/model")
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    return model.model_id


def save(place: Path, model: LoggedModel, identity: Identity, data: dict[str, Any], root: Path) -> None:
    """Write the model's folder, `model/`: for pyfunc, loaded by `ablab_network`, and for `mlflow.keras.load_model`."""
    card, settings = identity.card, identity.plan["model"]
    classes, own = card["classes"], ":" in settings["builder"]
    height, width, channels = card["image_shape"]
    any_size = bool(settings.get("any_size"))
    metadata = {
        "classes": classes,
        "image_shape": [height, width, channels],
        "any_size": any_size,
        "data": data,
        "study": identity.study,
        "variant": identity.variant,
        "seed": identity.seed,
        "cell_hash": identity.cell_hash,
    }
    code = place / "code"
    code.mkdir()
    shutil.copy(ablab_network.__file__, code)
    for path in identity.plan.get("code", {}):  # a network of the user's, and what it imports
        (code / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, code / path)
    written = Model(
        artifact_path=model.artifact_location,
        run_id=model.source_run_id,
        model_id=model.model_id,
        model_uuid=model.model_id,
        metadata=metadata,
    )
    written.add_flavor(
        "keras", data="data", keras_version=version("keras"), keras_backend="tensorflow", save_exported_model=False
    )
    shape = (-1, -1, channels) if any_size else (height, width, channels)
    with warnings.catch_warnings(action="ignore"):  # MLflow would like an example of the input beside the signature
        mlflow.pyfunc.save_model(
            place / "model",
            loader_module="ablab_network",
            data_path=str(pack(cell.folder(identity.variant, identity.seed, root), place / "model.keras")),
            code_paths=sorted(str(path) for path in code.iterdir()),
            model_config={"module": settings["builder"].partition(":")[0]} if own else None,
            mlflow_model=written,
            signature=ModelSignature(
                Schema([TensorSpec(np.dtype("uint8"), (-1, *shape), "image")]),
                Schema([TensorSpec(np.dtype("float32"), (-1, len(classes)), "probabilities")]),
            ),
            # Named here, since finding them out would import TensorFlow.
            pip_requirements=[f"{name}=={version(name)}" for name in ("mlflow", "tensorflow", "keras", "numpy")],
        )


def load(uri: str) -> tuple[Any, dict[str, Any]]:
    """A model of MLflow's store that this module has logged.

    Args:
        uri: such as `models:/<study>@champion`, `models:/<study>/<version>` or `runs:/<run>/model`.

    Returns:
        What predicts, uint8 pictures (n, height, width, channels) → probabilities (n, classes), and its metadata.

    Raises:
        LabError: when there is none.
    """
    store.connect()
    try:
        with store.as_mlflows_own():
            model = mlflow.pyfunc.load_model(uri, suppress_warnings=True)
    except (MlflowException, OSError) as error:
        raise LabError(
            f"{uri}: Expected a model in {store.masked(store.uri())}. Found: {store.first_line(error)}."
        ) from None
    about = model.metadata.metadata or {}
    if "cell_hash" not in about:
        raise LabError(f"{uri}: Expected a model that `ablab sync` has logged. Found: one without `cell_hash`.")
    return model, about


def pack(folder: Path, target: Path) -> Path:
    """Make Keras' own file of a cell's architecture and weights, which are its two parts; the same bytes every time."""
    told = {"keras_version": version("keras"), "date_saved": "1980-01-01@00:00:00"}
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr(zipfile.ZipInfo("metadata.json"), json.dumps(told))
        for name, path in (("config.json", cell.ARCHITECTURE), ("model.weights.h5", cell.WEIGHTS)):
            with (
                (folder / path).open("rb") as source,
                archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as out,
            ):
                shutil.copyfileobj(source, out, 2**20)
    return target


def crown(client: MlflowClient, identity: Identity, model_id: str, run_id: str, mean: float) -> None:
    """Register a cell's model under its study's name where it is the best on its data, and let the alias `champion`
    name the best version of the data that the champion is of.

    Only what the versions' own tags hold is compared. Several projects may do this at once: whoever has moved the alias
    looks again, so that the last move is made with all versions in sight.

    Args:
        mean: the variant's validation accuracy over its seeds, by which it was chosen.
    """
    study, digest = identity.study, identity.card["digest"]
    try:
        client.create_registered_model(study)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    best = _best(client, study, digest)
    if best is None or mean > _score(best):
        tags = {"ablab.cell_hash": identity.cell_hash, "ablab.variant": identity.variant}
        tags |= {"ablab.seed": str(identity.seed), DATA: digest, SCORE: repr(mean)}
        text = f"`{identity.variant}`, seed {identity.seed}: the best variant on validation, {mean:.4f} over its seeds."
        source = client.get_logged_model(model_id).artifact_location
        client.create_model_version(study, source, run_id, tags, None, text, model_id=model_id)
    while True:
        aliases = client.get_registered_model(study).aliases
        known = client.get_model_version(study, str(aliases[CHAMPION])).tags.get(DATA) if CHAMPION in aliases else None
        best = _best(client, study, known or digest)
        if best is None or str(aliases.get(CHAMPION)) == str(best.version):
            break
        client.set_registered_model_alias(study, CHAMPION, str(best.version))
    if known != digest:
        print(
            f"MLflow: {study}'s champion, version {aliases[CHAMPION]}, was trained on other data than this project's."
            " Their accuracies can't be compared, so it stays. To make the best on this project's data the champion,"
            f" remove the alias `{CHAMPION}` on MLflow's page and call `ablab sync`."
        )


def _best(client: MlflowClient, study: str, digest: str) -> ModelVersion | None:
    """The version with the highest validation accuracy on some data, of equal ones the oldest."""
    versions = client.search_model_versions(f"name = '{study}'")
    same = [one for one in versions if one.tags.get(DATA) == digest and SCORE in one.tags]
    return max(same, key=lambda one: (_score(one), -int(one.version)), default=None)


def _score(version: ModelVersion) -> float:
    return float(version.tags[SCORE])
