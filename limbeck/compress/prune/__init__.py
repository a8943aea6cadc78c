"""Pruning: one solver a file."""
