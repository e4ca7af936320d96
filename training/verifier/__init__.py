"""How the shipped verifier is made: data, training, measuring, calibration, export. ``python -m training.verifier --help``."""

import os

# Read when torch is loaded: threads that wait must not spin, or a busy machine spends its processors on waiting.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
