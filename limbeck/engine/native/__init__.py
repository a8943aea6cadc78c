"""Decoding in C++, compiled on the machine where it runs."""
