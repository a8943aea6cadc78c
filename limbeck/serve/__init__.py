"""Serving: the engine that scores prompts, in plain torch on a CPU."""
