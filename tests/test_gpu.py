"""What needs a real GPU, skipped where there is none: `make gpu`, then `.venv/bin/pytest -m slow tests/test_gpu.py`."""

import json

import numpy as np
import pytest
from conftest import ROOT, passed, run
from test_devices import EVEN, data, pictures  # noqa: F401
from test_killed import content
from test_parallel import both  # noqa: F401
from test_training import STEADY, VARIED, plan_of, train

from ablation_lab import backend, cell, gpu

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not backend.has_gpu(), reason="needs a GPU")]

AVERAGE = {"blocks": {"block1": {"pool_type": "average"}}}  # XLA has no deterministic gradient of the other
WAYS = {
    "plain": {},
    "augmented": VARIED["augmented"],
    "host": {"train": {"data_on": "host"}},
    "half": {"train": {"precision": "mixed_float16"}},
    "xla": {"train": {"xla": True}, "model": AVERAGE},
    "both": {"train": {"xla": True, "precision": "mixed_float16", "data_on": "device"}, "model": AVERAGE},
}
# In a process of its own: TensorFlow keeps the devices that it has begun with.
ON_THE_CPU = """
import json, sys
from pathlib import Path
from ablation_lab import training

training.train(json.loads(sys.argv[1]), 0, Path(sys.argv[2]), Path(sys.argv[3]), "test-0", lambda row: None)
"""


@pytest.mark.parametrize("way", WAYS)
def test_a_training_is_the_same_bytes_twice(data, tmp_path, way):  # noqa: F811
    for name in ("first", "again"):
        train(data, tmp_path / name, **WAYS[way])
    for file in STEADY:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "first" / file).read_bytes(), file
    assert json.loads((tmp_path / "first" / cell.TIMING).read_text())["device"] != "CPU"


def test_a_gpu_computes_what_the_cpu_does(data, tmp_path):  # noqa: F811
    train(data, tmp_path / "gpu", **EVEN)
    (tmp_path / "cpu").mkdir()
    told = json.dumps(plan_of(**EVEN)), str(data), str(tmp_path / "cpu")
    passed(run(ROOT, "python", "-c", ON_THE_CPU, *told, CUDA_VISIBLE_DEVICES="-1"))
    assert json.loads((tmp_path / "cpu" / cell.TIMING).read_text())["device"] == "CPU"
    found = [np.load(tmp_path / name / cell.PREDICTIONS)["test_probabilities"] for name in ("gpu", "cpu")]
    np.testing.assert_allclose(*found, rtol=0.01, atol=1e-4)


def test_cells_share_a_gpu(both):  # noqa: F811
    one, two = map(content, both)
    assert [name for name in one.keys() | two.keys() if one.get(name) != two.get(name)] == []


def test_the_driver_tells_free_memory():
    assert gpu.free_memory() > 0
