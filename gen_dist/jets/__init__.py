"""2-jets: value, velocity and acceleration of every tensor along a line, carried forward through a model."""

from gen_dist.jets import dispatch, rules
from gen_dist.jets.jet import Jet, UnsupportedOperation, derivatives, velocity_only
from gen_dist.jets.mode import JetMode

__all__ = ["Jet", "JetMode", "UnsupportedOperation", "derivatives", "dispatch", "rules", "velocity_only"]
