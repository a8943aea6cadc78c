"""One page from sweeps, runs and compressed models; `limbeck.report(...)` writes it."""

from limbeck.library import make_callable

make_callable(__name__)
