"""Companions of an update, which watch what it measures and does; and whether the ranks still hold the same."""

from gen_dist.watch.calls import Calls
from gen_dist.watch.companion import Companion, Companions, Seen
from gen_dist.watch.drift import check_in_sync
from gen_dist.watch.gradient_noise import GradientNoise
from gen_dist.watch.idle import Idle
from gen_dist.watch.self_check import SelfCheck
from gen_dist.watch.verification import Verification

__all__ = [
    "Calls",
    "Companion",
    "Companions",
    "GradientNoise",
    "Idle",
    "Seen",
    "SelfCheck",
    "Verification",
    "check_in_sync",
]
