"""Distil a large reasoning model into a small, fast one and see what every saving costs."""

__version__ = "0.1.0"
