"""What Triton's compiler asks of the source of a kernel, without Triton: its interpreter does not ask."""

import ast
from pathlib import Path

import pytest

from limbeck.distill import kernels

TREE = ast.parse(Path(kernels.__file__).read_text(encoding="utf-8"))
JITTED = {
    node.name: node
    for node in TREE.body
    if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "triton.jit" for d in node.decorator_list)
}


@pytest.mark.parametrize("name", JITTED)
def test_annotations_are_names_of_triton(name):
    """The compiler looks them up, and knows nothing that is not its own."""
    found = {ast.unparse(argument.annotation) for argument in JITTED[name].args.args if argument.annotation}
    assert found <= {"tl.tensor", "tl.constexpr"} and len(JITTED) > 4
