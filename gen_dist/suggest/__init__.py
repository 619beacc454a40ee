"""One call before training that answers "what rate?": `suggest_lr`, and the command `python -m gen_dist.suggest`."""

from gen_dist.suggest.search import suggest_lr
from gen_dist.suggest.suggestion import Curve, Suggestion

__all__ = ["Curve", "Suggestion", "suggest_lr"]
