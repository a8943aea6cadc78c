"""Serving: an engine in plain torch that scores and generates, and HTTP over it."""
