"""How a model is spread over ranks, and how the ranks talk: the only place that knows kinds of parallelism."""

from gen_dist.parallel.gradients import dense
from gen_dist.parallel.layout import Layout
from gen_dist.parallel.placement import is_shard, local, placed_like
from gen_dist.parallel.ranks import Ranks

__all__ = ["Layout", "Ranks", "dense", "is_shard", "local", "placed_like"]
