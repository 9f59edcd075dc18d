"""Where MLflow's store is, and how it is opened."""

import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import mlflow
from filelock import FileLock
from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES, MLFLOW_HTTP_REQUEST_TIMEOUT
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from ablation_lab import files
from ablation_lab.errors import LabError

FOLDER, ARTIFACTS = "mlruns", "artifacts"
SQLITE = "sqlite:///"

# MLflow's own defaults, 120 s and 7 retries, wait many minutes for a server that is down. These are defaults as well:
# the variables of the same names come first.
MLFLOW_HTTP_REQUEST_TIMEOUT.default, MLFLOW_HTTP_REQUEST_MAX_RETRIES.default = 30, 2
ANSWERS = 10  # seconds that a server has for its first answer, where MLFLOW_HTTP_REQUEST_TIMEOUT is not set

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.ERROR)  # they tell of every table that they make
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks of what is raised as well


def uri() -> str:
    """`MLFLOW_TRACKING_URI` when set, else the sqlite database under the root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{(files.root() / FOLDER / 'mlflow.db').resolve()}"


def is_server() -> bool:
    """Whether the store is reached over the network, and not a database here."""
    return files.is_url(uri())


def masked(text: str) -> str:
    """A text without the passwords and tokens of the addresses in it: after a user's name, in its place in an address
    of the web, and in the query."""
    text = re.sub(r"(?i)\b(https?://)[^\s/:@]+:?@", r"\1***@", text)
    text = re.sub(r"(?i)([?&](?:[\w-]*password|passwd|pwd|[\w-]*token|[\w-]*secret)=)[^\s&]*", r"\1***", text)
    return re.sub(r"(\w://[^\s/:@]*):[^\s/]*@", r"\1:***@", text)


def where(root: Path, quick: bool) -> str:
    """Where the runs of a project can be seen, as the end of a sentence.

    Args:
        quick: whether the project is the one of `ablab quick`, in a folder of its own.
    """
    if is_server():
        return f"on the server {masked(uri())}"
    folder = f"cd {root.resolve().name} && " if quick else ""
    return f"`{folder}ablab ui` shows them"


def lock(name: str) -> FileLock:
    """A lock between the processes of this project."""
    path = files.root() / FOLDER / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path)


def connect() -> MlflowClient:
    """Connect to the store; whoever comes first makes it.

    Several processes that open a missing database at once break it for good, and so does a death while its tables are
    made: hence the lock, and a name that it gets when it is whole. Write-ahead logging lets processes write side by
    side afterwards; the setting stays in the file.
    """
    if is_server():
        _knock()
    if not uri().startswith(SQLITE):
        return MlflowClient(uri(), uri())
    database = Path(uri().removeprefix(SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(database.with_suffix(".lock")):
        if not database.exists():
            part = database.with_suffix(".part")
            part.unlink(missing_ok=True)
            MlflowClient(f"{SQLITE}{part}", f"{SQLITE}{part}").search_experiments(max_results=1)  # makes the tables
            with closing(sqlite3.connect(part)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
            for log in ("-wal", "-shm"):  # of a database that was removed: SQLite would play it into the new one
                database.with_name(database.name + log).unlink(missing_ok=True)
            part.rename(database)
        follow(database, database.parent / ARTIFACTS)
    return MlflowClient(uri(), uri())


def _knock() -> None:
    """Ask the server, and so the database behind it, for something small, once: MLflow itself would wait and try again
    for minutes."""
    patience = MLFLOW_HTTP_REQUEST_TIMEOUT.get() if MLFLOW_HTTP_REQUEST_TIMEOUT.is_set() else ANSWERS
    http_request(
        get_default_host_creds(uri()),
        "/api/2.0/mlflow/experiments/search",
        "POST",
        json={"max_results": 1},
        timeout=patience,
        max_retries=0,
        raise_on_status=False,
    )


@contextmanager
def as_mlflows_own() -> Iterator[None]:
    """The store as the one that MLflow's functions use where they take none."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri())
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]  # None is as before the first call


def open_store(experiment: str) -> tuple[MlflowClient, str]:
    """Connect to the store and find the study's experiment, or make it.

    Returns:
        The client and the experiment's id.
    """
    client = connect()
    found = client.get_experiment_by_name(experiment)
    if found is None:
        # Without the kind, MLflow's page asks whether it is about language models.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return client, client.create_experiment(experiment, _artifacts(experiment), tags)
        except MlflowException as error:
            found = client.get_experiment_by_name(experiment)  # another process may have come first
            if found is None:
                raise error
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return client, found.experiment_id


def _artifacts(experiment: str) -> str | None:
    """Where an experiment's artifacts go: a server knows, and those of a database lie beside it."""
    if is_server():
        return None
    here = Path(uri().removeprefix(SQLITE)).parent if uri().startswith(SQLITE) else files.root() / FOLDER
    return (here.absolute() / ARTIFACTS / experiment).as_uri()


# Where MLflow keeps absolute places of artifacts.
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
    ("model_versions", "source"),
)


def follow(database: Path, artifacts: Path) -> None:
    """Make a database that was moved or copied find the artifacts beside it.

    Args:
        database: MLflow's, which holds the places of artifacts as they were when they were written.
        artifacts: the folder where those that lay beside the database are now.
    """
    with closing(sqlite3.connect(database)) as connection:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
            return
        rows = connection.execute("SELECT name, artifact_location FROM experiments").fetchall()
        suffixes = ((place, f"/{artifacts.name}/{name}") for name, place in rows)
        places = {place.removesuffix(suffix) for place, suffix in suffixes if place and place.endswith(suffix)}
        here = artifacts.parent.absolute().as_uri()
        for old in places - {here}:
            for table, column in PLACES:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (here, len(old) + 1, len(old) + 1, f"{old}/"),
                )
        connection.commit()


# What SQLite and the operating system say of a database of the project's own.
REMEDIES = {
    "database is locked": "Another program writes into it: end that. ",
    "not a database|malformed": "Put a copy of the file back, or move it away: it is made again from DVC's files. ",
    "disk is full|No space left|quota": "Remove files, or move the project to a larger disk. ",
    "readonly|[Rr]ead-only|unable to open|[Pp]ermission": "Make its folder writable (mount options, permissions). ",
    "ReadTimeout|Read timed out": "The server accepts connections and does not answer: see its log, or give it longer "
    "(MLFLOW_HTTP_REQUEST_TIMEOUT, in seconds). ",
    "refused|timed out|Max retries": "Start the server, or see what MLFLOW_TRACKING_URI names. ",
}


@contextmanager
def explained() -> Iterator[None]:
    """Trouble with the store as an error that names it."""
    try:
        yield
    except LabError:
        raise
    except Exception as error:
        remedy = next((remedy for words, remedy in REMEDIES.items() if re.search(words, str(error))), "")
        raise LabError(
            f"{masked(uri())}: Expected MLflow's store. Found: {first_line(error)}. {remedy}"
            "Call `ablab sync` when it works again. Cells and reports are as they were."
        ) from error


def first_line(error: Exception) -> str:
    """An error's kind and the line that says most: what the database has said, where there is one. No passwords."""
    lines = str(error).splitlines() or [""]
    said = next((line for line in lines if line.startswith("(sqlite3.")), lines[0])
    return masked(f"{type(error).__name__}: {said}")[:300]
