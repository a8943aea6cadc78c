"""Stages in order, each skipped when nothing changed; `limbeck.pipeline(...)` runs a recipe."""

from limbeck.library import make_callable

make_callable(__name__)
