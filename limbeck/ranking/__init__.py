"""Candidates scored by one token: data, training, measures."""
