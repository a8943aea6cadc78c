"""Quantisation: one solver a file."""
