"""How a model is spread over ranks, and how the ranks talk: the only place that knows kinds of parallelism."""
