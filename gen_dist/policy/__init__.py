"""The policy: from what was measured to a learning rate, by pure functions of plain numbers."""

from gen_dist.policy.auto import Auto
from gen_dist.policy.rule import (
    ACCEPTED,
    CLAMPED,
    CURVATURE_IN_ROUNDING,
    CURVATURE_NOT_POSITIVE,
    FLAT,
    NO_DESCENT,
    NOT_FINITE,
    OTHER_FUNCTION,
    SHORTENED,
    WENT_TOO_FAR,
    Clamp,
    Raw,
    Rule,
    update,
    why_no_minimum,
)
from gen_dist.policy.state import State, state_from_dict, state_to_dict

__all__ = [
    "ACCEPTED",
    "CLAMPED",
    "CURVATURE_IN_ROUNDING",
    "CURVATURE_NOT_POSITIVE",
    "FLAT",
    "NOT_FINITE",
    "NO_DESCENT",
    "OTHER_FUNCTION",
    "SHORTENED",
    "WENT_TOO_FAR",
    "Auto",
    "Clamp",
    "Raw",
    "Rule",
    "State",
    "state_from_dict",
    "state_to_dict",
    "update",
    "why_no_minimum",
]
