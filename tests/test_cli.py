"""The `ablab` command, as a user types it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import TINY, environment, new_project, passed, run, write_params
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return new_project(tmp_path_factory.mktemp("cli") / "project")


def test_studies_lists_the_ready_made_ones(folder: Path):
    output = passed(run(folder, "ablab", "studies"))
    assert "quickstart" in output
    assert "fashion_layers" in output


def test_use_switches_and_refuses_to_drop_edits(folder: Path):
    passed(run(folder, "ablab", "use", "quickstart"))
    assert (folder / "params.yaml").read_bytes() == (folder / "studies/quickstart.yaml").read_bytes()
    passed(run(folder, "ablab", "use", "fashion_layers"))  # a ready-made study is no edit

    write_params(folder, TINY | {"seeds": [5]})
    edited = (folder / "params.yaml").read_bytes()
    refused = run(folder, "ablab", "use", "quickstart")
    assert refused.returncode == 1
    assert "params.yaml has edits that are not committed" in refused.stderr
    assert (folder / "params.yaml").read_bytes() == edited
    passed(run(folder, "ablab", "use", "quickstart", "--force"))

    unknown = run(folder, "ablab", "use", "quickstrat")
    assert unknown.returncode == 1
    assert "scenes_squeezenet, or a study's file. Found: quickstrat." in unknown.stderr
    write_params(folder, TINY)


@pytest.fixture(autouse=True)
def tiny(folder: Path) -> None:
    """Each test starts with the tiny study as the current one."""
    write_params(folder, TINY)


def test_outside_a_project_it_says_so(tmp_path: Path):
    for arguments in (["studies"], ["use", "quickstart"], ["plan"]):
        done = run(tmp_path, "ablab", *arguments)
        assert done.returncode != 0
        assert "Expected a folder of an Ablation Lab project. Found: no dvc.yaml there or above." in done.stderr


def test_ui_says_when_its_port_is_in_use(folder: Path):
    with socket.create_server(("127.0.0.1", 5732)):
        done = run(folder, "ablab", "ui", "--port", "5732")
    assert done.returncode == 1
    assert "--port: Expected a free port. Found: 5732 is in use. Try --port 5733." in done.stderr


def test_a_stage_outside_the_environment_says_what_to_do(folder: Path):
    outside = [sys.executable, "-S", "-m", "stages.report"]  # a Python without its packages
    done = run(folder, *outside)
    assert done.returncode == 1
    assert "Call `source .venv/bin/activate` first." in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_in_json_needs_no_data(folder: Path):
    done = run(folder, "ablab", "plan", "--json")
    planned = json.loads(passed(done))
    assert (planned["study"], planned["baseline"]) == ("tiny", "baseline")
    assert planned["cells"] == ["baseline-0", "baseline-1", "no_dropout-0", "no_dropout-1"]
    facts = planned["variants"]["no_dropout"]
    assert facts["differences"] == [{"path": "model.dropout", "baseline": 0.25, "variant": 0.0}]
    assert facts["parameters"] == sum(layer["parameters"] for layer in facts["layers"])
    assert set(facts) == {
        *("parameters", "trainable_parameters", "macs", "differences", "layers", "lints", "plan_hash"),
    }
    assert not (folder / "data").exists()


def test_plan_for_people_and_from_a_folder_below(folder: Path):
    output = passed(run(folder / "studies", "ablab", "plan"))
    assert "model.dropout: 0.25 → 0.0" in output
    assert "4 of 4 cells to train" in output
    assert "early stopping" not in output


def test_plan_names_weights_that_are_still_to_come_and_that_early_stopping_saves_time(folder: Path, tmp_path: Path):
    places = {"KERAS_HOME": str(tmp_path / "keras"), "ABLAB_CACHE": str(tmp_path), "ABLAB_DATA_MIRROR": ""}
    output = passed(run(folder, "ablab", "plan", "--params", "studies/scenes_squeezenet.yaml", **places))
    assert "one after another, phase two as with dense256; less where early stopping ends a training." in output
    address = "https://github.com/rcmalli/keras-squeezenet/releases/download/v1.0/"
    name = "squeezenet_weights_tf_dim_ordering_tf_kernels_notop.h5"
    assert f"{name} is not there yet: `dvc repro` gets it from {address}{name}, unless it is in weights/" in output


def test_a_plan_that_cannot_be_trained_ends_with_status_2(folder: Path, tmp_path: Path):
    write_params(tmp_path, TINY | {"seeds": []})
    done = run(folder, "ablab", "plan", "--params", str(tmp_path / "params.yaml"), "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "seeds: Expected at least 1 item" in done.stderr
    assert "Traceback" not in done.stderr


MISTAKES = """\
study: {name: mistakes, baseline: baseline}
data: {dataset: digits, path: null, split: {test: 0.2}}
model:
  builder: cnn
  activation: rellu
  pool: 1
  blocks:
    block1: {filters: 2}
    block2: {filters: 2, activation: relu}
train:
  optimizer: {name: sgd, momentum: 0.9}
seeds: [0]
variants:
  baseline: {}
  plain: {model: {activation: relu}, train: {optimizer: {nesterov: no}}}
  residual:
    model:
      activation: relu
      initializer: constant
  flipped: {model: {activation: relu}, input: {augment: {RandomFlip: {mode: horizonal}}}}
  decayed:
    model: {activation: relu}
    train: {optimizer: {learning_rate: {name: CosineDecay, initial_learning_rate: -1, decay_steps: 9}}}
  lost:
    model: {activation: relu}
    train: {loss: categorical_crosentropy}
  idle:
    model: {activation: relu}
    input: {augment: {RandomRotation: {factor: 0}}}
"""


def test_mistakes_that_keras_does_not_find_have_the_line_and_the_key_that_the_user_wrote(folder: Path, tmp_path: Path):
    (tmp_path / "params.yaml").write_text(MISTAKES)
    done = run(folder, "ablab", "plan", "--params", str(tmp_path / "params.yaml"))
    assert done.returncode == 2
    told = done.stderr.replace(str(tmp_path / "params.yaml"), "params.yaml")
    for line in (
        "line 5: model.activation (in variants.baseline): Expected a Keras activation. Found: rellu. Did you mean",
        'line 15: variants.plain.train.optimizer.nesterov: Expected true or false. Found: "no". Write false:',
        "line 19: variants.residual.model.initializer: Expected a Keras initializer that fills a kernel without arg",
        "line 20: variants.flipped.input.augment.RandomFlip.mode: Expected horizontal, vertical or horizontal_and_v",
        "line 23: variants.decayed.train.optimizer.learning_rate.initial_learning_rate: Expected a number of at lea",
        "line 26: variants.lost.train.loss: Expected a Keras loss. Found: categorical_crosentropy. Did you mean",
        "line 29: variants.idle.input.augment.RandomRotation: Expected arguments with which it changes pictures.",
    ):
        assert f"params.yaml, {line}" in told, told
    assert "Did you mean constant?" not in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_predict_needs_a_trained_cell_then_predicts_pictures_of_any_size(folder: Path, tmp_path: Path):
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(picture)
    early = run(folder, "ablab", "predict", "--variant", "baseline", str(picture))
    assert early.returncode == 1
    assert "Run `dvc repro` to make it." in early.stderr

    passed(run(folder, "dvc", "repro", "train@baseline-0"))
    output = passed(run(folder, "ablab", "predict", "--variant", "baseline", "--json", str(picture), str(picture)))
    first, second = json.loads(output)
    assert first == second
    assert (first["image"], first["variant"], first["seed"]) == (str(picture), "baseline", 0)
    assert list(first["probabilities"]) == [str(digit) for digit in range(10)]
    assert sum(first["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert first["label"] == max(first["probabilities"], key=first["probabilities"].get)
    assert f"{picture}: {first['label']} " in passed(
        run(folder, "ablab", "predict", "--variant", "baseline", str(picture))
    )
    wrong = run(folder, "ablab", "predict", "--variant", "basline", str(picture))
    assert wrong.returncode == 1
    assert "--variant: Expected one of baseline, no_dropout. Found: basline." in wrong.stderr


def test_ui_serves_the_studys_store_on_the_loopback_address(folder: Path):
    port = 5731
    server = subprocess.Popen(
        ["ablab", "ui", "--port", str(port)],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == f"http://127.0.0.1:{port} (Ctrl-C ends it)\n"
        deadline = time.monotonic() + 60
        while True:
            try:
                search = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name?experiment_name=tiny"
                with urllib.request.urlopen(search, timeout=5) as answer:
                    assert json.load(answer)["experiment"]["name"] == "tiny"
                serving = psutil.Process(server.pid)
                processes = [serving, *serving.children(recursive=True)]
                opened = [one for process in processes for one in process.net_connections()]
                assert {one.laddr for one in opened if one.status == "LISTEN"} == {("127.0.0.1", port)}
                break
            except OSError:
                assert time.monotonic() < deadline, "the UI did not answer"
                time.sleep(0.5)
    finally:
        os.killpg(server.pid, signal.SIGINT)  # what Ctrl-C in a terminal does
        server.communicate(timeout=30)
    assert (folder / "mlruns/mlflow.db").exists()


@pytest.mark.slow
def test_quick_runs_the_whole_study_beside_it_and_says_so(folder: Path):
    output = passed(run(folder, "ablab", "quick"))
    assert "Everything works." in output
    assert not (folder / "reports").exists()
    quick = folder / "quick"
    results = json.loads((quick / "reports/results.json").read_text())
    assert results["study"] == "tiny-quick"
    assert list(results["variants"]) == ["baseline", "no_dropout"]
    for page in ("report.html", "report.md"):
        assert "QUICK CHECK" in (quick / "reports" / page).read_text()
