"""MLflow, the mirror of DVC's files: live runs of trainings, and runs made from files. Nothing else imports mlflow.

`live` is what a training knows of it; it sends its figures to `logger`, a process of its own. `mirror` makes the store
agree with the files. Both write runs through `runs`, into the `store`.
"""

import os

# Before mlflow is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
