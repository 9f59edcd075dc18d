"""One thin script a stage, run by dvc.yaml as `python -m stages.NAME` from the project's root.

Stages import the library that lies beside them rather than an installed copy: DVC's temporary experiments are checkouts
of their own, and their code must be the code that runs. A stage imports what it needs inside `main`: libraries take
seconds, in which Ctrl-C must end it as cleanly as later on.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("keras") is None:
    sys.exit(
        f"error: Expected the environment that `make setup` makes. Found: {sys.executable}, without Keras. "
        "Call `source .venv/bin/activate` first."
    )

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
