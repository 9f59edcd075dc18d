"""DVC called from `ablab`."""

import os
import sys
from pathlib import Path

DVC = [sys.executable, "-m", "dvc"]


def environment() -> dict[str, str]:
    """What DVC is called with: none of the variables that an outer DVC sets for its stages, and the environment's own
    `python` first, which stages run whether or not the user's shell has activated it."""
    found = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
    found["DVC_NO_ANALYTICS"] = "1"
    found["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{found.get('PATH', '')}"
    return found
