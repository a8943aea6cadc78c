"""The engine: a lean decoder, shared prefixes, and scores of label tokens."""
