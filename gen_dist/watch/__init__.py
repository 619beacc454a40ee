"""Companions of a step: they watch what an update measures and does."""
