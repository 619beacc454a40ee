"""The yardstick: exact curvature on the models of public packages, held to double backward. See `run.py`."""
