"""Measurements behind the claims of `limbeck.optim`, one command each: `python -m studies.NAME`."""
