"""Imports go down only: a module may import the layers above its own line, never below."""

import ast
from pathlib import Path

import pytest

import limbeck

ROOT = Path(limbeck.__file__).parent
LAYERS = [
    ["errors", "lazy", "version"],
    ["yaml_values"],
    ["config"],
    ["flags", "placement", "progress", "client"],
    ["checkpoint", "stores"],
    ["stage"],
    ["commands"],
    ["library", "help"],
    ["runner"],
    ["models"],
    ["ledger"],
    ["engine"],
    ["cost", "selftest"],
    ["traces"],
    ["teacher"],
    ["optim"],
    ["distill"],
    ["evaluate"],
    ["compress"],
    ["ranking"],
    ["serve"],
    ["scale"],
    ["sweep"],
    ["report"],
    ["pipeline"],
    ["demo", "doctor"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# The reason stands beside each: an optional extra, or a heavy library that only one source of traces needs.
LAZY_IMPORTS_ALLOWED = {
    "limbeck/traces/gym.py",
    "limbeck/traces/hub.py",
    "limbeck/serve/command.py",
    "limbeck/runner/cluster.py",
    "limbeck/engine/constraints.py",
    "limbeck/evaluate/benchmarks.py",
    "limbeck/ranking/baselines.py",
}


def modules():
    return sorted(ROOT.rglob("*.py"))


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    if own == "__init__":
        return
    assert own in LEVEL, f"{own} has no layer yet; add it to LAYERS"
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module == "limbeck":
            names = [f"limbeck.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("limbeck.") and layer_of(name) in LEVEL:
                assert LEVEL[layer_of(name)] <= LEVEL[own], f"{own} imports {name}, which lies below it"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_stand_at_the_top(path):
    relative = f"limbeck/{path.relative_to(ROOT)}"
    nested = [
        node.lineno
        for function in ast.walk(ast.parse(path.read_text()))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not nested or relative in LAZY_IMPORTS_ALLOWED, f"{relative} imports inside a function at lines {nested}"
