"""Ranking by one token: features as text, the label's probability as score, distillation of it, and its metrics."""
