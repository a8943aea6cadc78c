"""Export: what a model becomes for others, and the proof that they read it."""
