"""The HTTP server; `limbeck.serve(...)` starts it."""

from limbeck.library import make_callable

make_callable(__name__)
