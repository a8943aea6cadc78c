"""Pruning, quantisation and export: models in, smaller models out."""
