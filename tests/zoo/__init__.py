"""The yardstick: exact curvature on the models of public packages, held to double backward. See `run.py`."""

import torchvision_for_cpus  # noqa: F401 - before the families import what imports torchvision
