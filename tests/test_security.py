"""What comes from elsewhere can't run code here, nothing calls home, and what is installed is audited.

What a linter sees is in pyproject.toml's `S` rules; here is what it can't see.
"""

import ast
import json
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import one_thread  # noqa: F401
import pytest
from conftest import ROOT, TINY, passed, run
from ruamel.yaml import YAML

from ablation_lab import cell, evaluation, models, params
from ablation_lab.backend import keras
from ablation_lab.errors import LabError
from ablation_lab.tracking import ablab_network

SOURCES = [*sorted((ROOT / "src").rglob("*.py")), *sorted((ROOT / "stages").glob("*.py"))]
UNPICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def name_of(node: ast.expr) -> str:
    return ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_what_is_loaded_is_loaded_without_code(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(one.name for one in node.names)]
            assert not UNPICKLING & {name.partition(".")[0] for name in names}
        if isinstance(node, ast.Call):
            called = name_of(node.func)
            safe = {keyword.arg: name_of(keyword.value) for keyword in node.keywords}
            if called == "np.load":
                assert safe.get("allow_pickle") == "False", f"{path.name}, line {node.lineno}"
            if called.startswith("keras.") and called.rpartition(".")[2] in ("load_model", "deserialize_keras_object"):
                assert safe.get("safe_mode") == "True", f"{path.name}, line {node.lineno}"
            assert "enable_unsafe_deserialization" not in called
            if called == "YAML":
                assert safe.get("typ") == "'safe'" or path.name == "knockout.py", f"{path.name}, line {node.lineno}"


class Attack:
    """Makes a file where it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_pickled_predictions_are_refused(tmp_path: Path):
    arrays = {name: np.zeros((2, 3)) for name in evaluation.ARRAYS}
    arrays["test_probabilities"] = np.array([Attack(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "predictions.npz", **arrays)
    with np.load(tmp_path / "predictions.npz", allow_pickle=True) as file:  # it would have worked
        assert file["test_probabilities"] is not None and (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    with pytest.raises(LabError, match=r"predictions\.npz: Expected the arrays"):
        evaluation._predictions(tmp_path / "predictions.npz", 3)
    assert not (tmp_path / "ran").exists()


def trained(folder: Path) -> keras.Model:
    network = models.build(params.validate(TINY).baseline.resolved()["model"], "unit", (8, 8, 1), 10)
    network.save_weights(folder / cell.WEIGHTS)
    (folder / cell.ARCHITECTURE).write_text(network.to_json())
    return network


def test_a_cells_network_is_loaded_and_a_broken_one_is_told(tmp_path: Path):
    network = trained(tmp_path)
    assert models.load(tmp_path, "cnn").to_json() == network.to_json()
    (tmp_path / cell.WEIGHTS).write_bytes(b"broken")
    with pytest.raises(LabError, match=r"network\.weights\.h5: Expected what Keras has written"):
        models.load(tmp_path, "cnn")
    (tmp_path / cell.WEIGHTS).unlink()
    with pytest.raises(LabError, match=r"network\.weights\.h5: Expected a result of an earlier stage"):
        models.load(tmp_path, "cnn")


def test_code_in_an_architecture_is_refused(tmp_path: Path, monkeypatch):
    trained(tmp_path)
    ran = tmp_path / "ran"
    monkeypatch.setenv("RAN", str(ran))
    inputs = keras.Input((2,))
    code = keras.layers.Lambda(lambda x: [open(__import__("os").environ["RAN"], "w").close(), x][1])  # noqa: PTH123
    hidden = keras.Model(inputs, code(inputs))
    assert '"__lambda__"' in hidden.to_json()
    ran.unlink()
    keras.saving.deserialize_keras_object(json.loads(hidden.to_json()), safe_mode=False)
    ran.unlink()  # it would have worked

    (tmp_path / cell.ARCHITECTURE).write_text(hidden.to_json())
    with pytest.raises(LabError, match=r"architecture\.json: Expected what Keras has written, without code in it"):
        models.load(tmp_path, "cnn")
    hidden.save(tmp_path / "model.keras")
    ran.unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"safe_mode|unsafe"):
        ablab_network._load_pyfunc(str(tmp_path / "model.keras"))
    assert not ran.exists()


@pytest.mark.parametrize(
    "function",
    [
        {"module": "os", "class_name": "system", "config": "true", "registered_name": None},
        {"module": "builtins", "class_name": "function", "config": "eval", "registered_name": "function"},
        {"module": "shutil", "class_name": "rmtree", "config": {"path": "x"}, "registered_name": None},
    ],
)
def test_an_architecture_names_no_functions_of_other_modules(tmp_path: Path, function: dict):
    trained(tmp_path)
    described = json.loads((tmp_path / cell.ARCHITECTURE).read_text())
    layer = next(one for one in described["config"]["layers"] if one["class_name"] == "Activation")
    layer["config"]["activation"] = function
    (tmp_path / cell.ARCHITECTURE).write_text(json.dumps(described))
    with pytest.raises(LabError, match=r"architecture\.json: Expected what Keras has written"):
        models.load(tmp_path, "cnn")


def test_nothing_calls_home():
    settings = (ROOT / ".dvc/config").read_text()
    assert "analytics = false" in settings and "check_update = false" in settings
    assert "export DVC_NO_ANALYTICS := 1" in (ROOT / "Makefile").read_text()
    code = (
        "import os, ablation_lab.tracking\n"
        "from mlflow.telemetry.utils import is_telemetry_disabled\n"
        "print(is_telemetry_disabled())\n"
        "os.environ.pop('MLFLOW_DISABLE_TELEMETRY')\n"
        "print(is_telemetry_disabled())"
    )
    told = passed(run(ROOT, "python", "-c", code))
    assert told.split() == ["True", "False"]  # without the variable it would


def test_every_server_of_ours_listens_on_the_loopback_address():
    """`ablab ui` is asked itself in test_cli.py."""
    for path in SOURCES:
        assert not re.search(r"0\.0\.0\.0|\"::\"|INADDR_ANY", path.read_text()), path


class Advisories(BaseHTTPRequestHandler):
    """OSV, as far as pip-audit asks it."""

    weak: str | None = None

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]["name"]
        vulnerable = {"id": "GHSA-xxxx-yyyy-zzzz", "aliases": ["CVE-2030-1"], "summary": "bad", "details": "bad"}
        vulnerable["affected"] = [{"package": {"name": asked, "ecosystem": "PyPI"}, "ranges": []}]
        body = json.dumps({"vulns": [vulnerable]} if asked == self.weak else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def advisories():
    Advisories.weak = None
    server = ThreadingHTTPServer(("127.0.0.1", 0), Advisories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/query"
    server.shutdown()
    server.server_close()


def audited(project: Path, url: str) -> subprocess.CompletedProcess[str]:
    return run(project, "python", str(project / ".ci/audit.py"), str(project / "few.lock"), AUDIT_URL=url)


def test_the_audit_fails_for_what_is_known_and_only_for_that(tmp_path: Path, advisories: str):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci/audit.py").write_bytes((ROOT / ".ci/audit.py").read_bytes())
    project = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(project)
    few = re.findall(r"^(?:filelock|tqdm)==.*(?:\n    .*)*", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert len(few) == 2
    (tmp_path / "few.lock").write_text("\n".join(few) + "\n")

    done = audited(tmp_path, advisories)
    assert done.returncode == 0, done.stderr
    assert "0 known vulnerabilities in 2 packages" in done.stdout
    Advisories.weak = "tqdm"
    done = audited(tmp_path, advisories)
    assert done.returncode == 1
    assert re.search(
        r"audit: tqdm [\d.]+: (GHSA-xxxx-yyyy-zzzz, CVE-2030-1|CVE-2030-1, GHSA-xxxx-yyyy-zzzz), fixed in no",
        done.stderr,
    )
    accepted = '[tool.audit.accepted]\nGHSA-xxxx-yyyy-zzzz = "2030-01-01: progress bars are not reached from outside"\n'
    (tmp_path / "pyproject.toml").write_text(project.replace("[tool.audit.accepted]\n", accepted))
    assert audited(tmp_path, advisories).returncode == 0
    done = audited(tmp_path, "http://127.0.0.1:9/v1/query")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 1
    assert "the advisory service can't be reached, so nothing was checked" in done.stdout
    (tmp_path / "few.lock").write_text("not a lock file ==\n")
    assert audited(tmp_path, advisories).returncode == 1


def test_what_is_accepted_has_a_date_and_a_reason():
    import tomllib

    accepted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["audit"]["accepted"]
    for name, reason in accepted.items():
        assert re.match(r"20\d\d-\d\d-\d\d: .{20}", reason), name


def test_ci_audits_what_it_has_tested():
    steps = (ROOT / ".ci/run").read_text().splitlines()
    assert steps.index("make test") < steps.index("make audit")


def test_yaml_makes_no_objects(tmp_path: Path):
    (tmp_path / "params.yaml").write_text(f"a: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'ran'}]\n")
    with pytest.raises(LabError, match="Expected valid YAML"):
        params.load(tmp_path / "params.yaml")
    assert YAML(typ="safe", pure=True).load("a: 1") == {"a": 1} and not (tmp_path / "ran").exists()
