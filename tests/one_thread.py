"""Imported first by tests that compute with TensorFlow: the number of threads is fixed before the first operation."""

from ablation_lab import backend

backend.set_up(1)
