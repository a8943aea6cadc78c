"""Targets: of a live model, of a cache on disk, of a server."""
