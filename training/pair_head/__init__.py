"""How the shipped pair head is made: pairs, fitting, calibration, export. ``python -m training.pair_head --help``."""

import os

# As training.verifier: threads that wait must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
