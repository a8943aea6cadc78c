"""Distillation: the loss, the objective and the training loop; `limbeck.distill(...)` trains one student."""

from limbeck.library import make_callable

make_callable(__name__)
