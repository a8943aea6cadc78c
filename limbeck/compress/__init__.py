"""Compression: one walk over the model, small pure solvers for one layer, files that engines load."""
