"""x"""

from gen_dist.parallel.layout import Layout, local, placed_like
from gen_dist.parallel.ranks import Ranks, dense

__all__ = ["Layout", "Ranks", "dense", "local", "placed_like"]
