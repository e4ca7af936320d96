"""How the shipped verifier is made: data, training, measuring, calibration, export. ``python -m training.verifier --help``."""
