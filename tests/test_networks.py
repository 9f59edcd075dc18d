"""A network of the user's in the whole pipeline: what an edit of its file retrains is counted."""

import copy

import pytest
from conftest import TINY, passed, retrained, run


@pytest.mark.slow
def test_an_edit_of_a_users_network_retrains_the_cells_that_use_it(project):
    study = copy.deepcopy(TINY) | {"seeds": [0]}
    nothing = dict.fromkeys(("blocks", "head", "dropout"))
    study["variants"] = {
        "baseline": {},
        "own": {"model": {"builder": "networks.example:build", "filters": 2, **nothing}},
    }
    assert retrained(project, study) == ["baseline-0", "own-0"]
    network = project / "networks/example.py"
    text = network.read_text()
    network.write_text(text + "\n\nSOMETHING = 1\n")
    (project / "networks/other.py").write_text("SOMETHING = 2\n")
    assert retrained(project, study) == ["own-0"]
    network.write_text(text)
    assert retrained(project, study) == []
    compiled = project / "networks/__pycache__/example.cpython-399.pyc"
    compiled.parent.mkdir(exist_ok=True)
    compiled.write_bytes(b"what another Python makes")
    assert "networks" not in passed(run(project, "dvc", "status", "plan"))
