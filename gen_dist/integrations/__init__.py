"""One small file for each trainer, imported when asked for: `accelerate`, `lightning`, `torchtitan`, `transformers`."""
