"""Companions of an update, whether the ranks still hold the same, and `Watch`, for rates that something else sets."""

from gen_dist.watch.calls import Calls
from gen_dist.watch.companion import Companion, Companions, Seen
from gen_dist.watch.drift import check_in_sync
from gen_dist.watch.gradient_noise import GradientNoise
from gen_dist.watch.idle import Idle
from gen_dist.watch.self_check import SelfCheck
from gen_dist.watch.verification import Verification
from gen_dist.watch.watch import Watch
from gen_dist.watch.watched import Watched

__all__ = [
    "Calls",
    "Companion",
    "Companions",
    "GradientNoise",
    "Idle",
    "Seen",
    "SelfCheck",
    "Verification",
    "Watch",
    "Watched",
    "check_in_sync",
]
