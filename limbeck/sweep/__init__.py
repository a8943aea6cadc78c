"""Many students over a grid; `limbeck.sweep(...)` trains them."""

from limbeck.library import make_callable

make_callable(__name__)
