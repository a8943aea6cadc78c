"""Traces in and out: read, render to tokens with segments, cut, weigh, batch."""
