"""Tasks, answer checking and metrics with intervals; `limbeck.evaluate(...)` scores a model."""

from limbeck.library import make_callable

make_callable(__name__)
