"""Scoring and generation: one decoder for all that reads or writes with a model."""
